"""The part of ray that the engine uses, with threads for processes: nodes that come and die, and actors that wait for
a place on one."""

from __future__ import annotations

import concurrent.futures
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Handle:
    """An actor. Its calls wait until it has a place."""

    def __init__(self, cluster: FakeRay, make) -> None:
        self.cluster, self.make, self.place, self.dead = cluster, make, None, False
        self.placed, self.threads, self.futures = threading.Event(), ThreadPoolExecutor(4), []

    def __getattr__(self, name: str):
        return SimpleNamespace(remote=lambda *arguments: self.call(name, arguments))

    def call(self, name: str, arguments: tuple) -> Future:
        future: Future = Future()
        self.futures.append(future)
        if self.dead:
            future.set_exception(RayError("the actor died"))
        else:
            self.threads.submit(self.answer, future, name, arguments)
        return future

    def answer(self, future: Future, name: str, arguments: tuple) -> None:
        self.placed.wait()
        if self.dead:
            return
        try:
            result, error = getattr(self.instance, name)(*arguments), None
        except BaseException as raised:
            result, error = None, RayTaskError(raised)
        if not self.dead:
            future.set_exception(error) if error else future.set_result(result)

    def die(self) -> None:
        self.dead = True
        self.placed.set()
        for future in self.futures:
            if not future.done():
                future.set_exception(RayError("the actor died"))


class FakeRay:
    """The module `ray`, connected to nodes with so many CPUs each."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, *cpus: int) -> None:
        self.cpus = dict(enumerate(cpus))
        self.actors: list[Handle] = []

    def nodes(self) -> list[dict]:
        return [{"Alive": True, "Resources": {"CPU": float(cpus)}} for cpus in self.cpus.values()]

    def add_node(self, cpus: int) -> None:
        self.cpus[max(self.cpus, default=-1) + 1] = cpus
        self.find_places()

    def remove_node(self, node: int) -> None:
        del self.cpus[node]
        for actor in self.actors:
            if actor.place == node:
                actor.die()
        self.find_places()

    def find_places(self) -> None:
        for actor in self.actors:
            if actor.dead or actor.place is not None:
                continue
            for node, cpus in self.cpus.items():
                if sum(a.place == node and not a.dead for a in self.actors) < cpus:
                    actor.place, actor.instance = node, actor.make()
                    actor.placed.set()
                    break

    def remote(self, **options):
        def made(kind):
            def start(*arguments) -> Handle:
                self.actors.append(Handle(self, lambda: kind(*arguments)))
                self.find_places()
                return self.actors[-1]

            return SimpleNamespace(remote=start)

        return made

    def wait(self, calls: list[Future], num_returns: int = 1, timeout: float | None = None):
        when = concurrent.futures.ALL_COMPLETED if num_returns == len(calls) else concurrent.futures.FIRST_COMPLETED
        done, left = concurrent.futures.wait(calls, timeout, when) if calls else (set(), set())
        return list(done), list(left)

    def get(self, call: Future):
        return call.result()

    def kill(self, actor: Handle) -> None:
        actor.die()
        self.find_places()

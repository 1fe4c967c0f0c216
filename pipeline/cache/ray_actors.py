"""Writing shards with the processes of a ray cluster: actors that hold the networks, and a shard for each at a time.

Actors start as far as there is room for them, so nodes may join. One that dies, or fails, gives its shard back, and
another one writes it. Shards appear complete or not at all, so nothing else has to be undone.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.system.echo import say
from pipeline.system.errors import UserError
from pipeline.system.ray_cluster import FINAL, TRIES, Cluster, Died
from shards.files import remove_partials
from shards.location import Location
from shards.plan import PlannedShard

# Seconds between two looks at what the actors have written; until it is said that none has started; and that they get
# to keep what they have written when the run is stopped.
LOOK, SILENCE, GRACE = 1.0, 15.0, 30.0


class Writer(Protocol):
    """What an actor holds: a LatentsWriter or a TargetsWriter."""

    def write(self, shards: list[PlannedShard], advance: Callable[[int], Any]) -> None: ...


class Stopped(Exception):
    """The run was stopped. What is written of a shard is kept for the next one."""


class Actor:
    """A process of the cluster. It writes one shard at a time, and answers meanwhile."""

    def __init__(self, folder: str) -> None:
        # Where paths mean the same as for the process that started the run.
        with suppress(OSError):
            os.chdir(folder)
        self.writer: Writer | None = None
        self.written, self.stopping = 0, False

    def node(self) -> str:
        return socket.gethostname()

    def open(self, open_writer: Callable[..., Writer], arguments: tuple[Any, ...]) -> None:
        """Load the networks."""
        self.writer = open_writer(*arguments)

    def write(self, shard: PlannedShard) -> None:
        assert self.writer is not None
        self.written = 0
        self.writer.write([shard], self._advance)

    def count(self) -> int:
        """How many entries of its shard are written."""
        return self.written

    def stop(self) -> None:
        """End with the current entry."""
        self.stopping = True

    def _advance(self, count: int) -> None:
        self.written += count
        if self.stopping:
            raise Stopped


@dataclass
class Member:
    """An actor as the run sees it. `call` is what it is asked for now: a place, to open, or to write `shard`."""

    actor: Any
    call: Any
    node: str | None = None
    is_open: bool = False
    shard: PlannedShard | None = None
    written: int = 0
    asked: Any = None


def write_on_cluster(
    cluster: Cluster,
    open_writer: Callable[..., Writer],
    arguments: tuple[Any, ...],
    shards: list[PlannedShard],
    out: Location,
    advance: Callable[[int], Any],
) -> None:
    """Write shards to `out` with actors that each hold what `open_writer(*arguments)` returns.

    `advance(n)` is called as n more entries are written; n is negative where an actor is lost with what it wrote.
    Raises an error that the user can fix as it was raised in an actor, and any other at the third try.
    """
    cluster.refuse_no_place()
    run = _Run(cluster, open_writer, arguments, shards, advance)
    try:
        run.write_all()
    except BaseException:
        run.stop()
        raise
    finally:
        run.end()
    if isinstance(out, Path):
        # What lost nodes had begun: no other machine would take their files for its own.
        for name in run.failures:
            remove_partials(out, name.removesuffix(".tar"))


class _Run:
    def __init__(
        self,
        cluster: Cluster,
        open_writer: Callable[..., Writer],
        arguments: tuple[Any, ...],
        shards: list[PlannedShard],
        advance: Callable[[int], Any],
    ) -> None:
        self.cluster, self.ray = cluster, cluster.ray
        self.opening, self.advance = (open_writer, arguments), advance
        self.left = deque(shards)
        self.members: list[Member] = []
        self.failures: Counter[str] = Counter()
        self.failed_starts = 0
        self.finished, self.shown = 0, 0
        # A thread writes, and another one answers.
        self.actor_class = self.ray.remote(max_restarts=0, max_concurrency=2, **cluster.share)(Actor)

    def write_all(self) -> None:
        began, looked, told = time.monotonic(), 0.0, False
        while self.left or any(member.shard for member in self.members):
            if time.monotonic() - looked >= LOOK:
                looked = time.monotonic()
                self.start_actors()
                self.look()
            self.hand_out()
            busy = {member.call: member for member in self.members if member.call is not None}
            ended, _ = self.ray.wait(list(busy), timeout=LOOK)
            for call in ended:
                self.take(busy[call])
            if not told and time.monotonic() - began > SILENCE and not any(member.node for member in self.members):
                say(f"waiting for a place in the ray cluster: an actor needs {self.cluster.need()}", err=True)
                told = True
        self.look()

    def start_actors(self) -> None:
        """Have an actor for each place and shard; where nodes may join, one more, which waits for them."""
        shards = len(self.left) + sum(member.shard is not None for member in self.members)
        wanted = min(shards, self.cluster.places() + self.cluster.elastic)
        while len(self.members) < wanted:
            actor = self.actor_class.remote(os.getcwd())
            self.members.append(Member(actor, actor.node.remote()))

    def hand_out(self) -> None:
        for member in self.members:
            if self.left and member.is_open and member.shard is None:
                member.shard, member.written = self.left.popleft(), 0
                member.call = member.actor.write.remote(member.shard)

    def take(self, member: Member) -> None:
        """Take the result of a call, and go on to the next."""
        try:
            found = self.cluster.result(member.call)
        except FINAL as error:
            if not isinstance(error, Died):
                raise
            self.failed(member, error)
            return
        except Exception as error:
            self.failed(member, error)
            return
        member.call = None
        if member.shard is not None:
            self.finished += len(member.shard.indices)
            member.shard, member.written = None, 0
        elif member.node is None:
            member.node, member.call = found, member.actor.open.remote(*self.opening)
        else:
            member.is_open, self.failed_starts = True, 0

    def failed(self, member: Member, error: Exception) -> None:
        """Give up an actor, and its shard to another one. Raises the error if that was the last try."""
        self.members.remove(member)
        self.ray.kill(member.actor)
        where = f" on {member.node}" if member.node else ""
        if member.shard is None:
            self.failed_starts += 1
            tries, what = self.failed_starts, "an actor did not start"
        else:
            self.left.appendleft(member.shard)
            self.failures[member.shard.name] += 1
            tries, what = self.failures[member.shard.name], f"{member.shard.name} was not written"
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, Died) else f"its process died: {error}"
        if tries < TRIES:
            say(f"{what}{where}, and is tried again ({reason})", err=True)
        elif isinstance(error, Died):
            raise UserError(f"{what}, {TRIES} times; the last time{where}: {reason}")
        else:
            raise error

    def look(self) -> None:
        """Show how far the actors have come, as they last said, and ask those that are writing again."""
        for member in self.members:
            if member.asked is not None and self.ray.wait([member.asked], timeout=0)[0]:
                with suppress(self.ray.exceptions.RayError):
                    member.written = self.ray.get(member.asked)
                member.asked = None
            if member.shard and member.asked is None:
                member.asked = member.actor.count.remote()
        now = self.finished + sum(member.written for member in self.members if member.shard)
        self.advance(now - self.shown)
        self.shown = now

    def stop(self) -> None:
        """Have the actors keep what they have written so far."""
        writing = [member for member in self.members if member.shard]
        for member in writing:
            member.actor.stop.remote()
        if writing:
            self.ray.wait([member.call for member in writing], num_returns=len(writing), timeout=GRACE)

    def end(self) -> None:
        for member in self.members:
            self.ray.kill(member.actor)

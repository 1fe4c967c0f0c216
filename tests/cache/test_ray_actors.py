"""The loop of `--engine ray` that hands out shards, with threads in place of a cluster."""

import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from support.fake_ray import FakeRay

from pipeline.cache import ray_actors
from pipeline.cache.ray_actors import write_on_cluster
from pipeline.system.errors import UserError
from pipeline.system.ray_cluster import Cluster
from shards.plan import ShardPlan

SHARDS = ShardPlan(12, 3).shards


class Scripted:
    """A writer that does for a shard what `script` says for its name: it is called at each entry."""

    def __init__(self, script) -> None:
        self.script = script

    def write(self, shards, advance) -> None:
        for shard in shards:
            for _ in shard.indices:
                self.script(shard.name)
                advance(1)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(ray_actors, "LOOK", 0.01)
    monkeypatch.setattr(ray_actors, "GRACE", 5.0)


def run(ray, script, *, elastic=True, out=Path("nowhere")):
    """Write SHARDS. Returns the sum that the progress came to."""
    shown = []
    write_on_cluster(Cluster(ray, 0.0, 1, elastic), Scripted, (script,), SHARDS, out, shown.append)
    return sum(shown)


def until(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_each_shard_is_written_once_and_nothing_stays_behind():
    ray, seen = FakeRay(1, 1), Counter()
    assert run(ray, lambda name: seen.update([name])) == 12
    assert seen == {shard.name: 3 for shard in SHARDS}
    assert all(actor.dead for actor in ray.actors)
    # One for each place, and one that waited for a node to join.
    assert len(ray.actors) == 3


def test_a_cluster_of_its_own_has_no_actor_that_waits():
    ray = FakeRay(2)
    run(ray, lambda name: None, elastic=False)
    assert len(ray.actors) == 2


def test_the_shard_of_a_node_that_dies_is_written_on_another(tmp_path, capsys):
    ray, seen = FakeRay(1, 1), Counter()

    def script(name):
        seen[name] += 1
        if name == "s00000.tar" and seen[name] == 2:
            ray.remove_node(next(actor.place for actor in ray.actors if actor.place is not None))
            # A dead process does no more.
            threading.Event().wait(0.2)

    left = tmp_path / ".s00000.tar.elsewhere.7-0badcafe.partial"
    left.write_bytes(b"half")
    assert run(ray, script, out=tmp_path) == 12
    assert not left.exists()
    assert seen["s00000.tar"] >= 5
    assert set(seen) == {shard.name for shard in SHARDS}
    assert "and is tried again (its process died: the actor died)" in capsys.readouterr().err


def test_a_node_that_joins_gets_an_actor():
    ray, open_doors, nodes = FakeRay(1), threading.Event(), set()

    def script(name):
        nodes.add(name)
        if name == "s00000.tar":
            open_doors.wait(10)
        else:
            open_doors.set()

    def join():
        until(lambda: nodes)
        ray.add_node(1)

    threading.Thread(target=join).start()
    assert run(ray, script) == 12
    assert {actor.place for actor in ray.actors} >= {0, 1}


def test_an_error_that_the_user_can_fix_arrives_as_it_was_raised():
    def script(name):
        if name == "s00001.tar":
            raise UserError("the images are gone. Bring them back.")

    with pytest.raises(UserError, match=r"^the images are gone. Bring them back.$"):
        run(FakeRay(2), script)


def test_another_error_ends_the_run_at_the_third_try(capsys):
    tries = Counter()

    def script(name):
        tries[name] += 1
        if name == "s00001.tar":
            raise ZeroDivisionError("ours")

    with pytest.raises(ZeroDivisionError, match="ours"):
        run(FakeRay(1), script)
    assert tries["s00001.tar"] == 3
    assert capsys.readouterr().err.count("was not written on ") == 2


def test_a_shard_whose_process_dies_three_times_ends_the_run_with_the_reason():
    ray = FakeRay(1)

    def script(name):
        ray.kill(next(actor for actor in ray.actors if actor.place is not None and not actor.dead))

    with pytest.raises(UserError, match=r"s00000.tar was not written, 3 times; .* its process died: the actor died"):
        run(ray, script)


def test_actors_that_never_open_end_the_run(tmp_path):
    def broken(script):
        raise ModuleNotFoundError("No module named 'pipeline'")

    with pytest.raises(ModuleNotFoundError):
        write_on_cluster(Cluster(FakeRay(2), 0.0, 1, True), broken, (None,), SHARDS, tmp_path, lambda count: None)


def test_ctrl_c_lets_the_actors_keep_what_they_have_written(tmp_path):
    """They are stopped between two entries, where the writer of a shard keeps what it has."""
    begun, kept = threading.Event(), []

    class Keeping(Scripted):
        def write(self, shards, advance):
            try:
                while True:
                    begun.set()
                    advance(1)
                    time.sleep(0.01)
            except ray_actors.Stopped:
                kept.append(shards[0].name)
                raise

    def interrupt(count):
        if begun.is_set():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_on_cluster(Cluster(FakeRay(1, 1), 0.0, 1, True), Keeping, (None,), SHARDS, tmp_path, interrupt)
    assert kept
    assert set(kept) <= {"s00000.tar", "s00001.tar"}


def test_a_machine_that_is_too_small_for_an_actor_is_told(tmp_path):
    with pytest.raises(UserError, match="an actor needs 4 CPUs, which this machine does not have. Lower"):
        write_on_cluster(Cluster(FakeRay(2), 0.0, 4, False), Scripted, (None,), SHARDS, tmp_path, lambda count: None)

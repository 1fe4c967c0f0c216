"""A training on a rolling cache: it waits for its rounds, tells what it has passed, and ends as on a fixed cache."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support.buckets import held
from support.rolling import rolling_copy, rounds_in, teach
from support.stages import TeacherCacheSettings, reset_accelerate, run_distill, run_teacher_cache, state_dict_of
from tqdm import tqdm

from pipeline.cache import rolling as writer
from pipeline.cli import main
from pipeline.commands import distill
from pipeline.distill import DistillSettings
from pipeline.system.errors import UserError
from pipeline.training import rounds
from pipeline.training.checkpoint import list_checkpoints
from shards.cache import Cache
from shards.location import location_of
from shards.manifest import read_manifest, write_manifest
from shards.readers import drop_reader, read_reader, read_readers
from shards.schema import ShardError
from shards.store import LocalStore, open_store

FORK = multiprocessing.get_context("fork")
# Five rounds of 13 entries, of which the steps take 60.
STEPS = {"order": "rounds", "max_train_steps": 10, "train_batch_size": 6}
FEW = {**STEPS, "max_train_steps": 2}


@pytest.fixture(scope="module")
def fixed(teacher, latents, tmp_path_factory):
    return run_teacher_cache(teacher, latents, tmp_path_factory.mktemp("fixed") / "cache", rounds=5)


@pytest.fixture(scope="module")
def expected(fixed, tmp_path_factory):
    """The weights of a student that found all rounds there, after five steps and at the end."""
    out = run_distill(fixed, tmp_path_factory.mktemp("expected") / "out", **STEPS, checkpointing_steps=5)
    return {5: state_dict_of(out / "checkpoints" / "step-0000005" / "unet"), 10: state_dict_of(out / "unet")}


@pytest.fixture
def rolling(fixed, tmp_path):
    return rolling_copy(fixed, tmp_path / "rolling", 2)


@pytest.fixture
def seen(fixed, rolling, monkeypatch):
    """The teacher works whenever the student waits; the rounds that are there then, one list for each wait."""
    found = []
    monkeypatch.setattr(rounds.time, "sleep", lambda seconds: found.append(teach(fixed, rolling)))
    return found


def alone(function, args, changes):
    """What a child does: a stage, without its parent's threads and locks."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())
    function(*args, **changes)


def begin(function, *args, **changes):
    child = FORK.Process(target=alone, args=(function, args, changes))
    child.start()
    return child


class Rounds:
    """The rounds that a rolling cache holds, and the most that there ever were."""

    def __init__(self, cache):
        self.cache, self.most = cache, 0

    def now(self):
        is_url = not isinstance(self.cache, Path)
        names = held("rolling") if is_url else [path.name for path in self.cache.glob("r0*")]
        found = {int(name[1:5]) for name in list(names) if name.startswith("r0")}
        self.most = max(self.most, len(found))
        return found

    def until(self, reached):
        deadline = time.monotonic() + 240
        while not reached(self.now()):
            assert time.monotonic() < deadline, f"nothing happened; the rounds are {self.now()}"
            time.sleep(0.1)


def killed(child):
    assert child.exitcode is None
    child.kill()
    child.join()


@pytest.mark.parametrize("place", ["directory", "bucket"])
def test_killed_and_begun_again_each_side_ends_as_if_nothing_had_been(
    place, teacher, latents, fixed, expected, bucket, tmp_path, monkeypatch
):
    """Teacher and students as processes. In the directory there are two students, of which one is slower; a bucket,
    where all takes longer, has three rounds."""
    for module in (rounds, writer):
        monkeypatch.setattr(module, "POLL", 0.2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    cache = tmp_path / "rolling" if place == "directory" else location_of("s3://bucket/rolling")
    there, steps = Rounds(cache), lambda: len(list((tmp_path / "out" / "checkpoints").glob("step-*")))
    teaching = teacher, latents, cache
    rolls = {"rounds": 5, "window": 2, "entries_per_shard": 13}
    teaches = begin(run_teacher_cache, *teaching, **rolls)
    there.until(lambda found: found == {0, 1})
    taken = {**STEPS, "max_train_steps": 10 if place == "directory" else 5}
    learns = begin(run_distill, cache, tmp_path / "out", **taken, checkpointing_steps=1, checkpoints_total_limit=99)
    slow = {**STEPS, "max_train_steps": 14, "train_batch_size": 3, "seed": 1}
    others = [begin(run_distill, cache, tmp_path / "slow", **slow)] if place == "directory" else []
    there.until(lambda found: steps() >= 2)
    killed(learns)
    learns = begin(run_distill, cache, tmp_path / "out", **taken)
    there.until(lambda found: 2 in found)
    killed(teaches)
    teaches = begin(run_teacher_cache, *teaching, **rolls)
    there.until(lambda found: not any(child.is_alive() for child in (teaches, learns, *others)))
    assert [child.exitcode for child in (teaches, learns, *others)] == [0] * (2 + len(others))
    assert there.most == 2
    assert same(state_dict_of(tmp_path / "out" / "unet"), expected[taken["max_train_steps"]])
    if others:
        alike = run_distill(fixed, tmp_path / "alike", **slow)
        assert same(state_dict_of(tmp_path / "slow" / "unet"), state_dict_of(alike / "unet"))
    assert all(reader.is_done for reader in read_readers(open_store(cache)))


def as_rank(rank, shared, cache, out, changes):
    os.environ.update(shared, RANK=rank, LOCAL_RANK=rank)
    alone(run_distill, (cache, out), changes)


def test_two_processes_that_train_together_are_one_reader_and_wait_at_the_same_step(
    fixed, rolling, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(rounds, "POLL", 0.1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    few = {**STEPS, "max_train_steps": 5, "train_batch_size": 3}
    ranks = [FORK.Process(target=as_rank, args=(rank, shared, rolling, tmp_path / "out", few)) for rank in "01"]
    for rank in ranks:
        rank.start()
    there = []
    while any(rank.is_alive() for rank in ranks):
        there.append(teach(fixed, rolling))
        time.sleep(0.5)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert there[0] == [0, 1]
    assert there[-1] in ([1, 2], [2])
    assert [(reader.name, reader.next, reader.end) for reader in read_readers(LocalStore(rolling))] == [("out", 3, 3)]
    found = state_dict_of(tmp_path / "out" / "unet")
    errors = torch.cat([(found[name] - expected[5][name]).flatten().abs() for name in found])
    assert (errors < 1e-5).float().mean() > 0.99


def same(weights, expected):
    return weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_student_of_a_rolling_cache_is_that_of_a_fixed_one_bit_for_bit(rolling, seen, expected, tmp_path):
    out = run_distill(rolling, tmp_path / "out", **STEPS, dataloader_num_workers=1)
    assert same(state_dict_of(out / "unet"), expected[10])
    assert max(map(len, seen)) == 2
    assert sorted(set(itertools.chain(*seen))) == [0, 1, 2, 3, 4]
    assert [(r.name, r.next, r.end, r.is_done) for r in read_readers(LocalStore(rolling))] == [("out", 5, 5, True)]


def test_told_to_stop_while_it_waits_it_leaves_a_checkpoint_and_goes_on_from_there(
    fixed, rolling, seen, expected, tmp_path, monkeypatch, capfd
):
    teach(fixed, rolling)
    monkeypatch.setattr(rounds, "SILENCE", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(rounds.time, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt, match="Stopped at step 4 of 10. Rerun the same command"):
            run_distill(rolling, tmp_path / "out", **STEPS, checkpointing_steps=100)
    reset_accelerate()
    assert f"waiting for round 2 of {rolling}" in capfd.readouterr().err
    assert [step for step, _ in list_checkpoints(tmp_path / "out" / "checkpoints")][-1] == 4
    # Its checkpoint still needs two entries of round 1.
    assert read_reader(LocalStore(rolling), "out").next == 1
    out = run_distill(rolling, tmp_path / "out", **STEPS)
    assert same(state_dict_of(out / "unet"), expected[10])


def test_a_reader_that_goes_back_finds_its_rounds_written_again_to_the_byte(fixed, rolling, seen, expected, tmp_path):
    out = run_distill(rolling, tmp_path / "out", **{**STEPS, "max_train_steps": 7}, checkpoints_total_limit=9)
    teach(fixed, rolling)
    for step, path in list_checkpoints(out / "checkpoints"):
        if step > 3:
            path.rename(tmp_path / path.name)
    for name in (*rolling.glob("r0*"), out / "finished.json"):
        name.unlink()
    seen.clear()
    run_distill(rolling, out, **STEPS)
    assert seen[0] == [1, 2]
    assert same(state_dict_of(out / "unet"), expected[10])


@pytest.fixture(scope="module")
def short(fixed, tmp_path_factory):
    """A rolling cache with its first rounds, and a finished training of two steps, its reader `out`."""
    place = tmp_path_factory.mktemp("short")
    teach(fixed, rolling_copy(fixed, place / "rolling", 2))
    run_distill(place / "rolling", place / "out", **FEW)
    return place


@pytest.fixture
def place(short, tmp_path):
    return shutil.copytree(short, tmp_path / "short")


def test_a_finished_training_waits_for_nothing(place, capfd):
    for path in (place / "rolling").glob("r0*"):
        path.unlink()
    run_distill(place / "rolling", place / "out", **FEW)
    assert "already finished, nothing to do" in capfd.readouterr().out


def test_a_reader_that_was_dropped_ends_with_the_way_back(fixed, rolling, tmp_path, monkeypatch):
    teach(fixed, rolling)
    monkeypatch.setattr(rounds.time, "sleep", lambda seconds: drop_reader(LocalStore(rolling), "out"))
    with pytest.raises(UserError, match="'out' of .*rolling was dropped.*Rerun the same command"):
        run_distill(rolling, tmp_path / "out", **STEPS)


def test_a_window_that_became_too_small_is_no_wait_for_ever(fixed, rolling, tmp_path, monkeypatch):
    """The teacher was begun again with another one while the student waits."""

    def smaller(seconds):
        manifest = read_manifest(LocalStore(rolling))
        write_manifest(LocalStore(rolling), replace(manifest, window=1))

    teach(fixed, rolling)
    monkeypatch.setattr(rounds.time, "sleep", smaller)
    with pytest.raises(UserError, match="window of 1, but steps of 6 entries take from 2 rounds.*--window 2"):
        run_distill(rolling, tmp_path / "out", **STEPS)


def test_a_name_is_one_training_s(place):
    rolling, other = place / "rolling", place / "elsewhere" / "out"
    with pytest.raises(UserError, match="reader 'out', another training.*--reader.*drop-reader --cache .* --name out"):
        run_distill(rolling, other, **STEPS)
    reset_accelerate()
    with pytest.raises(UserError, match="--reader b: the training in .*out is the reader 'out'"):
        run_distill(rolling, place / "out", **STEPS, reader="b")
    reset_accelerate()
    run_distill(rolling, other, **{**STEPS, "max_train_steps": 1}, reader="b")
    assert [reader.name for reader in read_readers(LocalStore(rolling))] == ["b", "out"]


def test_options_that_do_not_go_with_the_cache_are_refused(fixed, rolling, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="is a rolling cache.*Add --order rounds"):
        run_distill(rolling, out)
    with pytest.raises(UserError, match="--reader a: .* keeps all rounds and knows no readers"):
        run_distill(fixed, out, reader="a")
    with pytest.raises(UserError, match="window of 2, but steps of 30 entries take from 4 rounds.*--window 4"):
        run_distill(rolling, out, **{**STEPS, "train_batch_size": 30})
    with pytest.raises(UserError, match="has no initial weights of sd_tiny"):
        run_distill(rolling, out, **STEPS, level="sd_tiny")
    with pytest.raises(UserError, match="--reader '../a' is no name"):
        DistillSettings(cache=rolling, out=out, level="sd_small", reader="../a")
    assert read_readers(LocalStore(rolling)) == []
    assert not out.exists()


def test_what_needs_all_rounds_refuses_a_rolling_cache(rolling):
    with pytest.raises(ShardError, match=r"rolling cache \(--window 2\).*distill --order rounds"):
        Cache(open_store(rolling))


def test_a_dry_run_neither_waits_nor_becomes_a_reader(rolling, tmp_path):
    lines = distill.plan(DistillSettings(cache=rolling, out=tmp_path / "out", level="sd_small", device="cpu", **STEPS))
    assert lines[0].startswith("entries: 65")
    assert read_readers(LocalStore(rolling)) == []


def test_inspect_and_verify_say_what_is_there(fixed, rolling, seen, tmp_path):
    run_distill(rolling, tmp_path / "out", **{**STEPS, "max_train_steps": 5}, checkpointing_steps=3)
    (rolling / "r0000-s00000.index").unlink(missing_ok=True)
    shown = CliRunner().invoke(main, ["inspect", str(rolling)])
    assert shown.exit_code == 0, shown.output
    assert "rounds: 5, with a window of 2" in shown.output
    assert "rounds there: 1, 2" in shown.output
    assert "reader out: has passed all of its 3 rounds, last heard of at 20" in shown.output
    checked = CliRunner().invoke(main, ["verify", str(rolling), "--full"])
    assert checked.exit_code == 0, checked.output
    assert "no damage found; 6 of 15 shards intact, 26 entries" in checked.output
    (rolling / "r0001-s00000.tar").write_bytes(b"other")
    checked = CliRunner().invoke(main, ["verify", str(rolling)])
    assert checked.exit_code == 2
    assert "r0001-s00000.tar is damaged" in checked.output


def test_drop_reader_names_those_that_there_are(place, fixed):
    def invoke(cache, name):
        return CliRunner().invoke(main, ["drop-reader", "--cache", str(cache), "--name", name])

    rolling = place / "rolling"
    assert "has no such reader. Its readers are out." in invoke(rolling, "../out").output
    (rolling / "readers" / "out.json").write_text("{}")
    dropped = invoke(rolling, "out")
    assert dropped.exit_code == 0
    assert "dropped out" in dropped.output
    assert read_readers(LocalStore(rolling)) == []
    assert "has no such reader. It has none." in invoke(rolling, "out").output
    assert "keeps all rounds and knows no readers" in invoke(fixed, "out").output


def test_the_writer_refuses_what_makes_no_window(rolling, fixed, latents, teacher):
    given = {"teacher": str(teacher), "latents": latents, "out": rolling}
    with pytest.raises(UserError, match="--window 4 is not less than --rounds 4"):
        TeacherCacheSettings(**given, rounds=4, window=4)
    with pytest.raises(UserError, match="--shard-range 0:2.*written by one job"):
        TeacherCacheSettings(**given, rounds=4, window=2, shard_range="0:2")
    with pytest.raises(UserError, match="--window does not work with --engine ray"):
        TeacherCacheSettings(**given, rounds=4, window=2, engine="ray")
    with pytest.raises(UserError, match="holds a rolling cache. Add --window 2"):
        run_teacher_cache(teacher, latents, rolling, rounds=5)
    reset_accelerate()
    with pytest.raises(UserError, match="--window 2: .* keeps all its rounds"):
        run_teacher_cache(teacher, latents, fixed, rounds=5, window=2)
    assert read_manifest(LocalStore(rolling)).window == 2
    assert rounds_in(rolling) == []
    assert json.loads((rolling / "manifest.json").read_text())["rounds"] == 5

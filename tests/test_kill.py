"""kill -9 at any moment: the same command again ends in the bytes of a run that nobody disturbed.

Each run is a child of its own, forked from this process, which has the libraries loaded already.
"""

import contextlib
import itertools
import multiprocessing
import os
import random
import signal
import socket
import threading
import time

import pytest
import torch
from support.stages import metrics, read_entries, run_distill, run_encode, run_teacher_cache, shard_files, tree
from support.tiny import write_images
from tqdm import tqdm

from pipeline.models.families.sd import SD
from pipeline.models.load import unet_config
from pipeline.models.shapes import tap_shapes
from pipeline.models.students import teacher_taps
from shards.files import remove_leftovers
from shards.schema import ShardError
from shards.writer import HashingStream

FORK = multiprocessing.get_context("fork")

HOST = socket.gethostname().replace(".", "-")


def in_child(function, arguments, kill_at, events):
    """Run a stage, and die at its `kill_at`-th write, sync or rename; else put their number in `events`."""
    # A forked child has none of its parent's threads, and would wait for them.
    torch.set_num_threads(1)
    # tqdm's lock is shared with the parent and its other children: one that dies holding it would stop them all.
    tqdm.set_lock(threading.RLock())
    counter = itertools.count()

    def deadly(real):
        def call(*args, **kwargs):
            if next(counter) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    os.replace, os.fsync, HashingStream.write = deadly(os.replace), deadly(os.fsync), deadly(HashingStream.write)
    function(*arguments[0], **arguments[1])
    events.value = next(counter)


def start(function, *args, kill_at=None, **changes):
    events = FORK.Value("i", 0)
    child = FORK.Process(target=in_child, args=(function, (args, changes), kill_at, events))
    child.start()
    return child, events


def whole_run(function, *args, **changes):
    """Run it to its end; returns how many events it had, and its seconds."""
    started = time.monotonic()
    child, events = start(function, *args, **changes)
    child.join()
    assert child.exitcode == 0
    return events.value, time.monotonic() - started


def killed_run(function, *args, kill_at=None, after=None, **changes):
    """Run it until it is killed, at an event or after some seconds; on a machine that hurries it may be done before."""
    child, _ = start(function, *args, kill_at=kill_at, **changes)
    child.join(after)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL or after


def moments(seed, events, seconds):
    """Six, drawn at random: events and times; the last event among them, behind which nothing is left to do."""
    draw = random.Random(seed)
    at = [{"kill_at": event} for event in (*draw.sample(range(events), min(events, 3)), events - 1)]
    return [*at, *({"after": draw.uniform(0.1, 0.9) * seconds} for _ in range(6 - len(at)))]


@pytest.fixture(scope="module")
def work(teacher, tmp_path_factory):
    """Where the undisturbed runs are: latents, cache, student."""
    place = tmp_path_factory.mktemp("undisturbed")
    write_images(place / "images", 5)
    # Computed here once; the forked children find it in their memory.
    taps = teacher_taps(("sd_small", "sd_tiny"))
    tap_shapes(unet_config(teacher), (4, 16, 16), {"prompt_embeds": (8, 10)}, taps, SD)
    return place


def encode(teacher, work, out):
    return run_encode(teacher, work / "images", out, entries_per_shard=2, workers=2)


def teacher_cache(teacher, work, out):
    return run_teacher_cache(teacher, work / "latents", out, entries_per_shard=2, students=("sd_small", "sd_tiny"))


def distill(teacher, work, out):
    return run_distill(work / "cache", out, max_train_steps=4, checkpointing_steps=2, checkpoints_total_limit=1)


SETTINGS = {"encode.json", "teacher-cache.json", "distill.json", "metrics.jsonl"}


def made(out):
    """All bytes that a stage made, but for settings, which name the directory, and the seconds in the metrics."""
    kept = {name: data for name, data in tree(out).items() if name not in SETTINGS and not name.endswith("state.pt")}
    lines = metrics(out) if (out / "metrics.jsonl").is_file() else []
    return kept, [
        {key: value for key, value in line.items() if key not in ("samples_per_second", "seconds")} for line in lines
    ]


def check_whole_or_unfinished(out, stage):
    """What stands there is either all of it, or refused for what it lacks."""
    with contextlib.suppress(ShardError):
        read_entries(out, stage, [])
        return
    with pytest.raises(ShardError, match="is unfinished.*to complete it"):
        read_entries(out, stage, [])


STAGES = {"latents": encode, "cache": teacher_cache, "student": distill}


@pytest.mark.parametrize("name", STAGES)
def test_a_killed_stage_ends_in_the_same_bytes(name, teacher, work, tmp_path):
    stage = STAGES[name]
    events, seconds = whole_run(stage, teacher, work, work / name)
    for number, moment in enumerate(moments(name, events, seconds)):
        out = tmp_path / str(number)
        killed_run(stage, teacher, work, out, **moment)
        if name != "student" and (out / "manifest.json").is_file():
            check_whole_or_unfinished(out, name)
        whole_run(stage, teacher, work, out)
        assert made(out) == made(work / name), moment
        assert not list(out.rglob(".*.partial")), moment


def test_a_killed_writers_leavings_are_cleared_unless_it_lives(teacher, work, tmp_path):
    out = run_encode(teacher, work / "images", tmp_path / "out", entries_per_shard=3)
    before = shard_files(out)
    child = FORK.Process(target=time.sleep, args=(60,))
    child.start()
    dead = FORK.Process(target=int)
    dead.start()
    dead.join()
    for pid in (child.pid, dead.pid):
        (out / f".s00009.tar.{HOST}.{pid}.partial").write_bytes(b"half")
        (out / f".folder.{HOST}.{pid}.partial").mkdir()
        (out / f".folder.{HOST}.{pid}.partial" / "file").write_bytes(b"half")
    assert len(read_entries(out, "latents", [])) == 5
    run_encode(teacher, work / "images", out, entries_per_shard=3)
    left = {path.name for path in out.glob(".*.partial")}
    assert left == {f".s00009.tar.{HOST}.{child.pid}.partial", f".folder.{HOST}.{child.pid}.partial"}
    child.kill()
    child.join()
    run_encode(teacher, work / "images", out, entries_per_shard=3)
    assert not list(out.glob(".*.partial"))
    assert shard_files(out) == before


def test_a_refused_command_clears_nothing(teacher, work, tmp_path):
    out = run_encode(teacher, work / "images", tmp_path / "out", entries_per_shard=3)
    leaving = out / f".s00000.tar.{HOST}.999999999.partial"
    leaving.write_bytes(b"half")
    with pytest.raises(ShardError, match="seed"):
        run_encode(teacher, work / "images", out, entries_per_shard=3, seed=4)
    assert leaving.is_file()


def test_what_only_looks_like_a_leaving_stays(tmp_path):
    names = [
        ".notes.partial",
        "s00000.tar",
        f".s00000.tar.{HOST}.12x.partial",
        "s00000.tar.1.partial",
        ".s00000.tar.another-host.999999999.partial",
    ]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    remove_leftovers(tmp_path, tmp_path / "nowhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_an_exception_inside_the_writer_keeps_the_shards_before_it(teacher, work, tmp_path, monkeypatch):
    whole = shard_files(run_encode(teacher, work / "images", tmp_path / "whole", entries_per_shard=3))
    real, writes = HashingStream.write, itertools.count()

    def failing(self, data):
        if next(writes) == 3:
            raise OSError(5, "Input/output error")
        return real(self, data)

    out = tmp_path / "out"
    monkeypatch.setattr(HashingStream, "write", failing)
    with pytest.raises(OSError, match="Input/output error"):
        run_encode(teacher, work / "images", out, entries_per_shard=3)
    monkeypatch.setattr(HashingStream, "write", real)
    assert shard_files(out).items() <= whole.items()
    assert not list(out.rglob(".*.partial"))
    kept = {name: (out / name).stat().st_mtime_ns for name in shard_files(out)}
    run_encode(teacher, work / "images", out, entries_per_shard=3)
    assert shard_files(out) == whole
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept

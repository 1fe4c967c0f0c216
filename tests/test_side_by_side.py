"""Jobs side by side on parts of the plan: together they write what one job writes, byte for byte."""

import json
import multiprocessing
import socket

import pytest
from support.stages import run_distill, run_encode, run_teacher_cache, shard_files, tree

from pipeline.cache.output import range_of
from pipeline.commands import distill, teacher_cache
from pipeline.distill import DistillSettings
from pipeline.system.errors import UserError
from pipeline.system.lock import OutputLock
from pipeline.teacher_cache import TeacherCacheSettings
from pipeline.training import loop
from shards.files import atomic_directory
from shards.reader import ShardSet
from shards.schema import ShardError
from shards.store import open_store

pytestmark = pytest.mark.usefixtures("few_steps")


@pytest.mark.parametrize(
    ("text", "chosen"), [(None, "abcde"), ("0:2", "ab"), ("2:", "cde"), (":1", "a"), ("4:9", "e"), ("7:9", "")]
)
def test_a_range_is_a_slice_of_the_plan(text, chosen):
    assert "abcde"[range_of(text)] == chosen


@pytest.mark.parametrize("text", ["", ":", "3", "3:3", "5:2", "-1:2", "a:b", "0:1:2"])
def test_an_invalid_range_is_refused(text):
    with pytest.raises(UserError, match="Write it as 0:50"):
        TeacherCacheSettings(teacher="demo", latents="l", out="o", shard_range=text)


def test_jobs_side_by_side_write_what_one_job_writes(teacher, images, tmp_path, capsys):
    whole_latents = run_encode(teacher, images, tmp_path / "latents")
    latents = tmp_path / "latents in parts"
    for part in ("2:", "0:1"):
        run_encode(teacher, images, latents, shard_range=part)
        assert "shards so far; the next one to write is s0000" in capsys.readouterr().out
        with pytest.raises(ShardError, match="is unfinished"):
            ShardSet(open_store(latents), "latents")
    run_encode(teacher, images, latents, shard_range="1:2")
    assert "holds 13 images in 3 shards" in capsys.readouterr().out
    assert shard_files(latents) == shard_files(whole_latents)

    whole = run_teacher_cache(teacher, latents, tmp_path / "cache", samples=1)
    cache = tmp_path / "cache in parts"
    for part in ("4:", "0:2", "2:4"):
        run_teacher_cache(teacher, latents, cache, samples=1, shard_range=part)
        assert not (cache / "samples").exists()
    assert shard_files(cache) == shard_files(whole)
    # The samples are left to a run without a range.
    run_teacher_cache(teacher, latents, cache, samples=1)
    assert (cache / "samples" / "samples.json").is_file()


def test_what_is_written_while_the_device_computes_is_the_same(teacher, images, tmp_path, monkeypatch):
    latents = run_encode(teacher, images, tmp_path / "latents")
    cache = run_teacher_cache(teacher, latents, tmp_path / "cache")
    monkeypatch.setattr("pipeline.cache.latents_writer.is_accelerator", lambda device: True)
    monkeypatch.setattr("pipeline.cache.targets_writer.is_accelerator", lambda device: True)
    assert shard_files(run_encode(teacher, images, tmp_path / "latents overlapped")) == shard_files(latents)
    assert shard_files(run_teacher_cache(teacher, latents, tmp_path / "cache overlapped")) == shard_files(cache)


def live_elsewhere(out, name=".s00001.tar.{host}.999999999.partial"):
    """The half file of a writer in another container, whose process id nobody knows here."""
    path = out / name.format(host=socket.gethostname().replace(".", "-"))
    path.write_bytes(b"half")
    return path


def test_the_half_file_of_another_running_job_stays(teacher, images, tmp_path):
    out = tmp_path / "latents"
    run_encode(teacher, images, out, shard_range="0:1")
    half = live_elsewhere(out)
    with OutputLock(out) as other:
        with other.claim():
            pass
        run_encode(teacher, images, out, shard_range="1:2")
        assert half.is_file()
    run_encode(teacher, images, out)
    assert not half.exists()


def test_a_second_training_in_one_directory_is_refused_and_the_first_goes_on(teacher, images, tmp_path, monkeypatch):
    """The second comes while the first, which has no checkpoint yet, is at its first step."""
    latents = run_encode(teacher, images, tmp_path / "latents")
    cache = run_teacher_cache(teacher, latents, tmp_path / "cache", rounds=1)
    alone, out, refused = tmp_path / "alone", tmp_path / "out", []
    real = loop.step_losses

    def interrupted(*arguments):
        if not refused:
            claimed = tree(out)
            with pytest.raises(UserError, match="is being written by process") as caught, OutputLock(out) as lock:
                distill.claim(DistillSettings(cache=cache, out=out, level="sd_small", seed=1), {"seed": 1}, lock)
            refused.append(str(caught.value))
            assert tree(out) == claimed
        return real(*arguments)

    run_distill(cache, alone, max_train_steps=1)
    monkeypatch.setattr(loop, "step_losses", interrupted)
    run_distill(cache, out, max_train_steps=1)
    assert len(refused) == 1
    assert json.loads((out / "spec.json").read_text())["seed"] == 0
    assert tree(out / "unet") == tree(alone / "unet")
    assert not list(out.glob(".*"))


def test_jobs_that_make_the_same_images_both_end_well(teacher, images, tmp_path, monkeypatch):
    latents = run_encode(teacher, images, tmp_path / "latents")
    cache = tmp_path / "cache"
    real = teacher_cache.generate_in_process

    def overtaken(*arguments):
        made = real(*arguments)
        teacher_cache.save_images(made, teacher_cache.Sampler(), cache / "samples")
        return made

    monkeypatch.setattr(teacher_cache, "generate_in_process", overtaken)
    run_teacher_cache(teacher, latents, cache, rounds=1, samples=1)
    assert sorted(path.name for path in (cache / "samples").iterdir()) == ["0000.png", "samples.json"]


def fill(path, barrier):
    with atomic_directory(path, exist_ok=True) as folder:
        (folder / "weights").write_text("the same")
        barrier.wait()


def test_two_processes_may_make_the_same_directory_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    both = [context.Process(target=fill, args=(tmp_path / "base", barrier)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert list(tree(tmp_path)) == ["base/weights"]


def test_an_existing_directory_is_not_replaced(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "old").write_text("old")
    with pytest.raises(OSError), atomic_directory(tmp_path / "samples") as folder:  # noqa: PT011
        (folder / "new").write_text("new")
    assert list(tree(tmp_path)) == ["samples/old"]

"""A shard that a signal or an error interrupts: the batches that are done are kept, and the bytes end up the same."""

import itertools
import json
import os
import re
import signal

import pytest
from support.stages import reset_accelerate, run_encode, run_teacher_cache, shard_files, tree
from support.tiny import write_images

from pipeline.cache import latents_writer, targets_writer
from shards.manifest import sha256_of_json
from shards.writer import HashingStream


@pytest.fixture(scope="module")
def work(teacher, tmp_path_factory):
    """13 images, of which two have no caption, in latents of one shard; and a cache of two shards."""
    place = tmp_path_factory.mktemp("interrupted")
    metadata = write_images(place / "images", 13) / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace('"picture 2"', '""').replace('"picture 7"', '""'))
    stages(teacher, place)["encode"](place / "latents")
    stages(teacher, place)["teacher-cache"](place / "cache")
    return place


def stages(teacher, place):
    return {
        "encode": lambda out: run_encode(teacher, place / "images", out, entries_per_shard=13, batch_size=3, workers=2),
        "teacher-cache": lambda out: run_teacher_cache(
            teacher, place / "latents", out, rounds=1, entries_per_shard=8, batch_size=3
        ),
    }


# What each stage calls once a batch, and its result.
BATCHES = {
    "encode": (latents_writer, "encode_batch", "latents"),
    "teacher-cache": (targets_writer, "run_teacher", "cache"),
}


@pytest.fixture(autouse=True)
def usual_handlers():
    """A test run that `nohup` started ignores SIGHUP, and then so do the stages."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def raising():
    raise KeyboardInterrupt


def terminated():
    os.kill(os.getpid(), signal.SIGTERM)


def hung_up():
    os.kill(os.getpid(), signal.SIGHUP)


def out_of_memory():
    raise MemoryError


def run_until(monkeypatch, stage, run, out, batch, stop):
    """Run a stage until the call for a batch; returns the number of calls."""
    module, function, _ = BATCHES[stage]
    real, calls = getattr(module, function), itertools.count()

    def counted(*arguments):
        if next(calls) == batch:
            stop()
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, function, counted)
        if batch is None:
            run(out)
        else:
            with pytest.raises((KeyboardInterrupt, MemoryError)):
                run(out)
            reset_accelerate()
    return next(calls)


def kept_batches(out, shard):
    return len(json.loads((out / f".{shard}.index.kept").read_text())["content"]["rows"]) // 3


def hidden(out):
    return sorted(path.name for path in out.glob(".*"))


@pytest.mark.parametrize("stop", [raising, terminated, hung_up, out_of_memory])
@pytest.mark.parametrize(("stage", "shard"), [("encode", "s00000"), ("teacher-cache", "r0000-s00000")])
def test_the_batches_that_are_done_are_kept(stage, shard, stop, teacher, work, tmp_path, monkeypatch):
    """11 entries, so four batches: the third is interrupted, then the second that is left."""
    run, out = stages(teacher, work)[stage], tmp_path / "out"
    run_until(monkeypatch, stage, run, out, 2, stop)
    assert hidden(out) == [f".{shard}.index.kept", f".{shard}.tar.kept"]
    assert not list(out.glob("*.tar"))
    first = kept_batches(out, shard)
    assert first in (1, 2)
    run_until(monkeypatch, stage, run, out, 1, stop)
    second = kept_batches(out, shard)
    assert second >= first
    batches = {"encode": 4, "teacher-cache": 3 + 1}[stage]
    assert run_until(monkeypatch, stage, run, out, None, stop) == batches - second
    assert hidden(out) == []
    assert shard_files(out) == shard_files(work / BATCHES[stage][2])


@pytest.mark.parametrize("stage", BATCHES)
def test_an_interruption_at_any_write_ends_in_the_same_bytes(stage, teacher, work, tmp_path, monkeypatch):
    run, out = stages(teacher, work)[stage], tmp_path / "out"
    real = HashingStream.write
    for last in (0, 3, 5, 8, 12):
        writes = itertools.count()

        def stopped(self, data, writes=writes, last=last):
            if next(writes) == last:
                raise KeyboardInterrupt
            return real(self, data)

        with monkeypatch.context() as patch:
            patch.setattr(HashingStream, "write", stopped)
            try:
                run(out)
            except KeyboardInterrupt:
                reset_accelerate()
    run(out)
    assert shard_files(out) == shard_files(work / BATCHES[stage][2])
    assert hidden(out) == []


@pytest.mark.parametrize("damage", ["cut", "changed", "described wrong", "one digit", "of another set"])
def test_what_was_kept_and_is_damaged_is_written_again(damage, teacher, work, tmp_path, monkeypatch):
    run, out = stages(teacher, work)["encode"], tmp_path / "out"
    run_until(monkeypatch, "encode", run, out, 3, raising)
    tar, described = out / ".s00000.tar.kept", out / ".s00000.index.kept"
    data = tar.read_bytes()
    if damage == "cut":
        tar.write_bytes(data[:-100])
    elif damage == "changed":
        tar.write_bytes(data[:700] + b"x" + data[701:])
    elif damage == "described wrong":
        described.write_text("[]")
    elif damage == "one digit":
        described.write_text(re.sub(r"(\d)\]", lambda match: f"{int(match[1]) ^ 1}]", described.read_text(), count=1))
    else:
        content = {**json.loads(described.read_text())["content"], "spec_sha256": "0" * 64}
        described.write_text(json.dumps({"content": content, "sha256": sha256_of_json(content)}))
    assert run_until(monkeypatch, "encode", run, out, None, raising) == 4
    assert shard_files(out) == shard_files(work / "latents")
    assert hidden(out) == []


def test_another_batch_size_goes_on_from_there(teacher, work, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run_until(monkeypatch, "encode", stages(teacher, work)["encode"], out, 3, raising)
    run_encode(teacher, work / "images", out, entries_per_shard=13, batch_size=4)
    heads = [json.loads((place / "s00000.index").read_bytes().split(b"\n")[0]) for place in (out, work / "latents")]
    assert heads[0]["images"] == heads[1]["images"]
    assert heads[0]["skipped"] == heads[1]["skipped"]
    assert hidden(out) == []
    assert set(tree(out)) == set(tree(work / "latents"))


def test_what_was_kept_of_an_image_that_changed_is_made_again(teacher, tmp_path, monkeypatch):
    """The second image is replaced, the fourth gets its caption, and the sixth can be decoded now."""
    place = tmp_path / "work"
    metadata = write_images(place / "images", 13) / "metadata.jsonl"
    captions, broken = metadata.read_text(), (place / "images" / "005.png")
    intact = broken.read_bytes()
    broken.write_bytes(b"no image")
    other = (place / "images" / "007.png").read_bytes()
    for name, change in {
        "replaced": lambda: (place / "images" / "001.png").write_bytes(other + b"\0"),
        "caption": lambda: metadata.write_text(captions),
        "decoded": lambda: broken.write_bytes(intact),
    }.items():
        metadata.write_text(captions.replace('"picture 3"', '""') if name == "caption" else captions)
        out = tmp_path / name
        run_until(monkeypatch, "encode", stages(teacher, place)["encode"], out, 3, raising)
        change()
        stages(teacher, place)["encode"](out)
        fresh = tmp_path / f"{name}-fresh"
        stages(teacher, place)["encode"](fresh)
        if name != "caption":
            assert shard_files(out) == shard_files(fresh)
        skipped = json.loads((out / "s00000.index").read_bytes().splitlines()[0])["skipped"]
        assert [item["source_id"] for item in skipped] == ([] if name == "decoded" else ["005.png"])

"""Damage of every kind: no wrong tensor is read, the message names the file and the remedy, good shards are kept."""

import errno
import json
import os
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from support.damage import DAMAGES, IMAGE_SHARD, VICTIM, Place, bomb, flip, look, read_all, same, verify
from support.stages import as_an_earlier_version_wrote_it, run_distill, run_encode, run_teacher_cache, shard_files, tree
from support.tiny import tiny_pipeline, tiny_unet, write_images

from pipeline.cli import main
from pipeline.sampling.generate import GeneratedImages, Sampler, save_images
from pipeline.system.errors import UserError
from pipeline.system.lock import OutputLock
from shards import codec
from shards.manifest import read_manifest, write_manifest
from shards.schema import MANIFEST, ShardError, sidecar_name
from shards.store import open_store

REMEDIES = ("rerun the stage", "rerun the same `distill-sd", "restore", "delete")


def cached(teacher, latents, out, **changes):
    return run_teacher_cache(teacher, latents, out, entries_per_shard=2, **changes)


@pytest.fixture(scope="module")
def latents(teacher, tmp_path_factory):
    work = tmp_path_factory.mktemp("damage")
    return run_encode(teacher, write_images(work / "images", 5), work / "latents", entries_per_shard=3)


@pytest.fixture(scope="module")
def cache(teacher, latents):
    return cached(teacher, latents, latents.parent / "cache")


@pytest.fixture(scope="module")
def other(teacher, latents):
    return cached(teacher, latents, latents.parent / "other", seed=1)


@pytest.fixture(scope="module")
def whole(cache):
    return read_all(cache)[0]


@pytest.fixture
def copy(cache, tmp_path):
    return shutil.copytree(cache, tmp_path / "cache")


def stamps(cache):
    return {path.name: path.stat().st_mtime_ns for path in cache.glob("r0*")}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found_and_named_and_only_that_shard_is_removed(kind, cache, other, whole, copy):
    damage, file = DAMAGES[kind]
    damage(Place(copy, other))
    outcome = look(copy, whole)
    assert not outcome.wrong
    names = (file, sidecar_name(file))
    lines = outcome.full.splitlines()
    problems = [line for line in lines if any(str(copy / name) in line for name in names)]
    assert problems, outcome
    for message in (*problems, outcome.opening, outcome.reading):
        assert not message or any(remedy in message.lower() for remedy in REMEDIES), message
        assert not message or any(name in message for name in names) or "swapped" in kind
    assert " problem" in lines[-1]
    verify(copy, "--full", "--remove-damaged")
    removed = shard_files(cache).keys() - shard_files(copy).keys()
    others = {name: data for name, data in shard_files(copy).items() if name not in names}
    assert others.items() <= shard_files(cache).items()
    assert removed == EXPECTED_REMOVALS.get(kind, set() if file == MANIFEST else set(names))


FIRST, SECOND = ("r0001-s00000.tar", "r0001-s00000.index"), (VICTIM, sidecar_name(VICTIM))
EXPECTED_REMOVALS = {
    "two shards swapped": {*FIRST, *SECOND},
    "sidecar gone": {sidecar_name(VICTIM)},
    # Nobody knows which of the two is wrong, the image or the target.
    "sidecar that states another image's checksum": set(),
    # Images are kept: their latents may be gone.
    "image: a bit flipped": set(),
    "image: sidecar cut": set(),
    "image: tar gone": {IMAGE_SHARD},
}


@pytest.mark.parametrize("kind", ["a bit flipped in a tensor", "two shards swapped", "sidecar gone"])
def test_the_stage_rewrites_a_removed_shard_and_keeps_the_others(kind, teacher, latents, cache, other, copy):
    kept = stamps(copy)
    DAMAGES[kind][0](Place(copy, other))
    verify(copy, "--full", "--remove-damaged")
    cached(teacher, latents, copy)
    assert shard_files(copy) == shard_files(cache)
    assert verify(copy, "--full")[0] == 0
    assert {name for name, stamp in stamps(copy).items() if stamp != kept[name]} <= {*FIRST, *SECOND}


def test_a_sound_set_passes_at_every_depth(teacher, latents, cache):
    status, output = verify(cache)
    assert status == 0
    assert output.splitlines()[-1].startswith(
        f"{cache}: no damage found; 6 of 6 shards intact, 10 entries (2 rounds), "
    )
    assert output.rstrip().endswith("; checked: names, sizes and numbering of the files; the contents with --full")
    status, output = verify(cache, "--full", "--recompute", "4", "--teacher", str(teacher), "--device", "cpu")
    assert status == 0, output
    assert "verify: 100%" in output
    rows = [line for line in output.splitlines() if line.startswith(("teacher_pred", "tap."))]
    assert len(rows) == 10
    assert all(re.fullmatch(r"\S+ +[\d.e-]+ +[\d.e-]+ +\d+%", row) for row in rows)
    assert output.rstrip().endswith("files, checksums and contents of all shards, 4 entries with the teacher")
    for directory in (latents, cache):
        assert verify(directory, "--full")[0] == 0


def test_a_path_that_leads_nowhere_is_called_that(tmp_path):
    status, output = verify(tmp_path / "nowhere")
    assert (status, output) == (2, f"Error: {tmp_path}/nowhere does not exist. Check the path.\n")
    (tmp_path / "file").touch()
    status, output = verify(tmp_path / "file")
    assert (status, output) == (2, f"Error: {tmp_path}/file is not a directory. Check the path.\n")


def test_every_problem_is_printed_and_the_last_line_counts_them(copy):
    (copy / "r0000-s00000.tar").write_bytes(b"")
    (copy / "r0000-s00002.index").unlink()
    data = bytearray((copy / VICTIM).read_bytes())
    data[600] ^= 1
    (copy / VICTIM).write_bytes(data)
    status, output = verify(copy, "--full")
    assert status == 2
    assert re.findall(rf"{copy}/(\S+)", output) == ["r0000-s00000.tar", "r0000-s00002.tar", VICTIM]
    assert re.fullmatch(
        rf"Error: 3 problems in {copy}; 3 of 6 shards intact, 5 entries \(2 rounds\), [\d.]+ kB, 2 damaged",
        output.splitlines()[-1],
    )


def test_a_set_that_is_still_being_written_is_unfinished_not_damaged(copy):
    for path in copy.glob("r0001-*"):
        path.unlink()
    status, output = verify(copy, "--full")
    assert status == 2
    assert f"{copy} is unfinished. Still to be written: 3 of 6 shards, from r0001-s00000.tar on." in output
    assert "Rerun the same `distill-sd teacher-cache`" in output
    assert "no problem in" in output.splitlines()[-1]
    assert "damaged" not in output


def test_a_gap_in_the_numbering_is_named(copy):
    for name in (VICTIM, sidecar_name(VICTIM)):
        (copy / name).unlink()
    status, output = verify(copy)
    assert status == 2
    assert f"{VICTIM} is missing although later shards exist. If no job is still writing it" in output


def test_a_file_outside_the_plan_is_named(copy):
    shutil.copy(copy / VICTIM, copy / "r0002-s00000.tar")
    status, output = verify(copy)
    assert status == 2
    assert "r0002-s00000.tar is not in the plan of manifest.json. Restore the manifest" in output


def test_removing_leaves_everything_else_alone(copy, other):
    DAMAGES["tar cut in a header"][0](Place(copy, other))
    before = tree(copy)
    status, output = verify(copy, "--remove-damaged")
    assert status == 2
    assert f"removed {VICTIM}. Rerun the same `distill-sd teacher-cache`" in output
    assert tree(copy) == {n: d for n, d in before.items() if not n.startswith(VICTIM[:-4])}


def test_no_flipped_bit_of_a_shard_or_its_sidecar_lets_a_wrong_tensor_through(copy, whole):
    """A hundred bits drawn at random: what is read is what was written, or it is refused."""
    draw, refused = random.Random(0), 0
    for path in [copy / VICTIM, copy / sidecar_name(VICTIM)] * 50:
        data = bytearray(path.read_bytes())
        damaged = data.copy()
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            found, messages = read_all(copy)
            refused += bool(messages)
            assert all(same(sample, whole[key]) for key, sample in found.items())
        except ShardError:
            refused += 1
        path.write_bytes(data)
    assert refused > 60


def test_a_bomb_is_refused_before_it_is_unpacked(monkeypatch):
    """A gigabyte in a few kilobytes: neither the frame's claim nor its zeros are ever allocated."""

    def explode(*arguments, **options):
        raise AssertionError("it was unpacked")

    data = bomb()
    assert len(data) < 1 << 17
    monkeypatch.setattr(codec.zstandard, "ZstdDecompressor", explode)
    with pytest.raises(ShardError, match="states 1073741824 bytes, but the index states 1000"):
        codec.unpack_quantised(data, 1000)


def test_recompute_finds_what_checksums_cannot(teacher, latents, tmp_path, monkeypatch):
    """A cache whose taps were written wrong, with right checksums: only the teacher tells."""
    from pipeline.cache import targets

    real = targets.device_codec.quantise_rotated
    monkeypatch.setattr(targets.device_codec, "quantise_rotated", lambda x, *rest: real(x * 1.5, *rest))
    wrong = cached(teacher, latents, tmp_path / "wrong", rounds=1)
    assert verify(wrong, "--full")[0] == 0
    status, output = verify(wrong, "--recompute", "2", "--teacher", str(teacher), "--device", "cpu")
    assert status == 2
    assert "TOO LARGE" in output
    assert f"{wrong}: tap.mid_block differs from the teacher's output by up to" in output
    assert not [line for line in output.splitlines() if line.startswith("teacher_pred") and "TOO LARGE" in line]


def test_an_exact_codec_is_held_to_the_rounding_of_its_type(teacher, latents, tmp_path):
    exact = cached(teacher, latents, tmp_path / "exact", rounds=1, codec="fp16")
    status, output = verify(exact, "--full", "--recompute", "3", "--teacher", str(teacher), "--device", "cpu")
    assert status == 0, output


def test_the_teacher_must_be_the_caches_own(cache, latents, v_teacher, tmp_path):
    from support.tiny import tiny_pipeline

    tiny_pipeline(seed=3).save_pretrained(tmp_path / "stranger")
    status, output = verify(cache, "--recompute", "1", "--teacher", str(tmp_path / "stranger"), "--device", "cpu")
    assert (status, "with another U-Net than the one of --teacher" in output) == (2, True)
    status, output = verify(latents, "--recompute", "1", "--teacher", str(v_teacher))
    assert (status, "--recompute needs a cache" in output) == (2, True)
    status, output = verify(cache, "--recompute", "1")
    assert (status, "--recompute and --teacher go together" in output) == (2, True)


def failing(real, names, number, path_of):
    """`real`, but with an error for files whose names end so."""

    def call(path, *rest, **options):
        if str(path_of(path)).endswith(names):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *rest, **options)

    return call


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE, errno.ENOMEM, errno.EMFILE])
@pytest.mark.parametrize("names", [(".tar",), ("s00001.index",), ("s00000.index", "s00001.tar")])
def test_what_cannot_be_read_is_not_damage(number, names, copy, monkeypatch):
    before = tree(copy)
    monkeypatch.setattr(os, "open", failing(os.open, names, number, lambda path: path))
    monkeypatch.setattr(Path, "read_bytes", failing(Path.read_bytes, names, number, lambda path: path))
    status, output = verify(copy, "--full", "--remove-damaged")
    monkeypatch.undo()
    assert status == 2
    assert f"cannot be read: {os.strerror(number)}. " in output
    assert ("Give this user the permission" in output) == (number == errno.EACCES)
    assert "is damaged" not in output
    assert "removed" not in output
    assert output.splitlines()[-1].endswith("0 damaged")
    assert "6 of 6 shards intact" not in output
    assert tree(copy) == before
    assert verify(copy, "--full")[0] == 0


def test_a_size_that_cannot_be_asked_for_is_not_damage(copy, monkeypatch):
    monkeypatch.setattr(os, "stat", failing(os.stat, (".tar",), errno.EIO, lambda path: path))
    status, output = verify(copy, "--full", "--remove-damaged")
    monkeypatch.undo()
    assert (status, "cannot be read: Input/output error" in output, "removed" in output) == (2, True, False)
    assert len(list(copy.glob("r*"))) == 12


def flipping(real, times):
    """`os.pread` with a wrong bit in its first reads of a tar's data."""
    left = iter(range(times))

    def pread(descriptor, length, offset):
        data = real(descriptor, length, offset)
        return bytes([data[0] ^ 1]) + data[1:] if length > 600 and next(left, None) is not None else data

    return pread


def test_a_shard_is_damaged_only_if_two_readings_say_the_same(copy, monkeypatch):
    monkeypatch.setattr(os, "pread", flipping(os.pread, 1))
    status, output = verify(copy, "--full", "--remove-damaged")
    monkeypatch.undo()
    assert status == 2
    assert "r0000-s00000.tar was read twice with different results" in output
    assert len(list(copy.glob("r*"))) == 12
    assert verify(copy, "--full")[0] == 0


def test_short_reads_are_continued(copy, monkeypatch):
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, length, offset: real(descriptor, min(length, 4000), offset))
    assert verify(copy, "--full", "--remove-damaged")[0] == 0
    assert len(list(copy.glob("r*"))) == 12


def test_what_was_removed_is_not_to_be_removed_again(copy, other):
    DAMAGES["a bit flipped in a tap"][0](Place(copy, other))
    assert "Delete this shard's .tar and .index" in verify(copy, "--full")[1]
    output = verify(copy, "--full", "--remove-damaged")[1]
    assert "Delete this shard" not in output
    assert re.search(rf"{VICTIM} is damaged: .* It was removed\.", output)


def test_damage_is_not_removed_under_a_running_job(copy, other):
    DAMAGES["a bit flipped in a tap"][0](Place(copy, other))
    with OutputLock(copy) as lock:
        with lock.claim():
            pass
        status, output = verify(copy, "--full", "--remove-damaged")
        assert (status, "is being written by process" in output) == (2, True)
        assert (copy / VICTIM).is_file()
        assert "is damaged" in verify(copy, "--full")[1]


def swap(a, b):
    aside = a.with_name("aside")
    a.rename(aside)
    b.rename(a)
    aside.rename(b)


# What is done to base/ and students/ of a cache, and what is said of it.
FOREIGN_PARTS = {
    "a bit of the VAE": (
        lambda c, o: flip(c / "base" / "vae" / "diffusion_pytorch_model.safetensors", -40),
        "vae/diffusion_pytorch_model.safetensors was changed",
    ),
    "base of another cache": (
        lambda c, o: (shutil.rmtree(c / "base"), shutil.copytree(o / "base", c / "base")),
        "base: checksums.json was changed, or the folder is of another cache",
    ),
    "students swapped": (
        lambda c, o: swap(c / "students" / "sd_small", c / "students" / "sd_tiny"),
        "sd_small: checksums.json was changed, or the folder is of another cache",
    ),
    "a student without its checksums": (
        lambda c, o: (c / "students" / "sd_small" / "checksums.json").unlink(),
        "sd_small: checksums.json is missing",
    ),
    "base without its tokenizer": (lambda c, o: shutil.rmtree(c / "base" / "tokenizer"), "is missing"),
    "no base": (lambda c, o: shutil.rmtree(c / "base"), "base"),
}


@pytest.fixture(scope="module")
def two_levels(teacher, latents, tmp_path_factory):
    """Two caches with two levels: of the teacher, and of another."""
    work = tmp_path_factory.mktemp("levels")
    stranger = tiny_pipeline(seed=3)
    stranger.save_pretrained(work / "stranger")
    levels = {"students": ("sd_small", "sd_tiny"), "rounds": 1}
    ours = cached(teacher, latents, work / "ours", **levels)
    encoded = run_encode(work / "stranger", write_images(work / "images", 5), work / "latents", entries_per_shard=3)
    return ours, cached(work / "stranger", encoded, work / "theirs", **levels)


@pytest.mark.parametrize("kind", FOREIGN_PARTS)
def test_weights_that_are_not_the_caches_own_are_refused_before_a_step(kind, two_levels, tmp_path):
    cache = shutil.copytree(two_levels[0], tmp_path / "cache")
    change, message = FOREIGN_PARTS[kind]
    change(cache, two_levels[1])
    status, output = verify(cache, "--full")
    assert (status, message in output) == (2, True), output
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        run_distill(cache, tmp_path / "student")
    assert "opy" in str(caught.value)
    assert not (tmp_path / "student" / "checkpoints").exists()


def test_a_level_that_is_added_is_bound_too(teacher, latents, tmp_path):
    cache = cached(teacher, latents, tmp_path / "cache", rounds=1, students=("sd_tiny", "sd_small")[1:])
    parts = {"base/checksums.json", "students/sd_small/checksums.json"}
    assert set(read_manifest(open_store(cache)).files) == {"calibration.safetensors", *parts}
    reduced = tree(cache)
    cached(teacher, latents, cache, rounds=1, students=("sd_small",))
    assert tree(cache) == reduced
    cached(teacher, latents, cache, rounds=1, students=("sd_small", "bk_small"))
    assert "students/bk_small/checksums.json" in read_manifest(open_store(cache)).files
    shutil.rmtree(cache / "base")
    cached(teacher, latents, cache, rounds=1, students=("sd_small", "bk_small"))
    assert verify(cache, "--full")[0] == 0


@pytest.mark.parametrize("kind", ["levels", "architecture"])
def test_students_of_an_earlier_cache_that_do_not_fit_are_refused_before_a_step(kind, two_levels, tmp_path):
    cache = shutil.copytree(two_levels[0], tmp_path / "cache")
    as_an_earlier_version_wrote_it(cache)
    small = cache / "students" / "sd_small"
    if kind == "levels":
        swap(small, cache / "students" / "sd_tiny")
    else:
        shutil.rmtree(small)
        tiny_unet(cross_attention_dim=6).save_pretrained(small)
    with pytest.raises(UserError, match="does not hold the sd_small student of this cache's teacher"):
        run_distill(cache, tmp_path / "student")


def test_an_earlier_cache_is_used_and_what_is_not_covered_is_said(two_levels, tmp_path):
    cache = shutil.copytree(two_levels[0], tmp_path / "cache")
    as_an_earlier_version_wrote_it(cache)
    status, output = verify(cache, "--full")
    assert status == 0
    assert "not checked to belong to this cache, because an earlier version did not record it: base, stu" in output
    run_distill(cache, tmp_path / "student", max_train_steps=1)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"teacher": "demo"}', '{"teacher": {"license": 5}}'])
def test_a_damaged_origin_is_named_before_work_begins(content, copy, tmp_path):
    (copy / "origin.json").write_text(content)
    status, output = verify(copy)
    assert (status, "origin.json is corrupt" in output) == (2, True), output
    with pytest.raises(UserError, match="origin.json is corrupt.*delete it and rerun the same `distill-sd teacher-cac"):
        run_distill(copy, tmp_path / "student")


@pytest.mark.parametrize("damage", ["index", "image", "key", "fifo"])
def test_damaged_samples_are_named_before_work_begins(damage, copy, tmp_path):
    sampler = Sampler()
    image = Image.effect_noise((32, 32), 50).convert("RGB")
    save_images(GeneratedImages([image], ["a tree"], 1.0, 1, "cpu"), sampler, copy / "samples")
    assert verify(copy)[0] == 0
    index = copy / "samples" / "samples.json"
    if damage == "index":
        index.write_bytes(index.read_bytes()[:30])
    elif damage == "image":
        picture = copy / "samples" / "0000.png"
        picture.write_bytes(picture.read_bytes()[:500])
    elif damage == "fifo":
        (copy / "samples" / "0000.png").unlink()
        os.mkfifo(copy / "samples" / "0000.png")
    else:
        index.write_text(json.dumps({"prompts": ["a tree"]}))
    status, output = verify(copy)
    assert (status, "samples cannot be read" in output) == (2, True), output
    with pytest.raises(UserError, match="samples cannot be read.*delete it and rerun"):
        run_distill(copy, tmp_path / "student", report=True)
    run_distill(copy, tmp_path / "student", max_train_steps=1)


@pytest.mark.parametrize("file", ["diffusion_pytorch_model.safetensors", "config.json"])
def test_a_damaged_initial_student_is_named_and_refused(copy, tmp_path, file):
    path = copy / "students" / "sd_small" / file
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    assert verify(copy)[0] == 0
    status, output = verify(copy, "--full")
    assert status == 2
    assert f"{path.parent}: {file} was changed. Copy it from an intact cache" in output
    with pytest.raises(UserError, match=f"sd_small: {file} was changed. Copy it from an intact cache, or delete"):
        run_distill(copy, tmp_path / "student")


def test_a_damaged_base_is_named(copy):
    (copy / "base" / "vae" / "config.json").unlink()
    assert "base: vae/config.json is missing. Copy it" in verify(copy, "--full")[1]
    (copy / "base" / "model_index.json").unlink()
    assert "base/model_index.json is missing. Copy it" in verify(copy)[1]
    shutil.rmtree(copy / "students" / "sd_small")
    assert "students/sd_small/config.json is missing. Copy it" in verify(copy)[1]
    (copy / "teacher-cache.json").unlink()
    assert "students holds no student's initial weights. Rerun the same" in verify(copy)[1]


def test_a_cache_of_an_earlier_version_is_read_without_checksums(copy, tmp_path):
    as_an_earlier_version_wrote_it(copy)
    for path in copy.rglob("checksums.json"):
        path.unlink()
    status, output = verify(copy, "--full")
    assert status == 0
    assert "not checked, because an earlier version wrote no checksums for them: base, sd_small" in output
    run_distill(copy, tmp_path / "student", max_train_steps=1)


def test_a_damaged_file_next_to_the_latents_is_named(latents, tmp_path):
    copy = shutil.copytree(latents, tmp_path / "latents")
    (copy / "empty_prompt_embeds.npy").write_bytes(b"")
    status, output = verify(copy)
    assert status == 2
    assert "empty_prompt_embeds.npy is missing or was changed. Restore it" in output


@pytest.mark.parametrize("content", [None, "", "[]", '{"format": 1}', "a FIFO"])
def test_without_its_manifest_nothing_else_is_judged(copy, content):
    path = copy / MANIFEST
    path.unlink()
    if content == "a FIFO":
        os.mkfifo(path)
    elif content is not None:
        path.write_text(content)
    status, output = verify(copy, "--full", "--remove-damaged")
    assert status == 2
    assert "manifest.json" in output
    assert "Traceback" not in output
    assert len(list(copy.glob("*.tar"))) == 6


def test_a_sidecar_or_a_shard_that_is_no_file_is_damaged(copy, tmp_path):
    for name in ("r0000-s00001.index", "r0001-s00001.tar"):
        (copy / name).unlink()
        os.mkfifo(copy / name)
    status, output = verify(copy, "--full")
    assert status == 2
    assert "r0000-s00001.index is damaged: it is not a regular file. Delete this shard's" in output
    assert "r0001-s00001.tar is damaged: it is missing. Delete this shard's" in output
    with pytest.raises(ShardError, match="r0000-s00001.index is damaged"):
        run_distill(copy, tmp_path / "student")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"entries": 10**12}, "entries is 1000000000000, not one from 0 to"),
        ({"entries": "48"}, "entries is '48'"),
        ({"entries_per_shard": 0}, "entries per shard is 0"),
    ],
)
def test_a_forged_manifest_is_refused_by_every_reader(copy, tmp_path, changes, problem):
    """Its hashes are right, and a plan made of it would take all memory, or fail."""
    manifest = read_manifest(open_store(copy))
    write_manifest(open_store(copy), replace(manifest, spec={**manifest.spec, **changes}))
    for arguments in (["verify", copy], ["inspect", copy], ["distill", "--cache", copy, "--level", "sd_small"]):
        more = ["--out", tmp_path / "out"] if arguments[0] == "distill" else []
        result = CliRunner().invoke(main, list(map(str, [*arguments, *more])))
        assert result.exit_code == 2
        assert f"manifest.json cannot be used: the number of {problem}" in result.output


def test_invalid_rounds_are_refused(copy):
    content = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps({**content, "rounds": "many"}))
    assert "manifest.json has an invalid number of rounds, 'many'. Restore it" in verify(copy)[1]

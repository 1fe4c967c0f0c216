"""Damage of every kind: no wrong tensor is read, the message names the file and the remedy, good shards are kept."""

import json
import random
import re
import shutil

import pytest
from support.damage import DAMAGES, VICTIM, Place, bomb, look, read_all, same, verify
from support.stages import run_distill, run_encode, run_teacher_cache, shard_files, tree
from support.tiny import write_images

from pipeline.system.errors import UserError
from shards import codec
from shards.schema import MANIFEST, ShardError, sidecar_name

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
    assert shard_files(copy).items() <= shard_files(cache).items()
    assert removed == EXPECTED_REMOVALS.get(kind, set() if file == MANIFEST else set(names))


FIRST, SECOND = ("r0001-s00000.tar", "r0001-s00000.json"), (VICTIM, sidecar_name(VICTIM))
EXPECTED_REMOVALS = {"two shards swapped": {*FIRST, *SECOND}, "sidecar gone": {sidecar_name(VICTIM)}}


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
    assert output.splitlines()[-1].startswith(f"{cache} is fine; 6 of 6 shards intact, 10 entries (2 rounds)")
    status, output = verify(cache, "--full", "--recompute", "4", "--teacher", str(teacher), "--device", "cpu")
    assert status == 0, output
    assert "verify: 100%" in output
    rows = [line for line in output.splitlines() if line.startswith(("teacher_pred", "tap."))]
    assert len(rows) == 10
    for directory in (latents, cache):
        assert verify(directory, "--full")[0] == 0


def test_every_problem_is_printed_and_the_last_line_counts_them(copy):
    (copy / "r0000-s00000.tar").write_bytes(b"")
    (copy / "r0000-s00002.json").unlink()
    data = bytearray((copy / VICTIM).read_bytes())
    data[600] ^= 1
    (copy / VICTIM).write_bytes(data)
    status, output = verify(copy, "--full")
    assert status == 2
    assert re.findall(rf"{copy}/(\S+)", output) == ["r0000-s00000.tar", "r0000-s00002.tar", VICTIM]
    assert re.fullmatch(
        rf"Error: 3 problems in {copy}; 3 of 6 shards intact, 5 entries \(2 rounds\), 0.1 MB, 2 damaged",
        output.splitlines()[-1],
    )


def test_a_set_that_is_still_being_written_is_unfinished_not_damaged(copy):
    for path in copy.glob("r0001-*"):
        path.unlink()
    status, output = verify(copy, "--full")
    assert status == 2
    assert f"{copy} is unfinished: 3 of 6 shards are still to be written, the first is r0001-s00000.tar" in output
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

    real = targets.device_codec.quantise
    monkeypatch.setattr(targets.device_codec, "quantise", lambda x, *rest: real(x * 1.5, *rest))
    wrong = cached(teacher, latents, tmp_path / "wrong", rounds=1)
    assert verify(wrong, "--full")[0] == 0
    status, output = verify(wrong, "--recompute", "2", "--teacher", str(teacher), "--device", "cpu")
    assert status == 2
    assert "BROKEN" in output
    assert f"{wrong}: tap.mid_block differs from the teacher's output by up to" in output
    assert not [line for line in output.splitlines() if line.startswith("teacher_pred") and "BROKEN" in line]


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


@pytest.mark.parametrize("content", [None, "", "[]", '{"format": 1}'])
def test_without_its_manifest_nothing_else_is_judged(copy, content):
    path = copy / MANIFEST
    path.unlink() if content is None else path.write_text(content)
    status, output = verify(copy, "--full", "--remove-damaged")
    assert status == 2
    assert "manifest.json" in output
    assert "Traceback" not in output
    assert len(list(copy.glob("*.tar"))) == 6


def test_invalid_rounds_are_refused(copy):
    content = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps({**content, "rounds": "many"}))
    assert "manifest.json has an invalid number of rounds, 'many'. Restore it" in verify(copy)[1]

"""What version 0.1.0 wrote, in its own words and bytes, is read, continued and verified by this one.

The archive was made by that version: a miniature teacher, latents, a cache of one round, a student of two steps with
its checkpoint, and the shards that the same version wrote for a second round.
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from support.damage import verify
from support.stages import (
    metrics,
    read_entries,
    reset_accelerate,
    run_distill,
    run_encode,
    run_teacher_cache,
    tree,
)

from pipeline.commands import finetune, teacher_cache
from pipeline.commands.finetune import FinetuneSettings
from pipeline.system.errors import UserError
from pipeline.teacher_cache import TeacherCacheSettings
from shards.manifest import Manifest, known_to, read_manifest
from shards.store import open_store

ARCHIVE = Path(__file__).parent / "support" / "made_by_0_1_0.tar.xz"
CACHE = {"entries_per_shard": 3, "uncond_fraction": 0.4, "samples": 1}
STUDENT = {"train_batch_size": 2, "checkpointing_steps": 2}
# Of steps 3 and 4, when the version before trained on.
LATER_LOSSES = (1.7169166803359985, 1.590412974357605)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The unpacked archive, as on the machine that made it: the spec states the libraries, so they are its own."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    libraries = json.loads((tmp_path / "cache" / "manifest.json").read_text())["spec"]["libraries"]
    monkeypatch.setattr("pipeline.cache.latents_spec.library_versions", lambda: libraries)
    monkeypatch.setattr("pipeline.cache.cache_spec.library_versions", lambda: libraries)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def manifest(name: str) -> Manifest:
    return read_manifest(open_store(name))


def test_finished_latents_stay_as_they_are(made):
    before = tree(made / "latents")
    run_encode("teacher", "images", Path("latents"), entries_per_shard=3)
    assert tree(made / "latents") == before


def test_the_same_input_gives_the_same_entries(made):
    """Bytes depend on the processor's arithmetic too, so pixels and draws are compared to the bit, the rest closely."""
    for directory in (Path("again"), Path("latents")):
        run_encode("teacher", "images", directory, entries_per_shard=3)
    old, new = (read_entries(Path(name), "latents", ["latents", "prompt_embeds"]) for name in ("latents", "again"))
    assert [(entry.key, entry.meta) for entry in new] == [(entry.key, entry.meta) for entry in old]
    for left, right in zip(old, new, strict=True):
        for name, tensor in left.tensors.items():
            np.testing.assert_allclose(right.tensors[name].values, tensor.values, rtol=1e-2, atol=1e-3)
    assert known_to(manifest("latents").spec, manifest("again").spec) == manifest("latents").spec
    assert manifest("again").files == manifest("latents").files


def test_latents_are_gone_on_with(made):
    before = tree(made / "latents")
    for name in ("s00001.tar", "s00001.json"):
        (made / "latents" / name).unlink()
    run_encode("teacher", "images", Path("latents"), entries_per_shard=3)
    after = tree(made / "latents")
    assert after["manifest.json"] == before["manifest.json"]
    assert verify(made / "latents", "--full")[0] == 0


def test_a_cache_is_verified_and_not_added_to(made):
    before = tree(made / "cache")
    for act in (teacher_cache.plan, teacher_cache.run):
        with pytest.raises(UserError, match="cache holds a cache of format 1, which this version reads but"):
            act(TeacherCacheSettings(teacher="teacher", latents=Path("latents"), out=Path("cache"), device="cpu"))
        reset_accelerate()
    assert tree(made / "cache") == before
    assert verify(made / "cache", "--full", "--recompute", "10", "--teacher", "teacher", "--device", "cpu")[0] == 0
    status, output = verify(made / "cache", "--remove-damaged")
    assert (status, "is a cache of format 1, whose shards are not written again" in output) == (2, True)


def test_damage_in_a_cache_is_found_and_its_remedy_can_work(made):
    tar = made / "cache" / "r0000-s00000.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    status, output = verify(made / "cache")
    assert status == 2
    assert "r0000-s00000.tar is damaged" in output
    assert "Restore its files from a backup; this version does not write caches of format 1." in output


def test_a_new_cache_is_made_from_the_latents(made):
    """Its images keep their format, and the same draws are made as before."""
    run_teacher_cache("teacher", Path("latents"), Path("new"), rounds=1, **CACHE)
    assert (made / "new" / "images" / "s00000.json").read_bytes() == (made / "latents" / "s00000.json").read_bytes()
    assert verify(made / "new", "--full", "--recompute", "10", "--teacher", "teacher", "--device", "cpu")[0] == 0
    names = ["latents", "noise", "prompt_embeds", "teacher_pred"]
    old, new = (read_entries(Path(name), "cache", names) for name in ("cache", "new"))
    assert [(entry.key, {**entry.meta, "taps": None}) for entry in new] == [
        (entry.key, {**entry.meta, "taps": None}) for entry in old
    ]
    for left, right in zip(old, new, strict=True):
        for name, tensor in left.tensors.items():
            np.testing.assert_allclose(
                right.tensors[name].values.astype(np.float32), tensor.values.astype(np.float32), rtol=1e-2, atol=1e-2
            )


def test_a_training_resumes_from_its_checkpoint(made):
    steps = metrics(made / "student")
    run_distill(Path("cache"), Path("student"), max_train_steps=4, **STUDENT)
    lines = metrics(made / "student")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[:2] == steps
    for line, loss in zip(lines[2:], LATER_LOSSES, strict=True):
        assert line["loss"] == pytest.approx(loss, rel=1e-3)
    assert (made / "student" / "checkpoints" / "step-0000004").is_dir()


def test_a_finished_student_is_finetuned_and_its_training_is_known(made, capsys):
    run_distill(Path("cache"), Path("student"), max_train_steps=2, **STUDENT)
    assert "already finished" in capsys.readouterr().out
    settings = {
        "train_batch_size": 2,
        "max_train_steps": 1,
        "dataloader_num_workers": 0,
        "device": "cpu",
        "report": False,
    }
    finetune.run(FinetuneSettings(model="student", latents=Path("latents"), out=Path("polished"), **settings))
    reset_accelerate()
    assert (made / "polished" / "model_index.json").is_file()

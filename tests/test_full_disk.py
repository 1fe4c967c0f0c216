"""The disk full in the middle of a write: one message, nothing finished is lost, and the same command goes on.

The disk is a small tmpfs, so that the refusal is the kernel's own.
"""

import re
import subprocess

import pytest
from click.testing import CliRunner
from support.stages import reset_accelerate, run_encode, run_teacher_cache, shard_files

from pipeline.cli import main
from pipeline.training.output import finished_step


@pytest.fixture
def disk(tmp_path):
    """Mounts a tmpfs of so many bytes, or gives the one that is mounted that size."""
    place = tmp_path / "disk"
    place.mkdir()

    def sized(size):
        options = f"size={size}" if not place.is_mount() else f"remount,size={size}"
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True)
        if mounted.returncode:
            pytest.skip("mounting a small disk takes root")
        return place

    yield sized
    subprocess.run(["umount", place], capture_output=True)


def invoke(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    reset_accelerate()
    return result


def bytes_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("stage", ["encode", "teacher-cache"])
@pytest.mark.parametrize("share", [0.45, 0.8])
def test_a_disk_that_fills_up_in_the_middle_of_a_shard(stage, share, teacher, images, disk, tmp_path, monkeypatch):
    latents = run_encode(teacher, images, tmp_path / "latents", entries_per_shard=2)
    arguments = ["--device", "cpu", "--batch-size", 4, "--teacher", teacher]
    if stage == "encode":
        whole = latents
        arguments += ["--data", images, "--resolution", 32, "--entries-per-shard", 2]
    else:
        whole = run_teacher_cache(teacher, latents, tmp_path / "cache")
        arguments += [
            "--latents",
            latents,
            "--rounds",
            2,
            "--tokens",
            16,
            "--entries-per-shard",
            6,
            "--batch-size",
            6,
            "--samples",
            0,
        ]
    # There was room when the stage began; another program took it meanwhile.
    monkeypatch.setattr(f"pipeline.commands.{stage.replace('-', '_')}.require_space", lambda *_: None)
    shards = sum(len(data) for data in shard_files(whole).values())
    out = disk(bytes_of(whole) - int((1 - share) * shards)) / "out"

    result = invoke(stage, *arguments, "--out", out)
    assert result.exit_code == 2, result.output
    assert re.search(r"\.(tar|index): No space left on device\. Fix this and rerun the same command\.", result.output)
    assert not list(out.rglob(".*.partial"))
    # A tar whose sidecar found no room does not count as finished.
    finished = [name for name in shard_files(out) if (out / name).with_suffix(".index").is_file()]
    kept = {name: (out / name).stat().st_mtime_ns for name in finished}
    assert 0 < len(kept) < len(shard_files(whole))
    assert shard_files(out).items() <= shard_files(whole).items()

    disk(4 * bytes_of(whole))
    result = invoke(stage, *arguments, "--out", out)
    assert result.exit_code == 0, result.output
    assert shard_files(out) == shard_files(whole)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept


@pytest.mark.parametrize("room", [0.5, 0.9])
def test_a_disk_that_fills_up_in_a_checkpoint(room, cache, disk, tmp_path, monkeypatch):
    """Once in the student's weights, once in the optimiser's state."""
    # There was room when the training began.
    monkeypatch.setattr("pipeline.training.loop.require_room", lambda *_: None)
    arguments = [
        "--cache",
        cache,
        "--level",
        "sd_small",
        "--train-batch-size",
        3,
        "--learning-rate",
        1e-3,
        "--device",
        "cpu",
        "--no-report",
        "--dataloader-num-workers",
        0,
        "--checkpointing-steps",
        2,
    ]
    whole = tmp_path / "whole"
    assert invoke("distill", *arguments, "--max-train-steps", 4, "--out", whole).exit_code == 0
    checkpoint = whole / "checkpoints" / "step-0000002"
    share = bytes_of(checkpoint / "unet") if room == 0.5 else bytes_of(checkpoint)
    out = disk(bytes_of(checkpoint) + int(room * share)) / "out"

    result = invoke("distill", *arguments, "--max-train-steps", 4, "--out", out)
    assert result.exit_code == 2, result.output
    assert "No space left on device. Fix this and rerun the same command." in result.output
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-0000002"]
    assert finished_step(out) == 0

    disk(8 * bytes_of(whole))
    assert invoke("distill", *arguments, "--max-train-steps", 4, "--out", out).exit_code == 0
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()

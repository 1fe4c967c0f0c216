"""Stage one, the codec and the other commands on a GPU, against the same on the CPU; the demo from nothing."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.gpu import needs_gpu
from support.stages import read_entries, reset_accelerate, run_distill, run_encode, run_teacher_cache, shard_files

from pipeline.cli import main
from pipeline.system.threads import in_background
from shards import codec, device_codec

pytestmark = needs_gpu
ROOT = Path(__file__).parents[2]
# Largest error of a stored value, as a share of the largest value on the CPU in float32.
BOUNDS = {"fp32": 5e-3, "fp16": 2e-2, "bf16": 1e-1}


def invoke(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    reset_accelerate()
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def latents(teacher, images, tmp_path_factory):
    return run_encode(teacher, images, tmp_path_factory.mktemp("latents") / "cpu")


@pytest.fixture(scope="module")
def student(teacher, latents, tmp_path_factory):
    work = tmp_path_factory.mktemp("student")
    cache = run_teacher_cache(teacher, latents, work / "cache", device="auto", samples=2)
    return run_distill(cache, work / "student", device="auto", max_train_steps=2)


def largest_errors(made: Path, expected: Path, stage: str, names: list[str]) -> dict[str, float]:
    """By tensor, as a share of the largest value."""
    pairs = list(zip(read_entries(made, stage, names), read_entries(expected, stage, names), strict=True))
    return {
        name: max(
            float(np.abs(x.tensors[name].values.astype(np.float32) - y.tensors[name].values).max())
            / float(np.abs(y.tensors[name].values).max())
            for x, y in pairs
        )
        for name in names
    }


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_encode_gives_the_latents_of_the_cpu(teacher, images, latents, tmp_path, dtype, compiled):
    made = run_encode(teacher, images, tmp_path / "gpu", device="auto", dtype=dtype, compile=compiled)
    errors = largest_errors(made, latents, "latents", ["latents", "prompt_embeds"])
    assert max(errors.values()) < BOUNDS[dtype], errors


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_teacher_cache_gives_the_targets_of_the_cpu(teacher, latents, tmp_path, dtype, compiled):
    exact = {"codec": "fp32", "tokens": 0}
    expected = run_teacher_cache(teacher, latents, tmp_path / "cpu", **exact)
    made = run_teacher_cache(teacher, latents, tmp_path / "gpu", device="auto", dtype=dtype, compile=compiled, **exact)
    names = ["teacher_pred", "tap.down_blocks.0", "tap.mid_block", "tap.up_blocks.3"]
    errors = largest_errors(made, expected, "cache", names)
    assert max(errors.values()) < BOUNDS[dtype], errors


def test_teacher_cache_in_fp16_writes_the_same_bytes_twice(teacher, latents, tmp_path):
    made = [run_teacher_cache(teacher, latents, tmp_path / name, device="auto", dtype="fp16") for name in "ab"]
    assert shard_files(made[0]) == shard_files(made[1])


@pytest.mark.parametrize("shape", [(16, 16, 16), (320, 33, 31), (1280, 8, 8)])
@pytest.mark.parametrize("snr_db", [0.0, 10.0, 40.0])
def test_the_codec_of_the_device_is_the_reference(shape, snr_db):
    features = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    offsets = (5, (1 << 22) - 7)
    values, mu, steps = device_codec.quantise(features.cuda(), snr_db, offsets)
    decoded = device_codec.dequantise(values, mu, steps, offsets).cpu().numpy()
    for i, offset in enumerate(offsets):
        q, reference_mu, step = codec.quantise(features[i].numpy(), snr_db, offset)
        np.testing.assert_allclose(mu[i].cpu().numpy(), reference_mu, atol=1e-6)
        assert float(steps[i]) == pytest.approx(float(step), rel=1e-5)
        # The last bit of mu or of the step may move a value across the border between two integers.
        assert (values[i].cpu().numpy() != q).mean() < 1e-3
        bound = float(step) / 2 * (1 + 1e-4) + 1e-6
        assert np.abs(decoded[i] - features[i].numpy()).max() <= bound
        stored = codec.dequantise(values[i].cpu().numpy(), mu[i].cpu().numpy(), float(steps[i]), offset)
        np.testing.assert_allclose(decoded[i], stored, rtol=1e-6, atol=1e-6)


def test_a_background_thread_has_the_current_device():
    def devices():
        yield torch.cuda.current_device()

    assert list(in_background(devices(), 1)) == [torch.cuda.current_device()]


def test_samples_evaluation_and_exports_work(teacher, student, tmp_path):
    invoke("sample", "--model", student, "--prompts", "a", "--out", tmp_path / "samples", "--num-inference-steps", 2)
    assert (tmp_path / "samples" / "0000.png").is_file()
    command = ["evaluate", "--student", student, "--teacher", teacher, "--out", tmp_path / "evaluation"]
    invoke(*command, "--repeats", 1, "--bins", 2)
    cost = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["cost"]
    assert cost
    invoke("export", "--model", student, "--format", "single-file", "--out", tmp_path / "student.safetensors")
    assert (tmp_path / "student.safetensors").is_file()


def test_lora_trains(teacher, latents, tmp_path):
    pytest.importorskip("peft")
    command = ["finetune", "--model", teacher, "--latents", latents, "--out", tmp_path / "lora", "--lora-rank", 2]
    invoke(*command, "--max-train-steps", 2, "--train-batch-size", 2)
    assert list((tmp_path / "lora").glob("*.safetensors"))


def test_the_demo_runs_from_nothing_and_its_student_follows_captions(tmp_path):
    make = ["make", "-f", ROOT / "Makefile", "distill", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.ready"]
    make += [f"LAUNCH={sys.executable}", f"WORK={tmp_path / 'demo'}"]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths}
    result = subprocess.run(make, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = (tmp_path / "demo" / "sd_small" / "report.html").read_text()
    teacher, untrained, student = [float(share) for share in re.findall(r"([\d.]+)% over \d+ images", report)]
    print(f"facts that hold: teacher {teacher} %, untrained student {untrained} %, student {student} %")
    assert student > 75 > untrained

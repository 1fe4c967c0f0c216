"""Training on a GPU: its losses are the CPU's, it resumes across devices, stops gracefully and gives memory back."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.gpu import needs_gpu
from support.stages import (
    metrics,
    prepared,
    reset_accelerate,
    run_distill,
    run_encode,
    run_teacher_cache,
    state_dict_of,
)

from pipeline.commands import distill
from pipeline.training.loader import collated_batches

pytestmark = needs_gpu
ROOT = Path(__file__).parents[2]
STEPS = 20
# The largest relative difference of a loss from the CPU's in float32, over the first steps.
BOUNDS = {"no": 1e-2, "bf16": 5e-2, "fp16": 3e-2}


@pytest.fixture(scope="module")
def cache(teacher, images, tmp_path_factory):
    work = tmp_path_factory.mktemp("cache")
    latents = run_encode(teacher, images, work / "latents")
    return run_teacher_cache(teacher, latents, work / "cache", samples=2)


@pytest.fixture(scope="module")
def on_cpu(cache, tmp_path_factory):
    return metrics(run_distill(cache, tmp_path_factory.mktemp("cpu") / "out", max_train_steps=STEPS))


@pytest.mark.parametrize(
    "more", [{}, {"compile": True}, {"gradient_checkpointing": True}], ids=["", "compile", "checkpointing"]
)
@pytest.mark.parametrize("precision", BOUNDS)
def test_losses_are_those_of_the_cpu(cache, on_cpu, tmp_path, precision, more):
    changes = {"device": "auto", "mixed_precision": precision, "allow_tf32": False, "max_train_steps": STEPS, **more}
    lines = metrics(run_distill(cache, tmp_path / "out", **changes))
    assert [line["step"] for line in lines] == [line["step"] for line in on_cpu]
    # fp16 skips its first steps until the scale of the gradients fits.
    count = 1 if precision == "fp16" else STEPS
    for line, expected in zip(lines[:count], on_cpu[:count], strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=BOUNDS[precision])
    assert all(torch.isfinite(tensor).all() for tensor in state_dict_of(tmp_path / "out" / "unet").values())


def test_the_average_may_be_kept_on_the_cpu(cache, tmp_path):
    settings = {"device": "auto", "use_ema": True, "mixed_precision": "no", "allow_tf32": False}
    expected = state_dict_of(run_distill(cache, tmp_path / "gpu", **settings) / "unet")
    found = state_dict_of(run_distill(cache, tmp_path / "cpu", ema_device="cpu", **settings) / "unet")
    assert all(torch.allclose(tensor, found[name], rtol=1e-3, atol=1e-5) for name, tensor in expected.items())


def test_8_bit_adam_trains_much_as_adam_does_and_resumes(cache, on_cpu, tmp_path):
    settings = {"device": "auto", "mixed_precision": "no", "allow_tf32": False, "use_8bit_adam": True}
    out = run_distill(cache, tmp_path / "out", max_train_steps=STEPS // 2, **settings)
    out = run_distill(cache, out, max_train_steps=STEPS, **settings)
    for line, expected in zip(metrics(out), on_cpu, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=3e-2)


def test_the_average_and_validation_images_work_in_bf16(cache, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\n")
    out = run_distill(
        cache,
        tmp_path / "out",
        device="auto",
        use_ema=True,
        validation_prompts=prompts,
        validation_steps=2,
        mixed_precision="bf16",
    )
    assert sorted(path.name for path in (out / "validation").iterdir()) == ["step-0000002", "step-0000004"]
    assert metrics(out)[-1]["step"] == 4


def test_a_gpu_with_bf16_uses_it_unless_told_otherwise(cache, tmp_path):
    settings = distill.DistillSettings(cache=cache, out=tmp_path / "out", level="sd_small")
    resolved = distill.resolve_precision(settings)
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    assert (resolved.mixed_precision, resolved.allow_tf32) == (("bf16", True) if has_bf16 else ("no", False))


@pytest.mark.parametrize(("first", "then"), [("cpu", "auto"), ("auto", "cpu")])
def test_a_training_resumes_on_another_device(cache, on_cpu, tmp_path, first, then):
    """What was not asked for stays as the first run had it."""
    exact = {"mixed_precision": "no", "allow_tf32": False} if first == "auto" else {}
    run_distill(cache, tmp_path / "out", device=first, max_train_steps=2, use_ema=True, **exact)
    out = run_distill(cache, tmp_path / "out", device=then, max_train_steps=4, use_ema=True)
    losses = [line["loss"] for line in metrics(out)]
    assert losses == pytest.approx([line["loss"] for line in on_cpu[:4]], rel=BOUNDS["no"])


def start(cache: Path, out: Path) -> subprocess.Popen:
    """`distill` with two loader workers in a process group of its own, once it has taken a few steps."""
    command = [sys.executable, "-m", "pipeline.distill", "--cache", cache, "--out", out, "--level", "sd_small"]
    command += ["--max-train-steps", "100000", "--train-batch-size", "2", "--logging-steps", "1", "--no-report"]
    child = subprocess.Popen(
        [*map(str, command), "--dataloader-num-workers", "2"], cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 180
    while not (out / "metrics.jsonl").is_file() or len(metrics(out)) < 5:
        assert child.poll() is None, child.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return child


@pytest.mark.parametrize("signals", [(signal.SIGINT,), (signal.SIGTERM,), (signal.SIGTERM, signal.SIGTERM)])
def test_a_signal_to_the_group_leaves_a_checkpoint(cache, tmp_path, signals):
    """Loader workers get it too, and a scheduler may send it twice."""
    child = start(cache, tmp_path / "out")
    for number in signals:
        os.killpg(child.pid, number)
    error = child.communicate(timeout=120)[1].decode()
    assert child.returncode == 130, error
    assert "Traceback" not in error
    (saved,) = (tmp_path / "out" / "checkpoints").glob("step-*")
    assert int(saved.name.removeprefix("step-")) == metrics(tmp_path / "out")[-1]["step"]


def test_the_memory_is_free_before_the_report_is_drawn(cache, tmp_path, monkeypatch):
    reserved, real = [], distill.generate_in_process

    def measured(*arguments):
        reserved.append(torch.cuda.memory_reserved())
        return real(*arguments)

    monkeypatch.setattr(distill, "generate_in_process", measured)
    run_distill(cache, tmp_path / "out", device="auto", report=True, use_ema=True)
    assert (tmp_path / "out" / "report.html").is_file()
    assert reserved
    assert max(reserved) < 32 << 20


def test_batches_are_pinned(cache, tmp_path):
    settings, training = prepared(cache, tmp_path / "out", level="sd_small", train_batch_size=2)
    reset_accelerate()
    from accelerate import Accelerator

    batch = next(collated_batches(settings, training.dataset, Accelerator(), 0))
    assert batch.latents.is_pinned()
    assert all(feature.values.is_pinned() for feature in batch.features.values())


def test_the_moments_and_the_average_have_the_memory_format_of_the_weights_after_a_resume(cache, tmp_path):
    run_distill(cache, tmp_path / "out", device="auto", use_ema=True, max_train_steps=2)
    settings = distill.DistillSettings(
        cache=cache, out=tmp_path / "out", level="sd_small", use_ema=True, dataloader_num_workers=0
    )
    settings = distill.resolve_precision(settings)
    training = distill.prepare(settings, distill.open_cache(settings), distill.make_accelerator(settings))
    for parameter, shadow in zip(training.trained, training.ema.shadow_params, strict=True):
        moment = training.optimizer.state[parameter]["exp_avg"]
        assert parameter.stride() == shadow.stride() == moment.stride()

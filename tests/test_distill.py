"""distill: equal to online distillation, from the cache alone; resumable; ends in a pipeline others load."""

import io
import json
import os
import shutil
import signal
import tarfile
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, UNet2DConditionModel
from support.stages import (
    first,
    metrics,
    prepared,
    run_distill,
    run_encode,
    run_teacher_cache,
    state_dict_of,
    tree,
)
from support.tiny import tiny_pipeline

from pipeline.commands import distill
from pipeline.core.diffusion import min_snr_weights
from pipeline.core.losses import total_loss
from pipeline.distill import DistillSettings
from pipeline.models.levels.sd import LEVELS
from pipeline.system.errors import UserError
from pipeline.training.checkpoint import list_checkpoints
from pipeline.training.interrupts import Interrupts
from pipeline.training.loop import step_losses
from pipeline.training.objective import Objective
from shards.schema import ShardError
from shards.store import LocalStore

approx = pytest.approx

# The pairs as the seeds and BK-SDM have them, written out once more by hand.
_DOWN, _UP = [f"down_blocks.{i}" for i in range(4)], [f"up_blocks.{i}" for i in range(4)]
_TINY = {
    "down_blocks.0": "down_blocks.0",
    "down_blocks.1": "down_blocks.1",
    "up_blocks.0": "up_blocks.1",
    "up_blocks.1": "up_blocks.2",
    "up_blocks.2": "up_blocks.3",
}
PAIRS = {
    "sd_small": {name: name for name in [*_DOWN, "mid_block", *_UP]},
    "sd_tiny": {**_TINY, "down_blocks.2": "up_blocks.0"},
    "bk_base": {name: name for name in [*_DOWN, *_UP]},
    "bk_small": {name: name for name in [*_DOWN, *_UP]},
    "bk_tiny": {**_TINY, "down_blocks.2.attentions.0.proj_out": "down_blocks.2.attentions.1.proj_out"},
}


@pytest.fixture(scope="module")
def caches(teacher, v_teacher, images, tmp_path_factory):
    """Exact caches that serve every level, by (prediction type, codec); made when first asked for."""
    work, made = tmp_path_factory.mktemp("caches"), {}

    def cache(prediction_type="epsilon", codec="fp32"):
        key = (prediction_type, codec)
        if key not in made:
            source = {"epsilon": teacher, "v_prediction": v_teacher}[prediction_type]
            latents = run_encode(source, images, work / f"latents-{prediction_type}")
            made[key] = run_teacher_cache(
                source, latents, work / "-".join(key), codec=codec, tokens=0, students=tuple(LEVELS)
            )
        return made[key]

    return cache


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    """What `run_distill` makes of the cache; not to be changed."""
    return run_distill(cache, tmp_path_factory.mktemp("trained") / "out")


@pytest.fixture(scope="module")
def begun(cache, tmp_path_factory):
    """The same training after its first step; not to be changed."""
    return run_distill(cache, tmp_path_factory.mktemp("begun") / "out", max_train_steps=1)


@pytest.fixture(scope="module")
def of_five_steps(cache, tmp_path_factory):
    return run_distill(cache, tmp_path_factory.mktemp("five") / "out", max_train_steps=5)


# The largest relative difference from online training, by how the cache stores its tensors.
TOLERANCES = {"fp32": 1e-5, "fp16": 2e-3}


def hooked(unet, names, outputs):
    for name in names:
        unet.get_submodule(name).register_forward_hook(
            lambda m, i, out, name=name: outputs.update({name: out if isinstance(out, torch.Tensor) else out[0]})
        )


def online(teacher_folder, student, pairs, batch, prediction_type):
    """Online distillation as the seeds do it: teacher and student in memory, hooks, F.mse_loss."""
    teacher = UNet2DConditionModel.from_pretrained(teacher_folder, subfolder="unet").eval()
    of_teacher, of_student = {}, {}
    hooked(teacher, pairs.values(), of_teacher)
    hooked(student, pairs.keys(), of_student)
    noise_scheduler = DDPMScheduler.from_pretrained(teacher_folder, subfolder="scheduler")
    latents, noise, prompts = batch.latents.float(), batch.noise.float(), batch.conditioning["prompt_embeds"].float()
    added = noise if batch.input_noise is None else batch.input_noise.float()
    noisy = noise_scheduler.add_noise(latents, added, batch.timesteps)
    with torch.no_grad():
        teacher_pred = teacher(noisy, batch.timesteps, prompts).sample
    student_pred = student(noisy, batch.timesteps, prompts).sample
    velocity = noise_scheduler.get_velocity(latents, noise, batch.timesteps)
    target = noise if prediction_type == "epsilon" else velocity
    terms = {"task": F.mse_loss(student_pred, target), "output": F.mse_loss(student_pred, teacher_pred)}
    terms |= {f"feature/{s}": F.mse_loss(of_student[s], of_teacher[t]) for s, t in pairs.items()}
    return terms


@pytest.mark.parametrize(
    ("level", "prediction_type", "codec"),
    [*((level, "epsilon", "fp32") for level in LEVELS), *(("sd_tiny", "v_prediction", codec) for codec in TOLERANCES)],
)
def test_losses_and_gradients_equal_the_online_ones(
    caches, teacher, v_teacher, tmp_path, level, prediction_type, codec
):
    tolerance = TOLERANCES[codec]
    cache = caches(prediction_type, codec)
    settings, training = prepared(cache, tmp_path, level=level, train_batch_size=5)
    batch = training.dataset.collate([training.dataset[i] for i in (0, 4, 9, 17, 25)])
    terms = step_losses(training, batch)
    total_loss(terms, 0.5, 0.25).backward()
    gradients = {name: p.grad.clone() for name, p in training.student.named_parameters()}

    source = {"epsilon": teacher, "v_prediction": v_teacher}[prediction_type]
    student = UNet2DConditionModel.from_pretrained(cache / "students" / level).train()
    expected = online(source, student, PAIRS[level], batch, prediction_type)
    (
        expected["task"]
        + 0.5 * expected["output"]
        + 0.25 * sum(term for name, term in expected.items() if name.startswith("feature/"))
    ).backward()

    assert {n: t.item() for n, t in terms.items()} == approx({n: t.item() for n, t in expected.items()}, rel=tolerance)
    flat = torch.cat([gradients[name].flatten() for name, _ in student.named_parameters()])
    expected_flat = torch.cat([p.grad.flatten() for p in student.parameters()])
    assert (flat - expected_flat).norm() <= tolerance * expected_flat.norm()


def test_with_input_perturbation_the_noise_stays_the_target(teacher, images, tmp_path):
    latents = run_encode(teacher, images, tmp_path / "latents")
    cache = run_teacher_cache(
        teacher, latents, tmp_path / "cache", codec="fp32", tokens=0, rounds=1, input_perturbation=0.3
    )
    settings, training = prepared(cache, tmp_path, level="sd_small", train_batch_size=5)
    batch = training.dataset.collate([training.dataset[i] for i in (0, 4, 9)])
    assert (batch.input_noise - batch.noise).std() > 0.2
    student = UNet2DConditionModel.from_pretrained(cache / "students" / "sd_small").train()
    expected = online(teacher, student, PAIRS["sd_small"], batch, "epsilon")
    terms = step_losses(training, batch)
    assert {n: t.item() for n, t in terms.items()} == approx({n: t.item() for n, t in expected.items()}, rel=1e-5)


def test_a_sampled_quantised_cache_gives_the_online_gradient_up_to_noise(caches, cache, teacher, tmp_path):
    settings, training = prepared(cache, tmp_path, level="sd_small", train_batch_size=5)
    batch = training.dataset.collate([training.dataset[i] for i in range(26)])
    terms = step_losses(training, batch)
    student = UNet2DConditionModel.from_pretrained(cache / "students" / "sd_small").train()
    expected = online(teacher, student, PAIRS["sd_small"], batch, "epsilon")
    # Quantisation adds its own variance to each MSE; the prediction is exact but for fp16.
    assert terms["output"].item() == approx(expected["output"].item(), rel=2e-3)
    assert terms["feature/mid_block"].item() == approx(expected["feature/mid_block"].item(), rel=0.2)


def test_stage_two_needs_nothing_but_the_cache(teacher, cache, tmp_path, monkeypatch):
    """The teacher is deleted, the cache is moved to another place, and loading a whole pipeline fails."""
    moved = tmp_path / "elsewhere" / "cache"
    shutil.copytree(cache, moved)

    def refuse(*args, **kwargs):
        raise AssertionError("stage two loaded a pipeline")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", refuse)
    monkeypatch.setattr("pipeline.models.load.load_unet", refuse)
    monkeypatch.setattr("pipeline.models.load.load_base", refuse)
    before = tree(moved)
    gone = teacher.rename(teacher.with_name("gone"))
    try:
        out = run_distill(moved, tmp_path / "out")
    finally:
        gone.rename(teacher)
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert tree(moved) == before


@pytest.mark.parametrize("level", ["sd_small", "sd_tiny"])
def test_the_student_makes_an_image_as_in_the_seeds_usage_snippet(cache, tmp_path, level):
    out = run_distill(cache, tmp_path / "out", level=level)
    pipe = DiffusionPipeline.from_pretrained(
        out, torch_dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe.unet.config.down_block_types) == {"sd_small": 4, "sd_tiny": 3}[level]
    with torch.inference_mode():
        image = pipe(
            prompt="a portrait",
            negative_prompt="bad anatomy",
            width=32,
            height=32,
            num_inference_steps=25,
            guidance_scale=7,
            num_images_per_prompt=1,
            generator=torch.Generator().manual_seed(1674753452),
        ).images[0]
    assert image.size == (32, 32)
    pipe.save_pretrained(tmp_path / "again")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "again", subfolder="unet")
    torch.manual_seed(0)
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([5, 900]), torch.randn(2, 8, 10)
    with torch.inference_mode():
        assert torch.equal(pipe.unet(*inputs).sample, again(*inputs).sample)


def test_training_lowers_the_loss_and_moves_every_tensor(cache, tmp_path):
    out = run_distill(cache, tmp_path / "out", max_train_steps=60, train_batch_size=8, learning_rate=3e-3)
    lines = metrics(out)
    assert sum(line["loss"] for line in lines[-10:]) < 0.7 * sum(line["loss"] for line in lines[:10])
    initial, final = state_dict_of(cache / "students" / "sd_small"), state_dict_of(out / "unet")
    assert all(not torch.equal(initial[name], final[name]) for name in initial)


def test_metrics_hold_every_term_and_the_total_is_their_weighted_sum(cache, tmp_path):
    out = run_distill(cache, tmp_path / "out", output_weight=0.3, feature_weight=0.2)
    lines = metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        features = {name: value for name, value in line.items() if name.startswith("feature/")}
        assert {name.removeprefix("feature/") for name in features} == PAIRS["sd_small"].keys()
        assert line["grad_norm"] > 0
        assert line["loss"] == approx(line["task"] + 0.3 * line["output"] + 0.2 * sum(features.values()), rel=1e-5)


def test_terms_without_weight_are_neither_read_nor_computed(cache, tmp_path, monkeypatch):
    read = set()
    real = LocalStore.read_ranges

    def watched(self, name, ranges):
        blocks = real(self, name, ranges)
        if name.endswith(".tar"):
            for block in blocks:
                with tarfile.open(fileobj=io.BytesIO(block + bytes(-len(block) % 512))) as tar:
                    read.update(member.name.partition(".")[2] for member in tar)
        return blocks

    monkeypatch.setattr(LocalStore, "read_ranges", watched)
    # What lies between two members is read with them only if it is short.
    monkeypatch.setattr("shards.reader.BRIDGED", 0)
    out = run_distill(cache, tmp_path / "out", output_weight=0.0, feature_weight=0.0)
    assert read == {"json", "latents.npy", "noise.npy", "prompt_embeds.npy"}
    assert metrics(out)[0]["loss"] == metrics(out)[0]["task"]
    read.clear()
    run_distill(cache, tmp_path / "tiny", level="sd_tiny", max_train_steps=1)
    assert "tap.mid_block.npy.zst" not in read
    assert "tap.up_blocks.0.npy.zst" in read


def state(out, step):
    return torch.load(out / "checkpoints" / f"step-{step:07d}" / "state.pt", weights_only=True)


def assert_equal_training(a, b, step):
    for folder in ("unet", f"checkpoints/step-{step:07d}/unet"):
        left, right = state_dict_of(a / folder), state_dict_of(b / folder)
        assert all(torch.equal(left[name], right[name]) for name in left)
    left, right = state(a, step), state(b, step)
    assert left["position"] == right["position"]
    for key in ("exp_avg", "exp_avg_sq"):
        for i in left["optimizer"]["state"]:
            assert torch.equal(left["optimizer"]["state"][i][key], right["optimizer"]["state"][i][key])
    if left["ema"]:
        pairs = zip(left["ema"]["shadow_params"], right["ema"]["shadow_params"], strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)
    timeless = [
        [{k: v for k, v in m.items() if k not in ("samples_per_second", "seconds")} for m in metrics(o)] for o in (a, b)
    ]
    assert timeless[0] == timeless[1]


class Stopped(Exception):
    pass


@pytest.mark.parametrize(("stop_at", "lr_scheduler"), [(1, "constant"), (5, "cosine")])
def test_a_stopped_run_resumes_bit_for_bit(cache, tmp_path, monkeypatch, stop_at, lr_scheduler):
    settings = {
        "max_train_steps": 7,
        "checkpointing_steps": 2,
        "use_ema": True,
        "lr_scheduler": lr_scheduler,
        "gradient_accumulation_steps": 2,
        "checkpoints_total_limit": 9,
    }
    whole = run_distill(cache, tmp_path / "whole", **settings)
    real = Objective.total
    calls = []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) > 2 * stop_at:
            raise Stopped
        return real(*arguments)

    monkeypatch.setattr(Objective, "total", stopping)
    with pytest.raises(Stopped):
        run_distill(cache, tmp_path / "stopped", **settings)
    monkeypatch.setattr(Objective, "total", real)
    assert_equal_training(run_distill(cache, tmp_path / "stopped", **settings), whole, 7)


def test_raising_the_steps_of_a_constant_schedule_continues_it(cache, trained, of_five_steps, tmp_path):
    out = shutil.copytree(trained, tmp_path / "out")
    assert_equal_training(run_distill(cache, out, max_train_steps=5), of_five_steps, 5)


def test_accumulation_equals_the_large_batch(cache, tmp_path):
    settings = {"max_train_steps": 3, "learning_rate": 1e-4}
    large = run_distill(cache, tmp_path / "large", train_batch_size=6, **settings)
    small = run_distill(cache, tmp_path / "small", train_batch_size=2, gradient_accumulation_steps=3, **settings)
    a, b = state(large, 3), state(small, 3)
    assert a["position"] == b["position"] == 18
    for i, moments in a["optimizer"]["state"].items():
        torch.testing.assert_close(moments["exp_avg"], b["optimizer"]["state"][i]["exp_avg"], rtol=1e-3, atol=1e-6)
    for x, y in zip(metrics(large), metrics(small), strict=True):
        assert x["loss"] == approx(y["loss"], rel=1e-4)


def test_a_run_may_go_on_in_smaller_batches_that_make_the_same_step(cache, tmp_path):
    settings = {"max_train_steps": 4, "learning_rate": 1e-4}
    whole = run_distill(cache, tmp_path / "whole", train_batch_size=6, **settings)
    out = run_distill(cache, tmp_path / "out", train_batch_size=6, **{**settings, "max_train_steps": 2})
    run_distill(cache, out, train_batch_size=2, gradient_accumulation_steps=3, **settings)
    assert state(whole, 4)["position"] == state(out, 4)["position"]
    for x, y in zip(metrics(whole), metrics(out), strict=True):
        assert x["loss"] == approx(y["loss"], rel=1e-4)


def test_the_learning_rate_can_be_scaled_by_the_entries_of_a_step(cache, tmp_path):
    settings = {"gradient_accumulation_steps": 3, "train_batch_size": 2, "max_train_steps": 2}
    scaled = run_distill(cache, tmp_path / "scaled", learning_rate=1e-4, scale_lr=True, **settings)
    assert [line["learning_rate"] for line in metrics(scaled)] == approx([6e-4] * 2)
    plain = run_distill(cache, tmp_path / "plain", learning_rate=6e-4, **settings)
    torch.testing.assert_close(state_dict_of(scaled / "unet"), state_dict_of(plain / "unet"))


@pytest.mark.parametrize(
    ("lr_scheduler", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("constant_with_warmup", 2, [0, 0.5, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 2, [0, 0.5, 1, 0.5]),
    ],
)
def test_the_schedule_counts_optimiser_steps(cache, tmp_path, lr_scheduler, warmup, expected):
    out = run_distill(
        cache,
        tmp_path / "out",
        lr_scheduler=lr_scheduler,
        lr_warmup_steps=warmup,
        gradient_accumulation_steps=2,
        train_batch_size=1,
    )
    assert [line["learning_rate"] / 1e-3 for line in metrics(out)] == approx(expected)


def test_the_saved_student_is_the_average_when_there_is_one(cache, tmp_path):
    """By hand: diffusers' decay min(0.9, (1 + s) / (10 + s)), from the initialised student's first step on."""
    out = run_distill(
        cache,
        tmp_path / "out",
        use_ema=True,
        ema_decay=0.9,
        max_train_steps=3,
        checkpointing_steps=1,
        checkpoints_total_limit=9,
    )
    steps = [state_dict_of(out / "checkpoints" / f"step-{s:07d}" / "unet") for s in (1, 2, 3)]
    average = dict(steps[0])
    for s in (1, 2):
        decay = min(0.9, (1 + s) / (10 + s))
        average = {name: decay * average[name] + (1 - decay) * steps[s][name] for name in average}
    saved = state_dict_of(out / "unet")
    for name in saved:
        torch.testing.assert_close(saved[name], average[name], rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(saved[name], steps[2][name]) for name in saved)


def test_gradient_checkpointing_changes_neither_losses_nor_weights(cache, trained, tmp_path):
    saving = run_distill(cache, tmp_path / "saving", gradient_checkpointing=True)
    left, right = state_dict_of(trained / "unet"), state_dict_of(saving / "unet")
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-5)
    assert metrics(saving)[-1]["loss"] == approx(metrics(trained)[-1]["loss"], rel=1e-4)


def test_gradients_are_clipped_to_the_norm(cache, tmp_path, monkeypatch):

    seen = []
    real = Accelerator.clip_grad_norm_

    def watched(self, parameters, max_norm, **kwargs):
        parameters = list(parameters)
        before = real(self, parameters, max_norm, **kwargs)
        after = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        seen.append((before.item(), after.item()))
        return before

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", watched)
    run_distill(cache, tmp_path / "out", max_grad_norm=0.01, gradient_accumulation_steps=2)
    assert len(seen) == 4
    assert all(before > 0.01 and after == approx(0.01, rel=1e-2) for before, after in seen)


def test_mixed_precision_trains_and_keeps_float32_weights(cache, trained, tmp_path):
    out = run_distill(cache, tmp_path / "out", mixed_precision="bf16")
    weights = state_dict_of(out / "unet")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(tensor.is_contiguous() for tensor in weights.values())
    assert metrics(out)[0]["loss"] == approx(metrics(trained)[0]["loss"], rel=0.03)
    assert metrics(out)[0]["loss"] != metrics(trained)[0]["loss"]


def test_only_the_newest_checkpoints_are_kept(cache, tmp_path):
    out = run_distill(cache, tmp_path / "out", max_train_steps=7, checkpointing_steps=2, checkpoints_total_limit=2)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-0000006", "step-0000007"]
    loaded = UNet2DConditionModel.from_pretrained(out / "checkpoints" / "step-0000006" / "unet")
    assert loaded.config.layers_per_block == 1


def test_a_finished_student_is_left_alone_and_reported(cache, trained, tmp_path, capsys):
    out = shutil.copytree(trained, tmp_path / "out")
    before = tree(out)
    run_distill(cache, out)
    assert "already finished, nothing to do" in capsys.readouterr().out
    assert tree(out) == before


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"learning_rate": 1e-4}, "learning_rate: 0.001 -> 0.0001"),
        ({"level": "sd_tiny"}, 'level: "sd_small" -> "sd_tiny"'),
        ({"feature_weight": 0.0}, "feature_weight: 0.5 -> 0.0"),
        ({"train_batch_size": 4}, "global_batch_size: 3 -> 4"),
        ({"gradient_accumulation_steps": 2}, "global_batch_size: 3 -> 6"),
    ],
)
def test_other_settings_on_the_same_output_are_refused_with_the_difference(cache, begun, changes, line):
    before = tree(begun)
    with pytest.raises(ShardError, match=line):
        run_distill(cache, begun, **changes)
    assert tree(begun) == before


def test_another_cache_on_the_same_output_is_refused(caches, begun):
    with pytest.raises(ShardError, match="cache: "):
        run_distill(caches(), begun)


def test_a_level_that_the_cache_lacks_is_refused_with_the_remedy(cache, tmp_path):
    with pytest.raises(ShardError, match="no features of down_blocks.2.attentions.1.proj_out.*--students"):
        run_distill(cache, tmp_path / "out", level="bk_tiny")
    with pytest.raises(UserError, match="no initial weights of bk_small.*--students bk_small"):
        run_distill(cache, tmp_path / "out", level="bk_small")


def test_a_cache_without_its_base_is_refused_before_training(cache, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(cache, copied, ignore=shutil.ignore_patterns("base"))
    with pytest.raises(UserError, match="has no base/.*Copy the complete cache"):
        run_distill(copied, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_report_is_written_by_the_next_run(cache, tmp_path, monkeypatch):
    def fail(*arguments):
        raise Stopped

    monkeypatch.setattr(distill, "write_report", fail)
    with pytest.raises(Stopped):
        run_distill(cache, tmp_path / "out", report=True, max_train_steps=1)
    monkeypatch.undo()
    weights = (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    run_distill(cache, tmp_path / "out", report=True, max_train_steps=1)
    assert (tmp_path / "out" / "report.html").is_file()
    assert (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == weights


def test_checkpoints_without_their_spec_are_refused(cache, begun, tmp_path):
    out = shutil.copytree(begun, tmp_path / "out")
    (out / "spec.json").unlink()
    with pytest.raises(UserError, match="without its spec.json"):
        run_distill(cache, out, max_train_steps=2)


def test_an_unfinished_cache_is_refused(cache, tmp_path):
    partial = tmp_path / "partial"
    shutil.copytree(cache, partial)
    (partial / "r0001-s00000.index").unlink()
    with pytest.raises(ShardError, match="unfinished. Missing shards: 1 of 6.*teacher-cache"):
        run_distill(partial, tmp_path / "out")


def test_training_may_start_on_the_rounds_that_are_finished(cache, tmp_path):
    growing = tmp_path / "cache"
    shutil.copytree(cache, growing)
    (growing / "r0001-s00000.index").unlink()
    with pytest.raises(ShardError, match=r"or train on the finished rounds with `distill --rounds 1`"):
        run_distill(growing, tmp_path / "out")
    run_distill(growing, tmp_path / "out", rounds=1, max_train_steps=2)
    run_distill(cache, tmp_path / "whole", rounds=1)
    shutil.copy(cache / "r0001-s00000.index", growing)
    # The second round is there by now; the run goes on with what it began with.
    run_distill(growing, tmp_path / "out", rounds=1)
    assert_equal_training(tmp_path / "out", tmp_path / "whole", 4)
    with pytest.raises(ShardError, match="rounds: 1 -> 2"):
        run_distill(growing, tmp_path / "out", max_train_steps=6)
    with pytest.raises(ShardError, match="has 2 rounds, not 3. To add rounds, run `teacher-cache --rounds 3`"):
        run_distill(growing, tmp_path / "more", rounds=3)


def test_a_flipped_bit_stops_the_run_with_the_shards_name(cache, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(cache, damaged)
    for path in damaged.glob("r0000-*.tar"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(ShardError, match=r"r0000-s0000\d.tar is damaged"):
        run_distill(damaged, tmp_path / "out", max_train_steps=20)


def test_a_loss_that_is_not_finite_stops_before_a_checkpoint_of_it(cache, tmp_path):
    with pytest.raises(UserError, match="loss is NaN or Inf by step.*no checkpoint yet.*Lower --learning-rate"):
        run_distill(cache, tmp_path / "out", learning_rate=1e30, max_train_steps=20)
    for _, path in list_checkpoints(tmp_path / "out" / "checkpoints"):
        assert all(torch.isfinite(t).all() for t in state_dict_of(path / "unet").values())


def test_a_loss_that_is_not_finite_names_the_entries_and_the_last_good_checkpoint(cache, tmp_path, monkeypatch):
    real, seen = Objective.losses, []

    def poisoned(self, batch, *others):
        seen.append(batch.keys)
        terms = real(self, batch, *others)
        return {**terms, "task": terms["task"] * float("nan")} if len(seen) == 4 else terms

    monkeypatch.setattr(Objective, "losses", poisoned)
    with pytest.raises(UserError) as caught:
        run_distill(cache, tmp_path / "out", max_train_steps=9, checkpointing_steps=2, logging_steps=3)
    assert f"first with the entries {', '.join(seen[3])}." in str(caught.value)
    assert "The last good checkpoint is" in str(caught.value)
    assert "step-0000002" in str(caught.value)


@pytest.fixture
def heeded_signals():
    """A shell starts what runs in the background with SIGINT ignored, and nohup with SIGHUP ignored: not here."""
    usual = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("heeded_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_leaves_a_checkpoint_and_resumes_bit_for_bit(
    cache, of_five_steps, tmp_path, monkeypatch, number
):
    real, calls = Objective.losses, []

    def interrupting(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return real(*arguments)

    monkeypatch.setattr(Objective, "losses", interrupting)
    with pytest.raises(KeyboardInterrupt, match="Stopped at step 3 of 5. Rerun the same command to resume from there."):
        run_distill(cache, tmp_path / "out", max_train_steps=5)
    assert [step for step, _ in list_checkpoints(tmp_path / "out" / "checkpoints")] == [3]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert_equal_training(run_distill(cache, tmp_path / "out", max_train_steps=5), of_five_steps, 5)


@pytest.mark.usefixtures("heeded_signals")
def test_only_a_second_ctrl_c_well_after_the_first_does_not_wait_for_the_step(monkeypatch):
    """A launcher and a scheduler may each pass one request on; only a person asks again."""
    now = [100.0]
    monkeypatch.setattr("pipeline.training.interrupts.time.monotonic", lambda: now[0])
    with Interrupts() as interrupts:
        assert not interrupts.requested
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            assert interrupts.requested
        now[0] += 5
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_is_ignored_stays_so():
    """As SIGHUP is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupts.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_min_snr_weights_task_and_output_of_each_entry(cache, tmp_path):
    settings, training = prepared(cache, tmp_path / "out", level="sd_small", snr_gamma=0.5, train_batch_size=1)
    plain = replace(training, objective=replace(training.objective, snr_gamma=None))
    for index in range(3):
        batch = training.dataset.collate([training.dataset[index]])
        weight = min_snr_weights(batch.timesteps, training.alphas_cumprod, 0.5, "epsilon")
        with torch.no_grad():
            weighted, unweighted = (step_losses(t, batch) for t in (training, plain))
        for name, term in unweighted.items():
            factor = weight[0] if name in ("task", "output") else 1.0
            torch.testing.assert_close(weighted[name], factor * term)


def test_a_run_that_left_no_checkpoint_may_be_started_with_other_settings(cache, tmp_path):
    with pytest.raises(UserError, match="loss is NaN or Inf"):
        run_distill(cache, tmp_path / "out", learning_rate=1e30, max_train_steps=20)
    run_distill(cache, tmp_path / "out", learning_rate=1e-3, max_train_steps=1)


def test_a_damaged_checkpoint_is_named(cache, tmp_path):
    out = run_distill(cache, tmp_path / "out", max_train_steps=2)
    (out / "checkpoints" / "step-0000002" / "state.pt").write_bytes(b"cut")
    with pytest.raises(UserError, match="step-0000002 cannot be read"):
        run_distill(cache, out, max_train_steps=3)


def test_loader_workers_change_nothing(cache, trained, tmp_path):
    helped = run_distill(cache, tmp_path / "helped", dataloader_num_workers=2)
    assert_equal_training(trained, helped, 4)


def test_batches_hold_what_the_entries_hold_for_any_position(cache, tmp_path):

    settings = DistillSettings(
        cache=cache, out=tmp_path, level="sd_small", train_batch_size=4, device="cpu", dataloader_num_workers=0
    )
    dataset = distill.open_cache(settings)
    stream = first(distill.batches(settings, dataset, Accelerator(cpu=True), 0), 14)
    keys = [key for batch in stream for key in batch.keys]
    assert len(set(keys[:26])) == 26
    later = first(distill.batches(settings, dataset, Accelerator(cpu=True), 8), 1)[0]
    assert later.keys == stream[2].keys
    assert torch.equal(later.latents, stream[2].latents)


def test_a_teacher_with_more_parts_hands_them_all_to_the_student(images, tmp_path):
    """Whatever the teacher's pipeline holds besides the U-Net is in the student too."""
    from transformers import CLIPImageProcessor

    pipe = tiny_pipeline()
    pipe.register_modules(feature_extractor=CLIPImageProcessor())
    pipe.save_pretrained(tmp_path / "teacher")
    latents = run_encode(tmp_path / "teacher", images, tmp_path / "latents")
    cache = run_teacher_cache(tmp_path / "teacher", latents, tmp_path / "cache", rounds=1)
    out = run_distill(cache, tmp_path / "out", max_train_steps=1)
    index = json.loads((out / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["feature_extractor"][1].startswith("CLIPImageProcessor")
    assert DiffusionPipeline.from_pretrained(out).feature_extractor is not None

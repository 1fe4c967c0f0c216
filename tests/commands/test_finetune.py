"""finetune: the plain diffusion loss on latents, of a student or a teacher, whole or by LoRA; exact when stopped."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from support import sidecars
from support.edited import change_json
from support.stages import (
    first,
    metrics,
    reset_accelerate,
    run_distill,
    run_encode,
    state_dict_of,
    tree,
)

from pipeline.commands import finetune
from pipeline.commands.finetune import FinetuneSettings, LatentsDataset
from pipeline.core.losses import mse
from pipeline.models.load import load_unet
from pipeline.sampling.generate import sampling_scheduler
from pipeline.system.errors import UserError
from pipeline.training import validation
from pipeline.training.loop import step_losses, train
from pipeline.training.lora import WEIGHTS
from pipeline.training.objective import Objective
from shards.schema import ShardError

pytestmark = pytest.mark.usefixtures("few_steps")

V = {"prediction_type": "v_prediction"}


@pytest.fixture(scope="module")
def student(cache_of_one_round, tmp_path_factory):
    out = tmp_path_factory.mktemp("student") / "student"
    return run_distill(cache_of_one_round, out, level="sd_tiny", max_train_steps=1)


def settings_of(model, latents, out, **changes):
    quick = {"max_train_steps": 4, "train_batch_size": 3, "learning_rate": 1e-3, "logging_steps": 1, "device": "cpu"}
    quick["report"] = False
    return FinetuneSettings(model=str(model), latents=latents, out=out, **{**quick, **changes})


def run(model, latents, out, **changes):
    finetune.run(settings_of(model, latents, out, **changes))
    reset_accelerate()
    return out


def prepare(settings, folder, dataset, accelerator):
    return finetune.prepare(settings, folder, load_unet(folder, None), dataset, accelerator)


def stopped(model, latents, out, after, monkeypatch, **changes):
    """A run that ends with an error in the step after `after`."""
    real, calls = Objective.losses, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) > after:
            raise RuntimeError("power cut")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "losses", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            run(model, latents, out, checkpointing_steps=2, **changes)
    reset_accelerate()
    return run(model, latents, out, checkpointing_steps=2, **changes)


def test_the_loss_is_diffusers_own_of_each_draw(student, latents, tmp_path):
    """Against the scheduler's add_noise and the U-Net called by hand."""
    settings = settings_of(student, latents, tmp_path / "out")
    dataset = LatentsDataset(latents)
    accelerator = Accelerator(cpu=True)
    training = prepare(settings, student, dataset, accelerator)
    batch = first(finetune.batches(settings, dataset, accelerator, 0, 1000), 1)[0]
    scheduler = DDPMScheduler.from_pretrained(student, subfolder="scheduler")
    unet = UNet2DConditionModel.from_pretrained(student / "unet")
    with torch.no_grad():
        noisy = scheduler.add_noise(batch.latents.float(), batch.noise, batch.timesteps)
        predicted = unet(
            noisy, batch.timesteps, encoder_hidden_states=batch.conditioning["prompt_embeds"].float()
        ).sample
        terms = step_losses(training, batch)
    assert list(terms) == ["task"]
    torch.testing.assert_close(terms["task"], F.mse_loss(predicted, batch.noise))
    reset_accelerate()


def test_input_perturbation_is_added_and_not_predicted(student, latents, tmp_path):
    dataset, accelerator = LatentsDataset(latents), Accelerator(cpu=True)
    plain, moved = (
        first(finetune.batches(settings_of(student, latents, tmp_path, **changes), dataset, accelerator, 0, 1000), 1)[0]
        for changes in ({}, {"input_perturbation": 0.3})
    )
    assert torch.equal(plain.noise, moved.noise)
    assert torch.equal(plain.added_noise, plain.noise)
    assert (moved.added_noise - moved.noise).std() == pytest.approx(0.3, rel=0.1)
    reset_accelerate()


def test_each_visit_has_its_own_draws_which_depend_only_on_image_and_visit(student, latents, tmp_path):
    dataset, accelerator = LatentsDataset(latents), Accelerator(cpu=True)

    def drawn(size, count):
        settings = settings_of(student, latents, tmp_path / "out", train_batch_size=size, uncond_fraction=0.3)
        seen = {}
        for batch in first(finetune.batches(settings, dataset, accelerator, 0, 1000), count):
            for i, key in enumerate(batch.keys):
                values = batch.noise[i], batch.timesteps[i], batch.conditioning["prompt_embeds"][i], batch.latents[i]
                seen.setdefault(key, []).append(values)
        return seen

    small, large = drawn(2, 26), drawn(13, 4)
    assert {key: len(visits) for key, visits in small.items()} == {f"{i:09d}": 4 for i in range(13)}
    for key, visits in small.items():
        for one, other in zip(visits, large[key], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert not torch.equal(visits[0][0], visits[1][0])
    empty = torch.from_numpy(np.load(latents / "empty_prompt_embeds.npy"))
    unconditional = sum(torch.equal(visit[2], empty) for visits in small.values() for visit in visits)
    assert 5 < unconditional < 28
    reset_accelerate()


def test_a_student_is_trained_and_comes_out_as_a_pipeline(student, latents, tmp_path):
    out = run(student, latents, tmp_path / "out", max_train_steps=40, train_batch_size=8, learning_rate=3e-3)
    losses = [line["task"] for line in metrics(out)]
    assert np.mean(losses[-8:]) < np.mean(losses[:8])
    pipe = StableDiffusionPipeline.from_pretrained(out)
    assert pipe.unet.config.layers_per_block == UNet2DConditionModel.load_config(student / "unet")["layers_per_block"]
    assert not (out / "checkpoints" / "checkpoints").exists()
    before, after = state_dict_of(student / "unet"), state_dict_of(out / "unet")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for part in ("vae", "text_encoder"):
        assert tree(out / part) == tree(student / part)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2, "use_ema": True}], ids=["whole", "lora"])
def test_a_stopped_run_resumes_bit_for_bit(student, latents, tmp_path, monkeypatch, changes):
    whole = run(student, latents, tmp_path / "whole", **changes)
    out = stopped(student, latents, tmp_path / "out", 3, monkeypatch, **changes)
    name = "pytorch_lora_weights.safetensors" if changes else "unet/diffusion_pytorch_model.safetensors"
    expected, found = load_file(whole / name), load_file(out / name)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert [line["task"] for line in metrics(out)] == [line["task"] for line in metrics(whole)]


def test_lora_trains_the_adapter_alone_and_is_loaded_by_the_pipeline(student, latents, tmp_path):
    settings = settings_of(student, latents, tmp_path / "out", lora_rank=2, max_train_steps=3)
    dataset, accelerator = LatentsDataset(latents), Accelerator(cpu=True)
    settings.out.mkdir()
    training = prepare(settings, student, dataset, accelerator)
    before = {name: value.clone() for name, value in training.student.state_dict().items()}
    train(settings, accelerator, training, finetune.batches(settings, dataset, accelerator, 0, 1000))
    changed = {name for name, value in training.student.state_dict().items() if not torch.equal(before[name], value)}
    assert changed
    assert all("lora_" in name for name in changed)
    training.transform.convert(training.student, training.base, settings.out, "epsilon")

    pipe = StableDiffusionPipeline.from_pretrained(student, safety_checker=None)
    pipe.load_lora_weights(settings.out)
    batch = first(finetune.batches(settings, dataset, accelerator, 0, 1000), 1)[0]
    inputs = batch.latents.float(), batch.timesteps
    embeds = {"encoder_hidden_states": batch.conditioning["prompt_embeds"].float()}
    with torch.no_grad():
        expected = training.student.eval()(*inputs, **embeds).sample
        torch.testing.assert_close(pipe.unet.eval()(*inputs, **embeds).sample, expected)
        pipe.fuse_lora()
        torch.testing.assert_close(pipe.unet(*inputs, **embeds).sample, expected, rtol=1e-4, atol=1e-5)
        pipe.unload_lora_weights()
        plain = UNet2DConditionModel.from_pretrained(student / "unet")(*inputs, **embeds).sample
    assert mse(plain, expected) > 0
    reset_accelerate()


def test_a_teacher_can_be_trained_too(teacher, latents, tmp_path):
    out = run(teacher, latents, tmp_path / "out", max_train_steps=1)
    StableDiffusionPipeline.from_pretrained(out, safety_checker=None)
    assert json.loads((out / "finetune.json").read_text())["model"] == str(teacher)


def test_another_training_in_the_same_place_is_refused(student, latents, tmp_path):
    out = run(student, latents, tmp_path / "out", max_train_steps=1)
    with pytest.raises(ShardError, match="noise_offset: 0.0 -> 0.1"):
        run(student, latents, out, max_train_steps=2, noise_offset=0.1)
    reset_accelerate()
    others = shutil.copytree(latents, tmp_path / "latents")
    sidecars.of_another_writing(others / "s00000.index")
    with pytest.raises(ShardError, match="shards_sha256: "):
        run(student, others, out, max_train_steps=2)
    reset_accelerate()


def test_latents_of_another_model_are_refused(student, v_teacher, images, tmp_path):
    from support.tiny import tiny_pipeline

    torch.manual_seed(5)
    other = tiny_pipeline()
    with torch.no_grad():
        for parameter in other.vae.parameters():
            parameter.add_(0.01)
    other.save_pretrained(tmp_path / "other")
    latents = run_encode(tmp_path / "other", images, tmp_path / "latents")
    with pytest.raises(UserError, match="was encoded with another VAE than the one of --model"):
        run(student, latents, tmp_path / "out")
    reset_accelerate()


def test_a_folder_that_is_not_a_pipeline(latents, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="--model .*nothing has no model_index.json"):
        run(tmp_path / "nothing", latents, tmp_path / "out")
    reset_accelerate()


def test_lora_weights_have_the_names_of_kohyas_scripts_on_request(student, latents, tmp_path):
    """kohya calls a layer by its path in the U-Net with underscores, and gives each an alpha: here the rank."""
    changes = {"lora_rank": 2, "max_train_steps": 1}
    kohya = load_file(run(student, latents, tmp_path / "k", lora_format="kohya", **changes) / WEIGHTS)
    plain = run(student, latents, tmp_path / "d", **changes)
    for folder in (tmp_path / "k", plain):
        # Readable as other outputs are; safetensors makes its files readable to their owner alone.
        assert (folder / WEIGHTS).stat().st_mode == (folder / "spec.json").stat().st_mode
    layers = [
        n for n, _ in load_unet(student, None).named_modules() if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    ]
    names = {f"lora_unet_{layer.replace('.', '_')}" for layer in layers}
    assert kohya.keys() == {f"{n}.{kind}" for n in names for kind in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert {float(value) for name, value in kohya.items() if name.endswith("alpha")} == {2.0}
    with pytest.raises(UserError, match="is finished, with the names of diffusers. For --lora-format kohya"):
        run(student, latents, plain, lora_format="kohya", **changes)
    reset_accelerate()
    pipes = [DiffusionPipeline.from_pretrained(student) for _ in range(2)]
    for pipe, folder in zip(pipes, (tmp_path / "k", plain), strict=True):
        pipe.load_lora_weights(folder)
        pipe.fuse_lora()
    weights = [pipe.unet.state_dict() for pipe in pipes]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0] if "lora" not in name)


@pytest.mark.parametrize("stated", ["epsilon", None])
def test_a_model_trained_towards_v_says_so_and_shows_it(student, latents, tmp_path, monkeypatch, stated):
    model = shutil.copytree(student, tmp_path / "model")
    change_json(model / "scheduler/scheduler_config.json", prediction_type=stated)
    (tmp_path / "prompts.txt").write_text("a picture\n")
    seen, real = [], validation.generate

    def generate(pipe, *arguments):
        scheduler = sampling_scheduler(pipe.scheduler, "dpm")
        seen.append((pipe.scheduler.config.prediction_type, scheduler.config.prediction_type))
        return real(pipe, *arguments)

    monkeypatch.setattr(validation, "generate", generate)
    validated = {"validation_prompts": tmp_path / "prompts.txt", "validation_steps": 1, "max_train_steps": 1}
    out = run(model, latents, tmp_path / "out", prediction_type="v_prediction", **validated)
    assert seen == [("v_prediction", "v_prediction")]
    pipe = StableDiffusionPipeline.from_pretrained(out)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    config = json.loads((out / "scheduler/scheduler_config.json").read_text())
    assert config == {**json.loads((model / "scheduler/scheduler_config.json").read_text()), **V}


def test_lora_weights_cannot_say_so_which_is_told(student, latents, tmp_path, capsys):
    run(student, latents, tmp_path / "same", lora_rank=2, max_train_steps=1, prediction_type="epsilon")
    assert "note:" not in capsys.readouterr().out
    run(student, latents, tmp_path / "other", lora_rank=2, max_train_steps=1, **V)
    assert "note: with these LoRA weights the model predicts v_prediction, which their file cannot state. Set" in (
        capsys.readouterr().out
    )


def test_a_students_folder_is_not_named_by_its_path(student, latents, tmp_path):
    out = run(student, latents, tmp_path / "out", max_train_steps=1)
    assert json.loads((out / "unet" / "config.json").read_text())["_name_or_path"] == student.name


@pytest.mark.parametrize("rank", [None, 2])
def test_it_ends_with_a_report_and_a_card(teacher, latents, tmp_path, rank, capsys):
    (teacher / "README.md").write_text("---\nlicense: openrail++\n---\n")
    out = run(teacher, latents, tmp_path / "out", lora_rank=rank, report=True, max_train_steps=2)
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    assert re.findall(r"<tr><th>([^<]+)</th><td><img", page) == ["before", "after"]
    assert f"see {out}/report.html" in capsys.readouterr().out
    name = teacher.name
    assert f"<h1>{name}, finetuned{' with LoRA of rank 2' if rank else ''}</h1>" in page
    assert f"| base model | {name} |" in card
    assert "The base model's licence is openrail++. These weights are derived" in card
    assert ("lora" in yaml.safe_load(card.split("---")[1])["tags"]) == bool(rank)
    assert ("load_lora_weights" in card) == bool(rank)
    assert str(tmp_path) not in page + card
    shown = re.findall(r'<img alt="(before|after): picture 0" src="([^"]+)"', page)
    assert len({uri for _, uri in shown}) == 2, "training changed nothing"
    (teacher / "README.md").unlink()


def test_a_missing_report_is_written_by_the_same_command(student, latents, tmp_path):
    out = run(student, latents, tmp_path / "out", max_train_steps=1)
    assert not (out / "report.html").exists()
    weights = (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    run(student, latents, out, max_train_steps=1, report=True, fp16_variant=True)
    assert (out / "report.html").is_file()
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == weights
    whole, half = (DiffusionPipeline.from_pretrained(out, variant=variant) for variant in (None, "fp16"))
    for part in ("unet", "vae", "text_encoder"):
        assert list((out / part).glob("*.fp16.safetensors"))
        pairs = zip(getattr(whole, part).parameters(), getattr(half, part).parameters(), strict=True)
        assert all(torch.equal(a.half(), b.half()) for a, b in pairs)
    assert sum(f.stat().st_size for f in out.rglob("*.fp16.safetensors")) < 0.6 * sum(
        f.stat().st_size for f in out.glob("[utv]*/*model.safetensors")
    )


def test_lora_weights_have_no_variant(student, latents, tmp_path):
    with pytest.raises(UserError, match="--fp16-variant is for a whole pipeline"):
        settings_of(student, latents, tmp_path / "out", lora_rank=2, fp16_variant=True)

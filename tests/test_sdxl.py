"""SDXL on the whole road: equal to online distillation with diffusers alone, resumable, and taken by its pipelines."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from click.testing import CliRunner
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file
from support.stages import (
    metrics,
    prepared,
    read_entries,
    reset_accelerate,
    run_distill,
    run_encode,
    run_teacher_cache,
    shard_files,
)
from support.tiny import tiny_xl_pipeline, write_images

from pipeline.cli import main
from pipeline.commands import finetune
from pipeline.commands.finetune import FinetuneSettings, LatentsDataset
from pipeline.core.losses import total_loss
from pipeline.models.families.sdxl import SDXL
from pipeline.models.levels.sdxl import LEVELS
from pipeline.models.load import load_base, load_unet
from pipeline.models.students import levels_of
from pipeline.sampling.generate import Sampler, generate
from pipeline.training.loop import step_losses
from pipeline.training.objective import Objective

pytestmark = pytest.mark.usefixtures("few_steps", "remembered_evaluations")

approx = pytest.approx
# A third of the entries have no prompt, and some images are flipped.
OPTIONS = {"uncond_fraction": 0.3}
# The pairs written down by hand.
DOWN, UP = [f"down_blocks.{i}" for i in range(3)], [f"up_blocks.{i}" for i in range(3)]
WITHOUT_MID = ("koala_700m", "sdxl_tiny")


def taps_of(level):
    return [*DOWN, *(() if level in WITHOUT_MID else ("mid_block",)), *UP]


def command(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    reset_accelerate()
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def v_teacher(tmp_path_factory):
    """Predicts v, with a terminal SNR of zero."""
    folder = tmp_path_factory.mktemp("xl-v-teacher")
    tiny_xl_pipeline(prediction_type="v_prediction", zero_snr=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def latents(xl_teacher, images, tmp_path_factory):
    return run_encode(xl_teacher, images, tmp_path_factory.mktemp("xl") / "latents", random_flip=True)


@pytest.fixture(scope="module")
def held_out(xl_teacher, tmp_path_factory):
    work = tmp_path_factory.mktemp("held-out")
    return run_encode(xl_teacher, write_images(work / "images", 3, seed=7), work / "latents")


@pytest.fixture(scope="module")
def cache(xl_teacher, latents, tmp_path_factory):
    """A cache as the defaults make it: quantised, sampled."""
    work = tmp_path_factory.mktemp("xl-cache")
    return run_teacher_cache(xl_teacher, latents, work / "cache", students=("ssd_1b", "koala_700m"), **OPTIONS)


@pytest.fixture(scope="module")
def student(cache, tmp_path_factory):
    return run_distill(cache, tmp_path_factory.mktemp("xl-student") / "student", level="ssd_1b", max_train_steps=2)


@pytest.fixture(scope="module")
def exact_caches(xl_teacher, v_teacher, images, latents, tmp_path_factory):
    """Exact caches that serve every level, by (prediction type, codec); made when first asked for."""
    work, made = tmp_path_factory.mktemp("exact"), {}

    def cache(prediction_type, codec):
        key = (prediction_type, codec)
        if key not in made:
            teacher = {"epsilon": xl_teacher, "v_prediction": v_teacher}[prediction_type]
            encoded = latents
            if prediction_type == "v_prediction":
                encoded = run_encode(teacher, images, work / f"latents-{codec}", random_flip=True)
            made[key] = run_teacher_cache(
                teacher, encoded, work / "-".join(key), codec=codec, tokens=0, students=tuple(LEVELS), **OPTIONS
            )
        return made[key]

    return cache


def hooked(unet, names, outputs):
    for name in names:
        unet.get_submodule(name).register_forward_hook(
            lambda m, i, out, name=name: outputs.update({name: out if isinstance(out, torch.Tensor) else out[0]})
        )


def conditioning_by_diffusers(pipe, entry, unconditional, images):
    """(prompt embeddings, pooled, time ids) of one image, by the pipeline's own functions, from image and caption."""
    with torch.no_grad():
        prompts, empty, pooled, empty_pooled = pipe.encode_prompt(entry.meta["caption"])
    crop = entry.meta["crop"]
    width, height = Image.open(images / entry.meta["source_id"]).size
    left = crop["resized"][0] - 32 - crop["left"] if crop["flip"] else crop["left"]
    numbers = pipe._get_add_time_ids(
        (height, width), (crop["top"], left), (32, 32), torch.float32, text_encoder_projection_dim=12
    )
    return (empty, empty_pooled, numbers) if unconditional else (prompts, pooled, numbers)


def online(folder, student, names, batch, conditioning, prediction_type):
    """Online distillation with diffusers alone: teacher and student in memory, hooks, F.mse_loss."""
    teacher = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()
    of_teacher, of_student = {}, {}
    hooked(teacher, names, of_teacher)
    hooked(student, names, of_student)
    noise_scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    latents, noise = batch.latents.float(), batch.noise.float()
    noisy = noise_scheduler.add_noise(latents, noise, batch.timesteps)
    prompts, pooled, numbers = conditioning
    added = {"text_embeds": pooled, "time_ids": numbers}
    with torch.no_grad():
        teacher_pred = teacher(noisy, batch.timesteps, prompts, added_cond_kwargs=added).sample
    student_pred = student(noisy, batch.timesteps, prompts, added_cond_kwargs=added).sample
    velocity = noise_scheduler.get_velocity(latents, noise, batch.timesteps)
    target = noise if prediction_type == "epsilon" else velocity
    terms = {"task": F.mse_loss(student_pred, target), "output": F.mse_loss(student_pred, teacher_pred)}
    return terms | {f"feature/{name}": F.mse_loss(of_student[name], of_teacher[name]) for name in names}


# The largest relative difference from online training, by how the cache stores its tensors.
TOLERANCES = {"fp32": 1e-5, "fp16": 2e-3}


@pytest.mark.parametrize(
    ("level", "prediction_type", "codec"),
    [*((level, "epsilon", "fp32") for level in LEVELS), *(("koala_1b", "v_prediction", codec) for codec in TOLERANCES)],
)
def test_losses_and_gradients_equal_those_of_diffusers_alone(
    exact_caches, xl_teacher, v_teacher, images, tmp_path, level, prediction_type, codec
):
    """What is stored of the prompts is rounded to fp16; all else is computed from images and captions."""
    tolerance, teacher = TOLERANCES[codec], {"epsilon": xl_teacher, "v_prediction": v_teacher}[prediction_type]
    cache = exact_caches(prediction_type, codec)
    _, training = prepared(cache, tmp_path, level=level, train_batch_size=5)
    entries = [training.dataset[i] for i in (0, 4, 9, 17, 25)]
    unconditional = [entry.meta["unconditional"] for entry in entries]
    assert len(set(unconditional)) == 2
    batch = training.dataset.collate(entries)
    pipe = StableDiffusionXLPipeline.from_pretrained(teacher, add_watermarker=False)
    rows = [conditioning_by_diffusers(pipe, *pair, images) for pair in zip(entries, unconditional, strict=True)]
    prompts, pooled, numbers = (torch.cat(tensors) for tensors in zip(*rows, strict=True))
    prompts, pooled = prompts.half().float(), pooled.half().float()
    assert torch.allclose(batch.conditioning["prompt_embeds"].float(), prompts, rtol=1e-3, atol=1e-4)
    assert torch.allclose(batch.conditioning["pooled_prompt_embeds"].float(), pooled, rtol=1e-3, atol=1e-4)
    assert torch.equal(batch.conditioning["time_ids"].float(), numbers)

    terms = step_losses(training, batch)
    total_loss(terms, 0.5, 0.25).backward()
    gradients = {name: p.grad.clone() for name, p in training.student.named_parameters()}
    student = UNet2DConditionModel.from_pretrained(cache / "students" / level).train()
    names = taps_of(level)
    expected = online(teacher, student, names, batch, (prompts, pooled, numbers), prediction_type)
    total_loss(expected, 0.5, 0.25).backward()

    assert {n: t.item() for n, t in terms.items()} == approx({n: t.item() for n, t in expected.items()}, rel=tolerance)
    flat = torch.cat([gradients[name].flatten() for name, _ in student.named_parameters()])
    expected_flat = torch.cat([p.grad.flatten() for p in student.parameters()])
    assert (flat - expected_flat).norm() <= tolerance * expected_flat.norm()


def test_min_snr_is_finite_where_the_terminal_snr_is_zero(exact_caches, tmp_path):
    _, training = prepared(exact_caches("v_prediction", "fp32"), tmp_path, level="ssd_1b", snr_gamma=5.0)
    assert training.alphas_cumprod[-1] == 0
    batch = training.dataset.collate([training.dataset[0], training.dataset[1]])
    batch.timesteps[:] = torch.tensor([999, 0])
    assert all(torch.isfinite(term) for term in step_losses(training, batch).values())


def test_entries_without_a_prompt_keep_the_numbers_of_their_image(cache, latents):
    stored = {
        entry.meta["source_id"]: entry.tensors["time_ids"].values
        for entry in read_entries(latents, "latents", ["time_ids"])
    }
    names = ["time_ids", "prompt_embeds", "pooled_prompt_embeds"]
    entries = read_entries(cache, "cache", names)
    empty = [entry for entry in entries if entry.meta["unconditional"]]
    assert 0 < len(empty) < len(entries)
    for entry in entries:
        np.testing.assert_array_equal(entry.tensors["time_ids"].values, stored[entry.meta["source_id"]])
        for name in names[1:]:
            assert entry.tensors[name].values.any() == (not entry.meta["unconditional"])


def test_two_runs_write_the_same_bytes(xl_teacher, images, latents, cache, tmp_path):
    again = run_encode(xl_teacher, images, tmp_path / "latents", random_flip=True)
    assert shard_files(again) == shard_files(latents)
    options = {"students": ("ssd_1b", "koala_700m"), "taps": "blocks", **OPTIONS}
    assert shard_files(run_teacher_cache(xl_teacher, again, tmp_path / "cache", **options)) == shard_files(cache)
    assert "tap_set" not in json.loads((cache / "manifest.json").read_text())["spec"]


def test_the_cache_is_verified_and_computed_again(cache, xl_teacher):
    output = command("verify", cache, "--full", "--recompute", 4, "--teacher", xl_teacher, "--device", "cpu")
    assert "no damage found; 6 of 6 shards intact" in output
    assert "tap.mid_block" in output
    assert "TOO LARGE" not in output


def test_the_default_student_is_one_of_sdxl(xl_teacher, latents, tmp_path):
    given = ("--teacher", xl_teacher, "--latents", latents, "--out", tmp_path / "cache", "--rounds", 1, "--samples", 0)
    assert "  mid_block" in command("teacher-cache", *given, "--dry-run")
    assert levels_of(None, SDXL) == ("sdxl_small",)
    assert levels_of(("vega",), SDXL) == ("vega",)


def test_inspect_shows_what_is_stored(latents):
    output = command("inspect", latents)
    assert "time_ids.npy" in output
    assert "pooled_prompt_embeds.npy" in output


def test_a_stopped_run_resumes_bit_for_bit(cache, tmp_path, monkeypatch):
    settings = {"level": "koala_700m", "max_train_steps": 4, "checkpointing_steps": 2, "use_ema": True}
    whole = run_distill(cache, tmp_path / "whole", **settings)
    real, calls = Objective.total, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("power cut")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "total", stopping)
        with pytest.raises(RuntimeError, match="power cut"):
            run_distill(cache, tmp_path / "out", **settings)
    reset_accelerate()
    out = run_distill(cache, tmp_path / "out", **settings)
    name = "unet/diffusion_pytorch_model.safetensors"
    expected, found = load_file(whole / name), load_file(out / name)
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
    assert [line["task"] for line in metrics(out)] == [line["task"] for line in metrics(whole)]


def test_a_training_ends_with_validation_images_a_report_and_a_card(cache, held_out, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    out = run_distill(
        cache,
        tmp_path / "out",
        level="ssd_1b",
        max_train_steps=2,
        validation_prompts=tmp_path / "prompts.txt",
        validation_steps=2,
        validation_latents=held_out,
        report=True,
    )
    assert Image.open(out / "validation/step-0000002/0000.png").size == (32, 32)
    assert {"held_out/task"} <= metrics(out)[-1].keys()
    assert "ssd_1b" in (out / "report.html").read_text()
    card = (out / "README.md").read_text()
    assert "The shape of its U-Net is that of [SSD-1B](https://arxiv.org/abs/2401.02677), and the loss follows" in card
    assert "fewer transformer blocks in its attentions, and a mid block of one ResNet" in card


def pixels(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np", **options
    ).images


def test_the_student_is_a_pipeline_of_diffusers(student):
    pipe = DiffusionPipeline.from_pretrained(student)
    assert isinstance(pipe, StableDiffusionXLPipeline)
    assert pipe.config.force_zeros_for_empty_prompt
    assert np.isfinite(pixels(pipe)).all()
    image = Image.new("RGB", (32, 32), "red")
    other = StableDiffusionXLImg2ImgPipeline.from_pretrained(student)
    assert np.isfinite(pixels(other, image=image, strength=1.0)).all()


def test_generated_images_are_those_of_the_pipeline(student):
    """With guidance: what is unconditional is zeros for both."""
    base = load_base(student, unet=load_unet(student, None))
    sampler = Sampler(steps=2, guidance_scale=5.0, scheduler="euler")
    (image,) = generate(base, ["a cat"], sampler, None).images
    pipe = DiffusionPipeline.from_pretrained(student, add_watermarker=False)
    expected = pipe.numpy_to_pil(pixels(pipe, guidance_scale=5.0))[0]
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


def test_sample_and_evaluate_take_it(student, xl_teacher, held_out, tmp_path):
    command("sample", "--model", student, "--prompts", "a cat", "--out", tmp_path / "s", "--num-inference-steps", 1)
    assert (tmp_path / "s/0000.png").is_file()
    arguments = ["--student", student, "--teacher", xl_teacher, "--latents", held_out, "--entries", 3, "--bins", 2]
    quick = ("--repeats", 1, "--num-inference-steps", 4, "--timing-batch-size", 1, "--device", "cpu")
    output = command("evaluate", *arguments, "--out", tmp_path / "e", *quick)
    assert "parameters" in output.lower()
    assert json.loads((tmp_path / "e/evaluation.json").read_text())["student"]["level"] == "ssd_1b"


QUICK = ("--train-batch-size", 2, "--dataloader-num-workers", 0, "--device", "cpu", "--no-report")


def test_it_is_finetuned_complete_and_by_lora(student, latents, tmp_path):
    common = ("--model", student, "--latents", latents, "--max-train-steps", 1, "--uncond-fraction", 0.5, *QUICK)
    command("finetune", *common, "--out", tmp_path / "whole", "--learning-rate", 1e-3)
    whole = StableDiffusionXLPipeline.from_pretrained(tmp_path / "whole")
    assert whole.unet.config.reverse_transformer_layers_per_block
    command("finetune", *common, "--out", tmp_path / "lora", "--lora-rank", 2, "--learning-rate", 1e-1)
    pipe = StableDiffusionXLPipeline.from_pretrained(student)
    before = pixels(pipe)
    pipe.load_lora_weights(tmp_path / "lora")
    adapted = pixels(pipe)
    assert np.abs(adapted - before).max() > 0
    pipe.unload_lora_weights()
    np.testing.assert_array_equal(pixels(pipe), before)


def test_finetuning_drops_prompts_and_keeps_the_numbers_of_images(student, latents, tmp_path):
    settings = FinetuneSettings(
        model=str(student), latents=latents, out=tmp_path, uncond_fraction=0.5, train_batch_size=13, device="cpu"
    )
    dataset = LatentsDataset(latents)
    batch = next(finetune.batches(settings, dataset, Accelerator(cpu=True), 0, 1000))
    dropped = ~batch.conditioning["prompt_embeds"].flatten(1).any(1)
    assert 0 < dropped.sum() < 13
    assert torch.equal(dropped, ~batch.conditioning["pooled_prompt_embeds"].any(1))
    numbers = {
        entry.key: entry.tensors["time_ids"].values.tolist() for entry in read_entries(latents, "latents", ["time_ids"])
    }
    assert batch.conditioning["time_ids"].tolist() == [numbers[key] for key in batch.keys]

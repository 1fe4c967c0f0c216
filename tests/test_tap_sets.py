"""Sets of taps other than those of blocks, on SDXL's road with images of three shapes: equal to hooks on diffusers' own
U-Nets."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from diffusers import DDPMScheduler, UNet2DConditionModel
from support.stages import (
    bytes_per_entry,
    metrics,
    prepared,
    reset_accelerate,
    run_distill,
    run_encode,
    run_teacher_cache,
)
from support.tiny import write_images

from pipeline.cli import main
from pipeline.commands import plan
from pipeline.core.losses import total_loss
from pipeline.settings.plan import PlanSettings
from pipeline.training.loop import step_losses
from shards.codec import encode_npy
from shards.manifest import read_manifest
from shards.store import open_store

pytestmark = pytest.mark.usefixtures("sides_in_steps_of_eight", "remembered_evaluations")

# The sets, with a level of the authors who compare them.
LEVELS = {"resnets-attentions": "ssd_1b", "self-attention": "koala_700m"}


def command(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    reset_accelerate()
    return result.output


@pytest.fixture(scope="module")
def latents(xl_teacher, tmp_path_factory):
    """Two images of each bucket, whose latents are 20 x 12, 16 x 16 and 12 x 20."""
    work = tmp_path_factory.mktemp("xl")
    images = write_images(work / "images", 6, sizes=((60, 36), (40, 40), (36, 60)))
    return run_encode(xl_teacher, images, work / "latents", buckets=True)


def make_cache(xl_teacher, latents, out, **options):
    return run_teacher_cache(xl_teacher, latents, out, rounds=1, **options)


# How the features are stored: exactly and completely; quantised and sampled.
STORED = {
    "resnets-attentions": {"codec": "fp32", "tokens": 0},
    "self-attention": {"snr_db": 40.0, "tokens": 16},
}


@pytest.fixture(scope="module")
def caches(xl_teacher, latents, tmp_path_factory):
    """By set."""
    work = tmp_path_factory.mktemp("caches")
    return {
        taps: make_cache(xl_teacher, latents, work / taps, taps=taps, students=(level,), **STORED[taps])
        for taps, level in LEVELS.items()
    }


def outputs_of(unet, wanted):
    """The outputs of the modules for which `wanted` is true, by their paths, filled as the U-Net runs."""
    outputs = {}
    for name, module in unet.named_modules():
        if wanted(name, module):
            module.register_forward_hook(
                lambda _, __, output, name=name: outputs.update(
                    {name: output if isinstance(output, torch.Tensor) else output[0]}
                )
            )
    return outputs


def wanted_by(taps):
    """What the papers' authors hook: by the classes of modules, and not by their paths."""
    kinds = {"resnets-attentions": ("ResnetBlock2D", "Transformer2DModel"), "self-attention": ("Attention",)}[taps]

    def wanted(name, module):
        if name == "mid_block":
            return taps == "resnets-attentions"
        in_mid_block = name.startswith("mid_block") and taps == "resnets-attentions"
        return type(module).__name__ in kinds and not name.endswith("attn2") and not in_mid_block

    return wanted


def teachers_name(name, level):
    """Of the three layers of an up block, KOALA keeps the first and the last."""
    return re.sub(r"(up_blocks\.\d\.\w+)\.1", r"\1.2", name) if level == "koala_700m" else name


def kept(output, feature, latents):
    """The positions of tokens (B, N, C), or of a map (B, C, H, W), that a cache of such latents has kept."""
    maps = output
    if output.ndim == 3:
        height, width = latents.shape[2:]
        smaller = math.isqrt(height * width // output.shape[1])
        maps = output.unflatten(1, (height // smaller, width // smaller)).permute(0, 3, 1, 2)
    rows, columns = (
        [[(offset + i * feature.stride) % side for i in range(side // feature.stride)] for offset in offsets]
        for offsets, side in zip((feature.rows, feature.columns), maps.shape[2:], strict=True)
    )
    return torch.stack([m[:, r][:, :, c] for m, r, c in zip(maps, rows, columns, strict=True)])


@pytest.mark.parametrize(
    ("taps", "level", "first", "tolerance"),
    [
        ("resnets-attentions", "ssd_1b", 0, 1e-5),
        ("self-attention", "koala_700m", 2, 1e-2),
        ("self-attention", "koala_700m", 4, 1e-2),
    ],
)
def test_losses_and_gradients_equal_those_of_hooks_on_diffusers_own_unets(
    caches, xl_teacher, tmp_path, taps, level, first, tolerance
):
    """Of a bucket, by its first entry: the tallest, the square and the widest."""
    cache = caches[taps]
    _, training = prepared(cache, tmp_path, level=level)
    batch = training.dataset.collate([training.dataset[first], training.dataset[first + 1]])
    assert batch.latents.shape[2:] == {0: (20, 12), 2: (16, 16), 4: (12, 20)}[first]
    terms = step_losses(training, batch)
    total_loss(terms, 0.5, 0.25).backward()

    teacher = UNet2DConditionModel.from_pretrained(xl_teacher, subfolder="unet").eval()
    student = UNet2DConditionModel.from_pretrained(cache / "students" / level).train()
    of_teacher, of_student = (outputs_of(unet, wanted_by(taps)) for unet in (teacher, student))
    scheduler = DDPMScheduler.from_pretrained(xl_teacher, subfolder="scheduler")
    noise = batch.noise.float()
    noisy = scheduler.add_noise(batch.latents.float(), noise, batch.timesteps)
    given = {name: tensor.float() for name, tensor in batch.conditioning.items()}
    added = {"text_embeds": given["pooled_prompt_embeds"], "time_ids": given["time_ids"]}
    with torch.no_grad():
        teacher_pred = teacher(noisy, batch.timesteps, given["prompt_embeds"], added_cond_kwargs=added).sample
    student_pred = student(noisy, batch.timesteps, given["prompt_embeds"], added_cond_kwargs=added).sample
    expected = {"task": F.mse_loss(student_pred, noise), "output": F.mse_loss(student_pred, teacher_pred)}
    for name, output in of_student.items():
        source = teachers_name(name, level)
        feature = batch.features[source]
        expected[f"feature/{name}"] = F.mse_loss(
            kept(output, feature, batch.latents), kept(of_teacher[source], feature, batch.latents)
        )
    total_loss(expected, 0.5, 0.25).backward()

    assert len(expected) > 7
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(
        {name: term.item() for name, term in expected.items()}, rel=tolerance, abs=tolerance**2
    )
    found = torch.cat([parameter.grad.flatten() for parameter in training.student.parameters()])
    wanted = torch.cat([parameter.grad.flatten() for parameter in student.parameters()])
    assert (found - wanted).norm() <= tolerance * wanted.norm()


def test_gradient_checkpointing_changes_no_gradient(caches, tmp_path):
    """The taps lie within what is recomputed."""
    gradients = []
    for checkpointing in (False, True):
        out = tmp_path / str(checkpointing)
        _, training = prepared(caches["self-attention"], out, level="koala_700m", gradient_checkpointing=checkpointing)
        batch = training.dataset.collate([training.dataset[0], training.dataset[1]])
        training.objective.total(step_losses(training, batch)).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in training.student.parameters()]))
        reset_accelerate()
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


def test_ssd_1bs_mid_block_is_its_one_resnet(caches):
    """So its authors' hook on the student's mid_block.resnets.0 sees what a tap of the mid block does."""
    student = UNet2DConditionModel.from_pretrained(caches["resnets-attentions"] / "students/ssd_1b")
    outputs = outputs_of(student, lambda name, module: name in ("mid_block", "mid_block.resnets.0"))
    with torch.no_grad():
        added = {"text_embeds": torch.zeros(1, 12), "time_ids": torch.zeros(1, 6)}
        student(torch.randn(1, 4, 16, 16), 1, torch.zeros(1, 8, 18), added_cond_kwargs=added)
    assert torch.equal(outputs["mid_block"], outputs["mid_block.resnets.0"])


def test_tokens_are_sampled_quantised_verified_and_shown(caches, xl_teacher):
    """Of the 8 x 8 tokens of a square's second stage, one of each 2 x 2 is kept; of the third all."""
    cache = caches["self-attention"]
    spec = read_manifest(open_store(cache)).spec
    assert spec["tap_set"] == "self-attention"
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    shapes = ((10, 6, 1), (8, 8, 2), (6, 10, 1))
    assert spec["taps"][name] == [{"shape": [12, height, width], "stride": stride} for height, width, stride in shapes]
    shown = command("inspect", cache)
    assert "tap_set: self-attention" in shown
    assert f"tap {name}: [12, 8, 8], stride 2" in shown
    recomputed = command("verify", cache, "--full", "--recompute", 6, "--teacher", xl_teacher, "--device", "cpu")
    assert f"tap.{name}" in recomputed
    assert "TOO LARGE" not in recomputed
    assert "no damage found; 3 of 3 shards intact" in recomputed


def test_a_student_learns_from_tokens_of_all_shapes(caches, tmp_path):
    """Each line of the metrics is of one step, whose batch is of one bucket."""
    out = run_distill(
        caches["self-attention"], tmp_path / "out", level="koala_700m", train_batch_size=2, max_train_steps=3
    )
    lines = metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        features = [value for name, value in line.items() if name.startswith("feature/")]
        assert len(features) == len(taps_of(caches["self-attention"])) > 7
        assert all(map(math.isfinite, features))
    assert lines[-1]["epoch"] == 1


def test_plan_counts_the_bytes_that_a_cache_takes(xl_teacher, caches, monkeypatch):
    """Of each bucket, and of each tap of a square."""
    monkeypatch.setattr(plan, "training_lines", lambda *_: [])
    monkeypatch.setattr(plan, "training_cost", lambda *_: None)
    settings = PlanSettings(
        teacher=str(xl_teacher),
        images=4,
        resolution=32,
        buckets=True,
        students=("ssd_1b",),
        taps="resnets-attentions",
        codec="fp32",
        tokens=0,
    )
    lines = "\n".join(plan.plan(settings))
    buckets = re.findall(r"^  (\d+ x \d+) px: .*, ([\d,]+) per entry$", lines, re.MULTILINE)
    assert [size for size, _ in buckets] == ["24 x 40", "32 x 32", "40 x 24"]
    planned = [int(size.replace(",", "")) for _, size in buckets]
    # A shard each, of two entries.
    written = [bytes_per_entry(caches["resnets-attentions"], [f"r0000-s{number:05d}"]) for number in range(3)]
    assert planned == pytest.approx(written, rel=0.05)
    of_tap = dict(re.findall(r"^  (\S+) +([\d,]+)$", lines, re.MULTILINE))
    shapes = {tap: tuple(stated[1]["shape"]) for tap, stated in taps_of(caches["resnets-attentions"]).items()}
    assert len(shapes) == 26
    assert {tap: of_tap[tap] for tap in shapes} == {
        tap: f"{len(encode_npy(np.zeros(shape, np.float32))):,}" for tap, shape in shapes.items()
    }


def taps_of(cache):
    return read_manifest(open_store(cache)).spec["taps"]

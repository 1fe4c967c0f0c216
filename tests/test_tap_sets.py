"""Sets of taps other than those of blocks, on SDXL's road: equal to hooks on diffusers' own U-Nets."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from diffusers import DDPMScheduler, UNet2DConditionModel
from support.stages import prepared, reset_accelerate, run_encode, run_teacher_cache
from support.tiny import write_images

from pipeline.cli import main
from pipeline.commands import plan
from pipeline.core.losses import total_loss
from pipeline.settings.plan import PlanSettings
from pipeline.training.loop import step_losses
from shards.manifest import read_manifest
from shards.store import open_store

pytestmark = pytest.mark.usefixtures("remembered_evaluations")

# The sets, with a level of the authors who compare them.
LEVELS = {"resnets-attentions": "ssd_1b", "self-attention": "koala_700m"}


def command(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    reset_accelerate()
    return result.output


@pytest.fixture(scope="module")
def latents(xl_teacher, tmp_path_factory):
    work = tmp_path_factory.mktemp("xl")
    return run_encode(xl_teacher, write_images(work / "images", 4), work / "latents")


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


def kept(output, feature):
    """The positions of tokens (B, N, C), or of a map (B, C, H, W), that a cache has kept."""
    maps = output if output.ndim == 4 else output.unflatten(1, (-1, math.isqrt(output.shape[1]))).permute(0, 3, 1, 2)
    step = feature.stride
    return torch.stack([m[:, r::step, c::step] for m, r, c in zip(maps, feature.rows, feature.columns, strict=True)])


@pytest.mark.parametrize(
    ("taps", "level", "tolerance"),
    [("resnets-attentions", "ssd_1b", 1e-5), ("self-attention", "koala_700m", 1e-2)],
)
def test_losses_and_gradients_equal_those_of_hooks_on_diffusers_own_unets(
    caches, xl_teacher, tmp_path, taps, level, tolerance
):
    cache = caches[taps]
    _, training = prepared(cache, tmp_path, level=level)
    batch = training.dataset.collate([training.dataset[i] for i in range(4)])
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
        expected[f"feature/{name}"] = F.mse_loss(kept(output, feature), kept(of_teacher[source], feature))
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
    """Of the 8 x 8 tokens of the second stage, one of each 2 x 2 is kept; of the third all."""
    cache = caches["self-attention"]
    spec = read_manifest(open_store(cache)).spec
    assert spec["tap_set"] == "self-attention"
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    assert spec["taps"][name] == {"shape": [12, 8, 8], "stride": 2}
    shown = command("inspect", cache)
    assert "tap_set: self-attention" in shown
    assert f"tap {name}: [12, 8, 8], stride 2" in shown
    recomputed = command("verify", cache, "--recompute", 2, "--teacher", xl_teacher, "--device", "cpu")
    assert f"tap.{name}" in recomputed
    assert "TOO LARGE" not in recomputed


def test_plan_counts_the_bytes_that_a_cache_takes(xl_teacher, caches, monkeypatch):
    monkeypatch.setattr(plan, "training_lines", lambda *_: [])
    monkeypatch.setattr(plan, "training_cost", lambda *_: None)
    settings = PlanSettings(
        teacher=str(xl_teacher),
        images=4,
        resolution=32,
        students=("ssd_1b",),
        taps="resnets-attentions",
        codec="fp32",
        tokens=0,
    )
    shown = command("inspect", caches["resnets-attentions"])
    bytes_of = dict(re.findall(r"^tap\.(\S+)\.npy +([\d,]+)", shown, re.MULTILINE))
    assert len(bytes_of) == 26
    planned = dict(re.findall(r"^  (\S+) +([\d,]+)$", "\n".join(plan.plan(settings)), re.MULTILINE))
    assert {tap: planned[tap] for tap in bytes_of} == bytes_of

"""How close a student is to its teacher: no error for the teacher itself, and the errors of diffusers' own modules."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from support.stages import run_encode
from support.tiny import tiny_unet

from pipeline.core import draws
from pipeline.evaluation.fidelity import (
    SAME,
    HeldOut,
    bin_edges,
    draw_noise,
    fidelity,
    levels_of,
    pairs_of,
    read_held_out,
)
from pipeline.models.families.sd import SD
from pipeline.models.levels.sd import LEVELS
from pipeline.models.students import student_config, student_weights
from pipeline.system.errors import UserError
from shards.reader import ShardSet
from shards.store import open_store

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def student_of(teacher: UNet2DConditionModel, level: str) -> UNet2DConditionModel:
    student = UNet2DConditionModel.from_config(student_config(dict(teacher.config), level))
    shapes = {name: tensor.shape for name, tensor in student.state_dict().items()}
    student.load_state_dict(student_weights(shapes, teacher.state_dict(), level))
    return student


def held_out(count: int) -> HeldOut:
    generator = torch.Generator().manual_seed(3)
    return HeldOut(
        [f"image {i}" for i in range(count)],
        torch.randn(count, 4, 16, 16, generator=generator),
        {"prompt_embeds": torch.randn(count, 8, 10, generator=generator)},
    )


def compare(student, level, count=3, bins=4, batch_size=2):
    alphas_cumprod, pairs = SCHEDULER.alphas_cumprod, pairs_of(level, SD)
    return fidelity(held_out(count), tiny_unet(), student, pairs, SD, alphas_cumprod, bins, batch_size, seed=5)


def test_a_teacher_has_no_error_against_itself():
    found = compare(tiny_unet(), SAME)
    assert [(b["first"], b["last"]) for b in found["bins"]] == [(0, 249), (250, 499), (500, 749), (750, 999)]
    for part in (*found["bins"], found["all"]):
        assert part["output"] == {"mse": 0.0, "relative": 0.0}
        assert part["taps"] == {name: {"mse": 0.0, "relative": 0.0} for name in SD.blocks}


@pytest.mark.parametrize("level", LEVELS)
def test_the_errors_of_one_entry_match_the_outputs_of_diffusers_modules(level):
    teacher = tiny_unet()
    student = student_of(teacher, level)
    with torch.no_grad():
        student.conv_out.weight.mul_(1.1)
    found = compare(student, level, count=1, bins=1)

    entry = held_out(1)
    noise = torch.from_numpy(draws.noise(5, "image 0", 0, (4, 16, 16), 0.0))[None]
    timestep = torch.tensor([int(draws.generator(5, "image 0", 0, "held-out").integers(0, 1000))])
    noisy = SCHEDULER.add_noise(entry.latents, noise, timestep)
    seen = {}
    for unet, names in ((teacher, [t for _, t in pairs_of(level, SD)]), (student, [s for s, _ in pairs_of(level, SD)])):
        for name in names:
            keep = lambda _module, _inputs, output, key=(unet, name): seen.update({key: output})  # noqa: E731
            unet.get_submodule(name).register_forward_hook(keep)
    with torch.no_grad():
        outputs = [
            unet(noisy, timestep, entry.conditioning["prompt_embeds"]).sample.numpy() for unet in (teacher, student)
        ]

    def check(error, teacher_output, student_output):
        expected = np.mean((student_output.astype(np.float64) - teacher_output) ** 2)
        power = np.mean(teacher_output.astype(np.float64) ** 2)
        assert error["mse"] == pytest.approx(expected, rel=1e-4)
        assert error["relative"] == pytest.approx(expected / power, rel=1e-4)

    check(found["all"]["output"], *outputs)
    assert list(found["all"]["taps"]) == [student_tap for student_tap, _ in LEVELS[level].taps]
    for student_tap, teacher_tap in LEVELS[level].taps:
        pair = [seen[teacher, teacher_tap], seen[student, student_tap]]
        tensors = [output[0] if isinstance(output, tuple) else output for output in pair]
        check(found["all"]["taps"][student_tap], *(tensor.numpy() for tensor in tensors))


def test_the_total_is_the_mean_of_the_parts_whatever_the_batch_size():
    student = student_of(tiny_unet(), "sd_small")
    found, again = (compare(student, "sd_small", batch_size=size) for size in (1, 3))
    mse = [part["output"]["mse"] for part in found["bins"]]
    assert found["all"]["output"]["mse"] == pytest.approx(np.mean(mse))
    assert again["all"]["output"]["mse"] == pytest.approx(found["all"]["output"]["mse"], rel=1e-5)
    assert min(mse) > 0


def test_every_image_has_its_own_noise_and_timestep_in_every_part():
    edges = bin_edges(7, 1000)
    assert edges[0] == 0
    assert edges[-1] == 1000
    ids = [f"{i}" for i in range(50)]
    for part in range(7):
        noise, timesteps = draw_noise(ids, (4, 8, 8), part, edges, 0)
        assert edges[part] <= timesteps.min() < timesteps.max() < edges[part + 1]
        noise_alone, timestep_alone = draw_noise(ids[7:8], (4, 8, 8), part, edges, 0)
        assert torch.equal(noise_alone[0], noise[7])
        assert timestep_alone[0] == timesteps[7]


@pytest.mark.parametrize(
    ("level", "found"),
    [("sd_small", ["sd_small", "bk_base"]), ("bk_small", ["bk_small"]), ("sd_tiny", ["sd_tiny", "bk_tiny"])],
)
def test_a_level_is_detected_from_its_layers(level, found):
    teacher = tiny_unet()
    assert levels_of(student_of(teacher, level), teacher, SD) == found


def test_a_student_of_other_widths_has_no_level():
    assert levels_of(tiny_unet(block_out_channels=(8, 8, 16, 16)), tiny_unet(), SD) == []


def test_held_out_images_are_spread_over_the_set(teacher, images, tmp_path):
    shards = ShardSet(open_store(run_encode(teacher, images, tmp_path / "latents")), "latents")
    few = read_held_out(shards, 3)
    assert few.source_ids == ["000.png", "006.png", "012.png"]
    assert [latents.shape for latents in few.latents] == [(4, 16, 16)] * 3
    assert few.conditioning["prompt_embeds"].shape == (3, 8, 10)
    assert len(read_held_out(shards, 100)) == 13


def test_outputs_that_overflow_are_reported():
    student = tiny_unet()
    with torch.no_grad():
        student.conv_out.bias.fill_(float("inf"))
    with pytest.raises(UserError, match=r"NaN or Inf in this precision\. Use --dtype fp32"):
        compare(student, SAME, count=1, bins=1)

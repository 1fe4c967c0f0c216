"""How near a student is to its teacher: exactly 0 for the teacher itself, and what diffusers' own modules give."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from support.stages import run_encode
from support.tiny import tiny_unet

from pipeline.core import draws
from pipeline.evaluation.fidelity import (
    SAME,
    SAME_TAPS,
    HeldOut,
    bin_edges,
    draw_noise,
    fidelity,
    levels_of,
    pairs_of,
    read_held_out,
)
from pipeline.models.families.sd import LEVELS, student_config, student_weights
from pipeline.system.errors import UserError
from shards.reader import ShardSet

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def student_of(teacher: UNet2DConditionModel, level: str) -> UNet2DConditionModel:
    student = UNet2DConditionModel.from_config(student_config(dict(teacher.config), level))
    shapes = {name: tensor.shape for name, tensor in student.state_dict().items()}
    student.load_state_dict(student_weights(shapes, teacher.state_dict(), level))
    return student


def held_out(count: int) -> HeldOut:
    draw = torch.Generator().manual_seed(3)
    return HeldOut(
        [f"picture {i}" for i in range(count)],
        torch.randn(count, 4, 16, 16, generator=draw),
        torch.randn(count, 8, 10, generator=draw),
    )


def compare(student, level, count=3, bins=4, batch_size=2):
    alphas_cumprod, pairs = SCHEDULER.alphas_cumprod, pairs_of(level)
    return fidelity(held_out(count), tiny_unet(), student, pairs, alphas_cumprod, bins, batch_size, seed=5)


def test_a_teacher_has_no_error_against_itself():
    found = compare(tiny_unet(), SAME)
    assert [(b["first"], b["last"]) for b in found["bins"]] == [(0, 249), (250, 499), (500, 749), (750, 999)]
    for part in (*found["bins"], found["all"]):
        assert part["output"] == {"mse": 0.0, "relative": 0.0}
        assert part["taps"] == {name: {"mse": 0.0, "relative": 0.0} for name, _ in SAME_TAPS}


@pytest.mark.parametrize("level", LEVELS)
def test_one_entrys_errors_are_those_of_diffusers_modules(level):
    teacher = tiny_unet()
    student = student_of(teacher, level)
    with torch.no_grad():
        student.conv_out.weight.mul_(1.1)
    found = compare(student, level, count=1, bins=1)

    only = held_out(1)
    noise = torch.from_numpy(draws.noise(5, "picture 0", 0, (4, 16, 16), 0.0))[None]
    timestep = torch.tensor([int(draws.generator(5, "picture 0", 0, "held-out").integers(0, 1000))])
    noisy = SCHEDULER.add_noise(only.latents, noise, timestep)
    seen = {}
    for unet, names in ((teacher, [t for _, t in pairs_of(level)]), (student, [s for s, _ in pairs_of(level)])):
        for name in names:
            keep = lambda _module, _inputs, output, key=(unet, name): seen.update({key: output})  # noqa: E731
            unet.get_submodule(name).register_forward_hook(keep)
    with torch.no_grad():
        outputs = [unet(noisy, timestep, only.prompt_embeds).sample.numpy() for unet in (teacher, student)]

    def check(error, its, mine):
        expected = np.mean((mine.astype(np.float64) - its) ** 2)
        assert error["mse"] == pytest.approx(expected, rel=1e-4)
        assert error["relative"] == pytest.approx(expected / np.mean(its.astype(np.float64) ** 2), rel=1e-4)

    check(found["all"]["output"], *outputs)
    assert list(found["all"]["taps"]) == [mine for mine, _ in LEVELS[level].taps]
    for mine, its in LEVELS[level].taps:
        pair = [seen[teacher, its], seen[student, mine]]
        tensors = [each[0] if isinstance(each, tuple) else each for each in pair]
        check(found["all"]["taps"][mine], *(tensor.numpy() for tensor in tensors))


def test_the_whole_is_the_mean_of_the_parts_and_no_batch_changes_it():
    student = student_of(tiny_unet(), "sd_small")
    found, again = (compare(student, "sd_small", batch_size=size) for size in (1, 3))
    mse = [part["output"]["mse"] for part in found["bins"]]
    assert found["all"]["output"]["mse"] == pytest.approx(np.mean(mse))
    assert again["all"]["output"]["mse"] == pytest.approx(found["all"]["output"]["mse"], rel=1e-5)
    assert min(mse) > 0


def test_each_picture_has_one_timestep_of_its_own_in_each_part():
    edges = bin_edges(7, 1000)
    assert edges[0] == 0
    assert edges[-1] == 1000
    ids = [f"{i}" for i in range(50)]
    for part in range(7):
        noise, timesteps = draw_noise(ids, (4, 8, 8), part, edges, 0)
        assert edges[part] <= timesteps.min() < timesteps.max() < edges[part + 1]
        alone, its = draw_noise(ids[7:8], (4, 8, 8), part, edges, 0)
        assert torch.equal(alone[0], noise[7])
        assert its[0] == timesteps[7]


@pytest.mark.parametrize(
    ("level", "found"),
    [("sd_small", ["sd_small", "bk_base"]), ("bk_small", ["bk_small"]), ("sd_tiny", ["sd_tiny", "bk_tiny"])],
)
def test_a_level_is_known_by_its_layers(level, found):
    teacher = tiny_unet()
    assert levels_of(student_of(teacher, level), teacher) == found


def test_a_student_of_other_widths_has_no_level():
    assert levels_of(tiny_unet(block_out_channels=(8, 8, 16, 16)), tiny_unet()) == []


def test_held_out_pictures_are_spread_over_the_set(teacher, images, tmp_path):
    shards = ShardSet(run_encode(teacher, images, tmp_path / "latents"), "latents")
    few = read_held_out(shards, 3)
    assert few.source_ids == ["000.png", "006.png", "012.png"]
    assert few.latents.shape == (3, 4, 16, 16)
    assert few.prompt_embeds.shape == (3, 8, 10)
    assert len(read_held_out(shards, 100)) == 13


def test_outputs_that_overflow_are_said():
    student = tiny_unet()
    with torch.no_grad():
        student.conv_out.bias.fill_(float("inf"))
    with pytest.raises(UserError, match="NaN or Inf in this precision: use --dtype fp32"):
        compare(student, SAME, count=1, bins=1)

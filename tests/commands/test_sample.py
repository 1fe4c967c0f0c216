"""distill-sd sample: the same images as diffusers, whatever the batch size; and what it refuses."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline, PNDMScheduler
from PIL import Image, ImageFont
from support.stages import reset_accelerate

from pipeline.cli import main
from pipeline.commands.sample import CAPTION_LINES, GAP, LINE_HEIGHT, caption_lines, contact_sheet


def sample(teacher, out, *options):
    arguments = ["sample", "--model", str(teacher), "--out", str(out), "--device", "cpu", "--num-inference-steps", "3"]
    result = CliRunner().invoke(main, [*arguments, *map(str, options)])
    reset_accelerate()
    return result


def read_images(out):
    return [np.asarray(Image.open(path), int) for path in sorted(out.glob("0*.png"))]


def test_the_images_match_diffusers(teacher, tmp_path):
    result = sample(
        teacher,
        tmp_path / "out",
        "--prompts",
        "a red cat, asleep",
        "--guidance-scale",
        4,
        "--negative-prompt",
        "dogs",
        "--scheduler",
        "pndm",
        "--seed",
        11,
    )
    assert result.exit_code == 0, result.output
    pipe = DiffusionPipeline.from_pretrained(teacher)
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    expected = pipe(
        "a red cat, asleep",
        num_inference_steps=3,
        guidance_scale=4.0,
        negative_prompt="dogs",
        generator=torch.Generator().manual_seed(11),
    ).images[0]
    (found,) = read_images(tmp_path / "out")
    np.testing.assert_allclose(found, np.asarray(expected, int), atol=1)


def test_an_image_depends_on_its_own_seed_and_not_on_the_batch(teacher, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\na dog\n")
    options = ["--prompts", "a bird", "--prompts", prompts]
    assert sample(teacher, tmp_path / "one", *options, "--batch-size", 1).exit_code == 0
    assert sample(teacher, tmp_path / "three", *options, "--batch-size", 3).exit_code == 0
    assert json.loads((tmp_path / "one" / "samples.json").read_text())["prompts"] == ["a bird", "a cat", "a dog"]
    for one, three in zip(read_images(tmp_path / "one"), read_images(tmp_path / "three"), strict=True):
        np.testing.assert_allclose(one, three, atol=1)
    assert len(read_images(tmp_path / "one")) == 3
    assert (tmp_path / "one" / "sheet.png").is_file()


def test_the_images_have_the_requested_size(teacher, tmp_path):
    assert sample(teacher, tmp_path / "out", "--prompts", "a cat", "--height", 16, "--width", 24).exit_code == 0
    assert read_images(tmp_path / "out")[0].shape == (16, 24, 3)


@pytest.mark.parametrize("scheduler", ["dpm", "ddim", "euler", "euler-ancestral", "heun", "unipc"])
def test_every_scheduler_generates(teacher, tmp_path, scheduler):
    assert sample(teacher, tmp_path / "out", "--prompts", "a cat", "--scheduler", scheduler).exit_code == 0
    assert read_images(tmp_path / "out")[0].std() > 0


def test_a_contact_sheet_is_roughly_square_and_bears_the_prompts():
    images = [Image.new("RGB", (512, 256), (i, 0, 0)) for i in range(70)]
    sheet = contact_sheet(images, [""] * 70)
    below = CAPTION_LINES * LINE_HEIGHT + GAP
    assert sheet.size == (8 * (256 + GAP), 8 * (128 + below))
    assert sheet.getpixel((256 + GAP, 128 + below))[0] == 9
    assert contact_sheet(images[:3], [""] * 3).width == 2 * (256 + GAP)
    caption = (0, 128, 256, 128 + LINE_HEIGHT)
    assert sheet.crop(caption).getextrema() == ((255, 255),) * 3
    assert contact_sheet(images[:1], ["a red cat"]).crop(caption).getextrema() == ((0, 255),) * 3


@pytest.mark.parametrize(
    "prompt", ["a red cat", "a red cat that sleeps on a blue mat " * 9, "ab" * 500, "", "one " * 4 + "x" * 300 + " end"]
)
def test_the_lines_of_a_caption_fit(prompt):
    font = ImageFont.load_default(12)
    lines = caption_lines(prompt, font, 128)
    assert len(lines) <= CAPTION_LINES
    assert all(font.getlength(line) <= 128 for line in lines)
    kept = " ".join(lines).replace(" ...", "")
    assert prompt.startswith(kept[:20])
    assert ("..." in "".join(lines)) == (font.getlength(prompt) > 3 * 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--height", 16], "--height and --width go together"),
        (["--height", 20, "--width", 16], "--height is 20, but must be a multiple of 8"),
        (["--model", "nowhere/at/all"], "--model nowhere/at/all is not a folder"),
        (["--prompts", "promts.txt"], "--prompts promts.txt is not a file"),
        (["--out", "."], "already exists. Choose another folder"),
    ],
)
def test_bad_input_ends_in_one_message(teacher, tmp_path, options, message):
    result = sample(teacher, tmp_path / "out", "--prompts", "a cat", *options)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()

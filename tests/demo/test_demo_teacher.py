"""The bundled teachers are complete, load with diffusers and follow captions; and the command that retrains them."""

import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from support.tiny import SDXL

from pipeline.cli import main
from pipeline.core.taps import Taps
from pipeline.demo import networks_xl
from pipeline.demo.evaluate import captions_of, evaluate, judge, table
from pipeline.demo.scenes import make_scene
from pipeline.demo.trainer import Trainer
from pipeline.models.bundled import CHECKSUMS, TEACHER, TEACHER_XL, teacher_folder
from pipeline.models.hashing import shapes_of
from pipeline.models.levels import sdxl as levels_xl
from pipeline.models.levels.sd import LEVELS
from pipeline.models.load import find_pipeline, unet_config
from pipeline.models.students import meta_student, student_config, student_weights
from pipeline.sampling.generate import Sampler, generate
from pipeline.system.errors import UserError

UNET = "unet/diffusion_pytorch_model.safetensors"
SIZES = {
    "--scenes": 8,
    "--autoencoder-steps": 2,
    "--autoencoder-batch": 2,
    "--text-steps": 2,
    "--text-batch": 2,
    "--steps": 2,
    "--batch": 2,
}
TRAINING = [*(str(word) for pair in SIZES.items() for word in pair), "--evaluate", "0", "--checkpoint-every", "1"]
# Well below the scores in the teacher's README, because so few captions vary by chance.
FLOOR = 0.85
BEST_GUIDANCE = 5.0


@pytest.fixture(scope="module")
def pipeline():
    return DiffusionPipeline.from_pretrained(teacher_folder()).to(torch.float32)


@pytest.fixture(scope="module")
def xl_pipeline():
    return DiffusionPipeline.from_pretrained(teacher_folder(TEACHER_XL)).to(torch.float32)


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(TEACHER, tmp_path / "teacher")


@pytest.mark.parametrize(
    ("folder", "parts", "limit"),
    [
        (TEACHER, {"vae", "text_encoder", "unet"}, 12e6),
        (TEACHER_XL, {"vae", "text_encoder", "text_encoder_2", "unet"}, 14e6),
    ],
)
def test_the_bundled_weights_are_complete_and_small(folder, parts, limit):
    weights = json.loads((teacher_folder(folder) / CHECKSUMS).read_text())
    assert {name.split("/")[0] for name in weights} == parts
    assert sum((folder / name).stat().st_size for name in weights) <= limit


def test_the_bundled_teacher_has_the_blocks_of_sd(pipeline):
    config = pipeline.unet.config
    assert config.down_block_types == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert config.up_block_types == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    assert config.layers_per_block == 2
    assert config.mid_block_type == "UNetMidBlock2DCrossAttn"


def test_demo_xl_has_the_blocks_of_sdxl(xl_pipeline):
    """`find_pipeline` makes all checks of the family."""
    config = unet_config(find_pipeline("demo-xl", None, None))
    for key in ("down_block_types", "up_block_types", "layers_per_block", "use_linear_projection"):
        assert config[key] == ([*SDXL[key]] if isinstance(SDXL[key], tuple) else SDXL[key])
    assert config["mid_block_type"] == "UNetMidBlock2DCrossAttn"
    assert xl_pipeline.config.force_zeros_for_empty_prompt


def test_every_student_of_sdxl_can_be_made_from_demo_xl(xl_pipeline):
    config, weights = dict(xl_pipeline.unet.config), xl_pipeline.unet.state_dict()
    for level in levels_xl.LEVELS:
        student = meta_student(config, level)
        assert student_weights(shapes_of(student), weights, level)
        assert student.num_parameters() < 0.9 * xl_pipeline.unet.num_parameters()


def test_ssd_1b_and_vega_differ_with_demo_xl(xl_pipeline):
    configs = [student_config(dict(xl_pipeline.unet.config), level) for level in ("ssd_1b", "vega")]
    assert configs[0]["transformer_layers_per_block"] == [1, [2, 2], [3, 3]]
    assert configs[1]["transformer_layers_per_block"] == [1, [1, 1], [2, 2]]


@pytest.mark.parametrize("level", LEVELS)
def test_every_student_can_be_made_from_the_bundled_teacher(pipeline, level):
    teacher = pipeline.unet
    student = UNet2DConditionModel.from_config(student_config(dict(teacher.config), level))
    shapes = {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}
    student.load_state_dict(student_weights(shapes, teacher.state_dict(), level), strict=True)
    inputs = torch.zeros(1, 4, 16, 16), torch.zeros(1), torch.zeros(1, 24, teacher.config.cross_attention_dim)
    with Taps(student, [name for name, _ in LEVELS[level].taps]).recording() as student_outputs, torch.no_grad():
        student(*inputs)
    teacher_taps = Taps(teacher, [name for _, name in LEVELS[level].taps])
    with teacher_taps.recording() as teacher_outputs, torch.no_grad():
        teacher(*inputs)
    teacher_taps.remove()
    for student_name, teacher_name in LEVELS[level].taps:
        assert student_outputs[student_name].shape == teacher_outputs[teacher_name].shape


def test_the_bundled_teacher_follows_captions(pipeline):
    captions = captions_of("train", 8)
    generated = generate(pipeline, captions, Sampler(steps=12, guidance_scale=BEST_GUIDANCE), "test")
    assert judge(generated.images, captions).score >= FLOOR


def test_demo_xl_follows_captions(xl_pipeline):
    captions = captions_of("train", 4)
    generated = generate(xl_pipeline, captions, Sampler(steps=8, guidance_scale=BEST_GUIDANCE), "test")
    assert judge(generated.images, captions).score >= FLOOR


def test_the_oracle_still_finds_the_facts_after_the_autoencoder(pipeline):
    scenes = [make_scene(11, index, "train" if index % 2 else "heldout") for index in range(60)]
    pixels = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.inference_mode():
        decoded = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mean).sample
    images = pipeline.image_processor.postprocess(decoded)
    assert judge(images, [scene.caption for scene in scenes]).score >= 0.97


def test_the_table_has_one_line_per_split_and_guidance(pipeline, monkeypatch):
    monkeypatch.setattr("pipeline.demo.evaluate.STEPS", 1)
    scores = evaluate(pipeline, 1, (1.0, 2.0))
    assert list(scores) == [("train", 1.0), ("train", 2.0), ("heldout", 1.0), ("heldout", 2.0)]
    lines = table(scores).splitlines()
    assert len(lines) == 6
    assert lines[2].startswith("| train | 1 | 1 | ")


@pytest.mark.parametrize("name", [UNET, CHECKSUMS])
def test_a_missing_file_names_itself_and_the_command(copy, name):
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing.*`distill-sd demo-teacher`"):
        teacher_folder(copy)


@pytest.mark.parametrize(("name", "problem"), [(UNET, "was changed"), (CHECKSUMS, "cannot be read")])
def test_a_truncated_file_names_itself_and_the_command(copy, name, problem):
    complete = (copy / name).read_bytes()
    (copy / name).write_bytes(complete[: len(complete) // 2])
    with pytest.raises(UserError, match=f"is damaged: {name} {problem}.*`distill-sd demo-teacher`"):
        teacher_folder(copy)


@pytest.mark.parametrize("listing", ["{}", "[]"])
def test_checksums_that_list_no_files_are_refused(copy, listing):
    (copy / CHECKSUMS).write_text(listing)
    with pytest.raises(UserError, match="is damaged: checksums.json lists no files.*`distill-sd demo-teacher`"):
        teacher_folder(copy)


def train(out, work, *more):
    return CliRunner().invoke(main, ["demo-teacher", *TRAINING, "--out", str(out), "--work", str(work), *more])


def test_the_command_makes_a_teacher_that_loads(tmp_path):
    result = train(tmp_path / "teacher", tmp_path / "work")
    assert result.exit_code == 0, result.output
    made = DiffusionPipeline.from_pretrained(teacher_folder(tmp_path / "teacher"))
    weights, checksums = tmp_path / "teacher" / UNET, tmp_path / "teacher" / CHECKSUMS
    assert weights.stat().st_mode == checksums.stat().st_mode
    assert made.vae.config.scaling_factor != 1
    assert made.unet.dtype == torch.float32


def test_an_sdxl_trained_from_the_other_teacher_keeps_its_autoencoder_and_trains_its_networks(tmp_path):
    rates = ("--learning-rate", "0.1", "--text-learning-rate", "0.1")
    changes = ("--name", "demo-xl", "--init-from", str(TEACHER), *rates, "--checkpoint-every", "9")
    result = train(tmp_path / "teacher", tmp_path / "work", *changes)
    assert result.exit_code == 0, result.output
    initial, made = (DiffusionPipeline.from_pretrained(folder) for folder in (TEACHER, tmp_path / "teacher"))
    assert isinstance(made, StableDiffusionXLPipeline)
    assert torch.equal(made.vae.decoder.conv_in.weight, initial.vae.decoder.conv_in.weight)
    change = made.unet.conv_in.weight - initial.unet.conv_in.weight
    assert 0 < change.abs().max() < 0.01
    change = made.text_encoder.get_input_embeddings().weight - initial.text_encoder.get_input_embeddings().weight
    assert 0 < change.abs().max() < 0.01


def test_an_sdxl_takes_over_what_it_can_of_the_other_teachers_unet(pipeline):
    """And it begins by adding nothing: transformer blocks and conditioning that the other lacks close with zeros."""
    unet, other = networks_xl.make_unet(), pipeline.unet.state_dict()
    networks_xl.take_over(unet, other)
    weights = unet.state_dict()
    taken = {
        "down_blocks.1.resnets.0.conv1.weight": "down_blocks.1.resnets.0.conv1.weight",
        "up_blocks.0.resnets.2.conv1.weight": "up_blocks.1.resnets.2.conv1.weight",
        "mid_block.attentions.0.proj_in.weight": "mid_block.attentions.0.proj_in.weight",
    }
    for name, source in taken.items():
        assert torch.equal(weights[name].flatten(), other[source].flatten())
    second = unet.mid_block.attentions[0].transformer_blocks[1]
    states, prompts = torch.randn(1, 16, 80), torch.randn(1, 24, 144)
    with torch.no_grad():
        assert torch.equal(second(states, encoder_hidden_states=prompts), states)
        assert not unet.add_embedding(torch.randn(1, 160)).any()
    networks_xl.take_over(networks_xl.make_unet(), weights)


def test_a_folder_that_is_not_a_demo_teacher_is_refused_as_the_initial_one(tmp_path, copy):
    (copy / UNET).unlink()
    result = train(tmp_path / "new", tmp_path / "work", "--init-from", str(copy))
    assert result.exit_code == 2
    assert f"--init-from {copy} is not a demo teacher" in result.output


def test_a_work_folder_with_other_settings_is_refused(tmp_path):
    (tmp_path / "settings.json").write_text('{"seed": 7}')
    result = train(tmp_path / "teacher", tmp_path)
    assert result.exit_code == 2
    assert "seed 7, now 0" in result.output


def test_resumed_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    assert train(tmp_path / "uninterrupted", tmp_path / "work 1").exit_code == 0
    update = Trainer.update

    def stop_after_one_step(self, loss):
        update(self, loss)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "update", stop_after_one_step)
    for _ in range(6):
        assert train(tmp_path / "resumed", tmp_path / "work 2").exit_code == 130
    assert train(tmp_path / "resumed", tmp_path / "work 2").exit_code == 0
    assert (tmp_path / "resumed" / CHECKSUMS).read_text() == (tmp_path / "uninterrupted" / CHECKSUMS).read_text()

"""SDXL checkpoints in one file: their kind is found out, and each tensor is the file's own."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from support.few_merges import text_config, write_few
from support.stages import run_encode, shard_files
from support.tiny import tiny_xl_pipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from pipeline.models import single_file, tokenizer
from pipeline.models.families import sdxl_configs
from pipeline.models.families.sdxl import SDXL
from pipeline.models.families.sdxl_single_file import pipeline_weights
from pipeline.models.load import find_pipeline, load_base, load_unet
from pipeline.models.students import initialised_student, meta_student
from pipeline.system.errors import UserError

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
UNET = "model.diffusion_model."


def with_clip_tokens():
    """The tiny SDXL with text encoders for the tokens of the first of CLIP's merges."""
    pipe = tiny_xl_pipeline()
    for part, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        config = {**getattr(pipe, part).config.to_dict(), **text_config()}
        torch.manual_seed(4)
        pipe.register_modules(**{part: kind(CLIPTextConfig(**config)).eval()})
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return with_clip_tokens()


@pytest.fixture(scope="module")
def small_configs(pipe):
    """SDXL's configs with the tiny pipeline's sizes."""
    networks = {part: getattr(pipe, part).config for part in PARTS}
    plain = {
        f"{part}/config.json": config.to_dict() if hasattr(config, "to_dict") else dict(config)
        for part, config in networks.items()
    }
    return {name: {**config, **plain.get(name, {})} for name, config in sdxl_configs.CONFIGS.items()}


@pytest.fixture(scope="module")
def few_merges(tmp_path_factory):
    return write_few(tmp_path_factory.mktemp("merges"))


@pytest.fixture(autouse=True)
def _small(tmp_path, monkeypatch, small_configs, few_merges):
    """These configs and merges, and a cache of this test's own."""
    monkeypatch.setattr(tokenizer, "MERGES", few_merges)
    monkeypatch.setattr(sdxl_configs, "CONFIGS", small_configs)
    monkeypatch.setattr(single_file, "CONVERTED", tmp_path / "converted")


def write(pipe, file, dtype=torch.float32, metadata=None, **more):
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in pipeline_weights(pipe).items()}
    save_file({**tensors, **more}, file, metadata)
    return file


def found(file):
    folder = find_pipeline(str(file), None, None)
    return folder, load_base(folder, None, load_unet(folder, None))


@pytest.mark.parametrize("level", [None, "ssd_1b", "koala_700m"])
def test_teachers_and_students_are_found_out_and_have_the_files_weights(tmp_path, level, pipe, capsys):
    unet = pipe.unet
    if level:
        made = with_clip_tokens()
        made.register_modules(unet=initialised_student(dict(unet.config), unet.state_dict(), level))
        pipe = made
    folder, read = found(write(pipe, tmp_path / "x.safetensors"))
    assert (f"SDXL, a student of the shape of {level}" if level else "(SDXL)") in capsys.readouterr().err
    for part in PARTS:
        expected = getattr(pipe, part).state_dict()
        for name, tensor in getattr(read, part).state_dict().items():
            assert torch.equal(tensor, expected[name]), f"{part}.{name}"
    assert (read.tokenizer.pad_token, read.tokenizer_2.pad_token) == ("<|endoftext|>", "!")
    assert read.config.force_zeros_for_empty_prompt
    assert read.vae.config.force_upcast


@pytest.mark.parametrize(
    ("metadata", "more", "expected"),
    [
        ({}, {}, ("epsilon", False)),
        ({"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"}, {}, ("v_prediction", True)),
        ({}, {"v_pred": torch.zeros(0)}, ("v_prediction", False)),
        ({}, {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, ("v_prediction", True)),
    ],
)
def test_the_schedule_is_what_the_file_states(tmp_path, pipe, metadata, more, expected):
    folder, read = found(write(pipe, tmp_path / "x.safetensors", torch.float16, metadata, **more))
    config = read.scheduler.config
    assert (config.prediction_type, bool(config.get("rescale_betas_zero_snr"))) == expected
    assert config.timestep_spacing == ("trailing" if expected[1] else "leading")
    # The marks are not in half precision, and they are no weights.
    unet = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in unet.values()} == {torch.float16}


def without(prefix):
    return lambda tensors: {name: t for name, t in tensors.items() if not name.startswith(prefix)}


def having(**more):
    return lambda tensors: {**tensors, **{name.replace("__", "."): tensor for name, tensor in more.items()}}


REFUSED = {
    "it is SDXL's refiner. Use the base model": lambda t: {**t, "conditioner.embedders.0.model.x": torch.zeros(1)},
    "it has edm_vpred.sigma_max, as EDM models such as CosXL": having(edm_vpred__sigma_max=torch.zeros(1)),
    "it has edm_mean, as EDM models such as CosXL and Playground": having(edm_mean=torch.zeros(4)),
    "it holds no U-Net": without(UNET),
    "it holds no VAE": without("first_stage_model."),
    "it holds no first text encoder": without("conditioner.embedders.0."),
    "it holds no second text encoder": without("conditioner.embedders.1."),
    "takes 9 input channels": lambda t: {**t, f"{UNET}input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)},
    "has the shape of neither SDXL nor one of its students": without(f"{UNET}middle_block.2."),
    "lacks conditioner.embedders.1.model.text_projection": without("conditioner.embedders.1.model.text_projection"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_complete_sdxl_is_refused_with_the_reason(tmp_path, pipe, message):
    tensors = load_file(write(pipe, tmp_path / "x.safetensors"))
    save_file(REFUSED[message](tensors), tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=message):
        find_pipeline(str(tmp_path / "bad.safetensors"), None, None)


def test_the_stages_write_what_they_write_from_the_folder(tmp_path, pipe, images):
    file = write(pipe, tmp_path / "x.safetensors")
    folder = find_pipeline(str(file), None, None)
    from_file = run_encode(file, images, tmp_path / "from-file")
    assert shard_files(from_file) == shard_files(run_encode(folder, images, tmp_path / "from-folder"))


PARAMETERS = {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840}


def test_files_of_the_real_architecture_are_told_apart_by_their_shapes(monkeypatch):
    """Counted, and identified, on the meta device."""
    monkeypatch.undo()
    configs = {part: sdxl_configs.CONFIGS[f"{part}/config.json"] for part in PARTS}
    with torch.device("meta"):
        teacher = UNet2DConditionModel.from_config(configs["unet"])
        pipe = SimpleNamespace(
            unet=teacher,
            vae=AutoencoderKL.from_config(configs["vae"]),
            text_encoder=CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**configs["text_encoder_2"])),
        )
    counts = {part: sum(p.numel() for p in getattr(pipe, part).parameters()) for part in PARTS}
    assert counts == PARAMETERS
    for unet, what in ((teacher, "SDXL"), (meta_student(dict(teacher.config), "ssd_1b"), "of the shape of ssd_1b")):
        pipe.unet = unet
        shapes = {name: tuple(tensor.shape) for name, tensor in pipeline_weights(pipe).items()}
        assert SDXL.single_file_configs(shapes, {})[0].endswith(what)

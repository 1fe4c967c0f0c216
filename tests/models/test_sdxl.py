"""SDXL's conditioning against diffusers' own, and pipelines that are not SDXL's base model."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from support.edited import change_json
from support.stages import read_entries, run_encode, run_teacher_cache
from support.tiny import tiny_xl_pipeline, write_images

from pipeline.cache.latents_writer import frame_of, of_image
from pipeline.data.images import Crop
from pipeline.data.loading import LoadedImage
from pipeline.data.records import Record
from pipeline.models.families import denoise
from pipeline.models.families.sdxl import SDXL
from pipeline.models.load import find_pipeline, load_base, load_unet
from pipeline.models.schedule import load_noise_scheduler
from pipeline.system.errors import UserError
from shards.manifest import read_manifest
from shards.store import open_store

CAPTIONS = ["a cat", "", "abc def ghi jkl mno"]


@pytest.fixture
def model(xl_teacher, tmp_path):
    """A copy of the tiny SDXL, to be changed."""
    return shutil.copytree(xl_teacher, tmp_path / "model")


@pytest.mark.parametrize("zeros", [True, False])
def test_prompts_are_encoded_as_diffusers_does_and_the_empty_one_as_the_pipeline_says(model, zeros):
    change_json(model / "model_index.json", force_zeros_for_empty_prompt=zeros)
    pipe = StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False)
    base = load_base(model)
    with torch.no_grad():
        found = SDXL.encode_prompts(base, CAPTIONS)
        prompts, empty, pooled, empty_pooled = pipe.encode_prompt(CAPTIONS)
    for name, expected, unconditional in (
        ("prompt_embeds", prompts, empty),
        ("pooled_prompt_embeds", pooled, empty_pooled),
    ):
        assert torch.equal(found[name][0], expected[0])
        assert torch.equal(found[name][2], expected[2])
        assert torch.equal(found[name][1], unconditional[1])
        assert bool(unconditional.any()) is not zeros
    assert SDXL.count_truncated(base, CAPTIONS) == 1


def test_the_shapes_are_read_from_configs_alone(model):
    for path in [*model.glob("*/*.safetensors"), *model.glob("*/*.bin")]:
        path.unlink()
    shapes = {"prompt_embeds": (8, 18), "pooled_prompt_embeds": (12,), "time_ids": (6,)}
    assert SDXL.conditioning_shapes(find_pipeline(str(model), None, None)) == shapes


def test_the_numbers_are_those_of_an_image_that_was_flipped_before_it_was_cropped(xl_teacher, tmp_path):
    """Cropped where time_ids say, the flipped and resized image has the pixels whose latents are stored."""
    data = write_images(tmp_path / "images", 12)
    out = run_encode(xl_teacher, data, tmp_path / "latents", random_flip=True)
    entries = read_entries(out, "latents", ["time_ids"])
    flips = [entry.meta["crop"]["flip"] for entry in entries]
    assert len(set(flips)) == 2
    for entry in entries:
        numbers, crop = entry.tensors["time_ids"].values, entry.meta["crop"]
        assert numbers.dtype == np.int32
        image = Image.open(data / entry.meta["source_id"])
        assert tuple(numbers[:2]) == (image.height, image.width)
        assert tuple(numbers[4:]) == (32, 32)
        scaled = np.asarray(image.resize(crop["resized"], Image.Resampling.BILINEAR))
        first = scaled[:, ::-1] if crop["flip"] else scaled
        top, left = numbers[2:4]
        stored = scaled[crop["top"] : crop["top"] + 32, crop["left"] : crop["left"] + 32]
        np.testing.assert_array_equal(
            first[top : top + 32, left : left + 32], stored[:, ::-1] if crop["flip"] else stored
        )


def test_large_numbers_are_exact():
    crop = Crop((12_345, 4_099), (3_084, 1_024), 2_051, 0, False)
    assert frame_of(crop, (1_024, 1_024)).corner == (0, 2_051)
    image = LoadedImage(0, Record("a", "a", "a"), np.zeros((1_024, 1_024, 3), np.uint8), crop)
    stored = of_image(image, SDXL)["time_ids"]
    assert stored.tolist() == [4_099, 12_345, 0, 2_051, 1_024, 1_024]
    flipped = Crop((12_345, 4_099), (3_084, 1_024), 2_051, 0, True)
    assert frame_of(flipped, (1_024, 1_024)).corner == (0, 3_084 - 1_024 - 2_051)


def test_a_u_net_in_half_precision_gets_exact_numbers(xl_teacher):
    unet, given = load_unet(xl_teacher, None).to(torch.bfloat16), {}
    unet.add_time_proj.register_forward_hook(lambda module, inputs, output: given.update(numbers=inputs[0]))
    conditioning = {
        "prompt_embeds": torch.randn(1, 8, 18),
        "pooled_prompt_embeds": torch.randn(1, 12),
        "time_ids": torch.tensor([[4_099, 12_345, 0, 2_051, 1_024, 1_024]], dtype=torch.int32),
    }
    denoise(unet, torch.randn(1, 4, 16, 16), torch.tensor([5]), conditioning, SDXL)
    assert given["numbers"].tolist() == [4_099, 12_345, 0, 2_051, 1_024, 1_024]


def test_the_spec_states_the_family_and_what_is_stored(xl_teacher, images, tmp_path):
    out = run_encode(xl_teacher, images, tmp_path / "latents")
    spec = read_manifest(open_store(out)).spec
    assert spec["family"] == "sdxl"
    assert (spec["time_ids_shape"], spec["time_ids_dtype"]) == ([6], "int32")
    assert (spec["prompt_embeds_shape"], spec["pooled_prompt_embeds_shape"]) == ([8, 18], [12])
    assert {"text_encoder_sha256", "text_encoder_2_sha256", "tokenizer_sha256", "tokenizer_2_sha256"} <= spec.keys()
    assert {path.name for path in out.glob("empty_*")} == {"empty_prompt_embeds.npy", "empty_pooled_prompt_embeds.npy"}
    assert not np.load(out / "empty_prompt_embeds.npy").any()


@pytest.fixture
def overflowing(model):
    """An SDXL whose VAE has activations beyond fp16's 65,504, and small latents all the same."""
    pipe = StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False)
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.mul_(1e6)
        pipe.vae.encoder.conv_in.bias.mul_(1e6)
    pipe.save_pretrained(model)
    return model


def test_a_vae_that_overflows_in_fp16_runs_in_fp32_if_its_config_says_so(overflowing, tmp_path):
    data = write_images(tmp_path / "images", 2)
    out = run_encode(overflowing, data, tmp_path / "half", dtype="fp16")
    assert read_manifest(open_store(out)).spec["vae_dtype"] == "fp32"
    exact = read_entries(run_encode(overflowing, data, tmp_path / "full"), "latents", ["latents"])
    for half, full in zip(read_entries(out, "latents", ["latents"]), exact, strict=True):
        np.testing.assert_array_equal(half.tensors["latents"].values, full.tensors["latents"].values)


def test_without_the_config_saying_so_the_image_and_the_remedy_are_named(overflowing, tmp_path):
    change_json(overflowing / "vae/config.json", force_upcast=False)
    data = write_images(tmp_path / "images", 2)
    message = "the latents of 000.png contain NaN or Inf in fp16, or do not fit in fp16. Run with --dtype fp32"
    with pytest.raises(UserError, match=message):
        run_encode(overflowing, data, tmp_path / "out", dtype="fp16")


REFUSED = [
    ("model_index.json", {"requires_aesthetics_score": True}, "requires_aesthetics_score, which SDXL's refiner has"),
    ("model_index.json", {"text_encoder_2": [None, None]}, "it has no text_encoder_2. Use a complete pipeline of SDXL"),
    ("model_index.json", {"scheduler": ["diffusers", "EDMEulerScheduler"]}, "no schedule of betas, as flow matching"),
    ("scheduler/scheduler_config.json", {"_class_name": "EDMDPMSolverMultistepScheduler"}, "as flow matching and EDM"),
    ("scheduler/scheduler_config.json", {"timestep_type": "continuous"}, "as EDM models such as CosXL have"),
    (
        "unet/config.json",
        {"addition_embed_type": "text"},
        "addition_embed_type of its U-Net is 'text', not 'text_time'",
    ),
    ("unet/config.json", {"time_cond_proj_dim": 16}, "as latent consistency models do: time_cond_proj_dim is 16"),
    (
        "unet/config.json",
        {"projection_class_embeddings_input_dim": 32},
        "is 32, which SDXL's refiner has. Use the base",
    ),
    ("unet/config.json", {"projection_class_embeddings_input_dim": 40}, "numbers of an image take 36"),
    ("unet/config.json", {"addition_time_embed_dim": None}, "addition_time_embed_dim of its U-Net is None"),
    (
        "unet/config.json",
        {"cross_attention_dim": 20},
        "two text encoders together have width 18, but its U-Net takes 20",
    ),
    ("unet/config.json", {"in_channels": 9}, "in_channels of its U-Net are 9, but its VAE's latents have 4"),
    ("unet/config.json", {"sample_size": "16"}, "sample_size in its unet/config.json is '16', not a positive"),
    (
        "vae/config.json",
        {"latents_mean": [0, 0, 0, 0]},
        "latents_mean in its vae/config.json is [0, 0, 0, 0], which SDXL",
    ),
    ("text_encoder_2/config.json", {"model_type": "bert"}, "its text encoder 2 is a 'bert'"),
    ("text_encoder_2/config.json", {"projection_dim": 20}, "take 44. Use the text encoders"),
    ("text_encoder_2/config.json", {"vocab_size": 53}, "its tokenizer 2 has the token '<|endoftext|>' with number 53"),
    ("tokenizer_2/tokenizer_config.json", {"model_max_length": 7}, "prompts of 8 and of 7 tokens"),
]


@pytest.mark.parametrize(("path", "changes", "problem"), REFUSED)
def test_what_is_no_base_model_of_sdxl_is_refused_in_a_sentence(model, path, changes, problem):
    file = model / path
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError) as caught:
        find_pipeline(str(model), None, None)
    assert problem in str(caught.value)
    assert str(model) in str(caught.value)


def test_pipelines_that_share_the_parts_are_taken(model):
    for name in ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"):
        change_json(model / "model_index.json", _class_name=name)
        assert isinstance(load_base(find_pipeline(str(model), None, None)), StableDiffusionXLPipeline)


def test_zero_terminal_snr_goes_with_v_prediction_alone(model):
    path = model / "scheduler/scheduler_config.json"
    change_json(path, rescale_betas_zero_snr=True)
    with pytest.raises(UserError, match=f"{path} has prediction type epsilon and a terminal SNR of zero"):
        load_noise_scheduler(model, None)
    assert load_noise_scheduler(model, "v_prediction").alphas_cumprod[-1] == 0
    change_json(path, prediction_type="v_prediction")
    assert load_noise_scheduler(model, None).alphas_cumprod[-1] == 0


def test_another_end_token_is_another_text_encoder(model, images, tmp_path):
    """The pooled prompt is read at the end token, which the config states."""
    run_encode(model, images, tmp_path / "latents", shard_range="0:1")
    change_json(model / "text_encoder_2/config.json", eos_token_id=3)
    with pytest.raises(ValueError, match="configs.text_encoder_2.eos_token_id"):
        run_encode(model, images, tmp_path / "latents")


def test_levels_and_latents_of_another_family_are_refused(xl_teacher, teacher, images, tmp_path):
    latents = run_encode(xl_teacher, images, tmp_path / "latents")
    with pytest.raises(
        UserError, match=r"sd_small is a student of SD-1.x and SD-2.x, and --teacher .* is of SDXL\. Choose"
    ):
        run_teacher_cache(xl_teacher, latents, tmp_path / "cache", students=("sd_small",))
    with pytest.raises(UserError, match=r"encoded with a pipeline of SDXL, and --teacher .* is of SD-1.x and SD-2.x\."):
        run_teacher_cache(teacher, latents, tmp_path / "cache")


def test_the_miniature_is_an_sdxl_for_diffusers():
    pipe = tiny_xl_pipeline()
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a cat", num_inference_steps=1).images[0].size == (32, 32)

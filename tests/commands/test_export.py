"""distill-sd export: other programs load the model that was exported; and what the command refuses."""

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from support.stages import pruned_pipeline, reset_accelerate
from support.tiny import SD_BLOCKS, tiny_pipeline
from transformers import CLIPTextModelWithProjection

from pipeline.cli import main
from pipeline.commands import export
from pipeline.models.families.sd import SD
from pipeline.models.levels.sd import LEVELS
from pipeline.system.extras import install_command

PARTS = ("unet", "vae", "text_encoder")


def run(model, format, out, *options):
    arguments = ["export", "--model", str(model), "--format", format, "--out", str(out), *map(str, options)]
    result = CliRunner().invoke(main, arguments)
    reset_accelerate()
    return result


def exported(model, format, out, *options):
    result = run(model, format, out, *options)
    assert result.exit_code == 0, result.output
    return result.output


def save(pipe, folder):
    pipe.save_pretrained(folder)
    return folder


def read_back(file, folder):
    return StableDiffusionPipeline.from_single_file(str(file), config=str(folder), local_files_only=True)


def keys(file):
    with safe_open(file, "pt") as opened:
        return set(opened.keys())


def header(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def assert_same_weights(left, right):
    for name in PARTS:
        left_weights, right_weights = getattr(left, name).state_dict(), getattr(right, name).state_dict()
        assert left_weights.keys() == right_weights.keys()
        for key in left_weights:
            assert torch.equal(left_weights[key], right_weights[key]), f"{name}.{key}"


@pytest.mark.parametrize("level", [None, *LEVELS])
def test_a_single_file_of_every_level_is_loaded_back_bit_for_bit(tmp_path, level):
    pipe = pruned_pipeline(level, **SD_BLOCKS) if level else tiny_pipeline(**SD_BLOCKS)
    folder = save(pipe, tmp_path / "student")
    exported(folder, "single-file", tmp_path / "student.safetensors")
    assert_same_weights(pipe, read_back(tmp_path / "student.safetensors", folder))


def test_a_single_file_generates_the_same_image(tmp_path):
    folder = save(pruned_pipeline("sd_tiny"), tmp_path / "student")
    exported(folder, "single-file", tmp_path / "out" / "student.safetensors")
    pipes = [DiffusionPipeline.from_pretrained(folder), read_back(tmp_path / "out" / "student.safetensors", folder)]
    images = [
        pipe("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
        for pipe in pipes
    ]
    np.testing.assert_array_equal(*images)


def test_the_names_are_those_of_the_original_checkpoints(tmp_path):
    """For a complete U-Net, with the names by which programs recognise the architecture of a file."""
    folder = save(tiny_pipeline(**SD_BLOCKS), tmp_path / "teacher")
    exported(folder, "single-file", tmp_path / "teacher.safetensors")
    assert keys(tmp_path / "teacher.safetensors") >= {
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.input_blocks.3.0.op.weight",
        "model.diffusion_model.middle_block.2.out_layers.3.weight",
        "model.diffusion_model.output_blocks.2.1.conv.weight",
        "model.diffusion_model.output_blocks.5.2.conv.weight",
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight",
        "model.diffusion_model.out.2.weight",
        "first_stage_model.decoder.up.0.block.1.conv1.weight",
        "first_stage_model.encoder.mid.attn_1.proj_out.weight",
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
    }


@pytest.mark.parametrize("level", ["sd_small", "bk_tiny"])
def test_sd2_gets_its_own_text_encoder_layout(tmp_path, level):
    pipe = pruned_pipeline(level, **SD_BLOCKS, use_linear_projection=True, attention_head_dim=[1, 2, 2, 2])
    pipe.text_encoder.config.hidden_act = "gelu"
    folder = save(pipe, tmp_path / "student")
    exported(folder, "single-file", tmp_path / "student.safetensors")
    assert header(tmp_path / "student.safetensors")["modelspec.architecture"] == "stable-diffusion-v2-512"
    assert "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight" in keys(
        tmp_path / "student.safetensors"
    )
    assert_same_weights(pipe, read_back(tmp_path / "student.safetensors", folder))


def test_half_precision_is_half_the_size(tmp_path):
    pipe = pruned_pipeline("sd_tiny")
    folder = save(pipe, tmp_path / "student")
    exported(folder, "single-file", tmp_path / "fp16.safetensors", "--dtype", "fp16")
    assert_same_weights(pipe.to(torch.float16), read_back(tmp_path / "fp16.safetensors", folder).to(torch.float16))
    with safe_open(tmp_path / "fp16.safetensors", "pt") as opened:
        assert {opened.get_tensor(key).dtype for key in opened.keys()} == {torch.float16}  # noqa: SIM118


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory):
    """A pipeline whose U-Net is shallow, as tracing takes the longer the more blocks there are."""
    pipe = tiny_pipeline(
        block_out_channels=(8, 12),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        mid_block_type=None,
    )
    return pipe, save(pipe, tmp_path_factory.mktemp("two") / "student")


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("fp16", 1e-2)])
def test_onnx_graphs_match_torch_at_any_size(two_stages, tmp_path, dtype, tolerance):
    """With the inputs, outputs and files that optimum's ORTStableDiffusionPipeline looks for."""
    import onnxruntime

    pipe, folder = two_stages
    output = exported(folder, "onnx", tmp_path / "onnx", "--dtype", dtype)
    assert "Largest differences from torch's outputs (and the largest outputs): text_encoder" in output
    parts = {"unet", "text_encoder", "vae_encoder", "vae_decoder"}
    assert {path.parent.name for path in (tmp_path / "onnx").glob("*/model.onnx")} == parts
    assert {path.name for path in (tmp_path / "onnx").iterdir()} - parts == {
        "model_index.json",
        "scheduler",
        "tokenizer",
    }
    assert UNet2DConditionModel.load_config(tmp_path / "onnx" / "unet")["layers_per_block"] == 1
    kind = torch.float16 if dtype == "fp16" else torch.float32
    for batch, height, width, tokens in ((1, 16, 16, 8), (3, 10, 24, 5)):
        generator = torch.Generator().manual_seed(batch)
        latents = torch.randn(batch, 4, height, width, generator=generator)
        prompts = torch.randn(batch, tokens, 10, generator=generator)
        image = torch.randn(batch, 3, 2 * height, 2 * width, generator=generator)
        ids = torch.randint(50, (batch, 8), generator=generator)
        timestep = torch.tensor(501.5)
        named = {"sample": latents.to(kind), "timestep": timestep, "encoder_hidden_states": prompts.to(kind)}
        with torch.no_grad():
            text = pipe.text_encoder(ids, output_hidden_states=True)
            cases = [
                ("unet", named, {"out_sample": pipe.unet(latents, timestep, prompts).sample}),
                ("vae_encoder", {"sample": image.to(kind)}, {"latent_parameters": pipe.vae._encode(image)}),
                ("vae_decoder", {"latent_sample": latents.to(kind)}, {"sample": pipe.vae.decode(latents).sample}),
                (
                    "text_encoder",
                    {"input_ids": ids},
                    {
                        "last_hidden_state": text.last_hidden_state,
                        "pooler_output": text.pooler_output,
                        "hidden_states.0": text.hidden_states[0],
                        "hidden_states.1": text.hidden_states[1],
                    },
                ),
            ]
        for part, inputs, expected in cases:
            session = onnxruntime.InferenceSession(tmp_path / "onnx" / part / "model.onnx")
            assert [given.name for given in session.get_inputs()] == list(inputs)
            assert [given.name for given in session.get_outputs()] == list(expected)
            found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
            for array, tensor in zip(found, expected.values(), strict=True):
                np.testing.assert_allclose(array, tensor.numpy(), atol=tolerance, rtol=tolerance, err_msg=part)


def test_int8_is_a_pipeline_and_its_error_is_reported(tmp_path):
    folder = save(pruned_pipeline("sd_small"), tmp_path / "student")
    output = exported(folder, "int8", tmp_path / "int8")
    plain = DiffusionPipeline.from_pretrained(folder)
    small = DiffusionPipeline.from_pretrained(tmp_path / "int8", torch_dtype=torch.float32)
    linear = [name for name, module in small.unet.named_modules() if isinstance(module, torch.nn.Linear)]
    assert linear
    for name in linear:
        weight = small.unet.get_submodule(name).weight
        assert weight.qdata.dtype == torch.int8, name
        # Symmetric, with 255 steps per row: rounding changes a weight by at most half a step.
        exact = plain.unet.get_submodule(name).weight
        bound = exact.abs().amax(dim=1, keepdim=True) / 127
        assert ((weight.dequantize() - exact).abs() <= bound * 0.51).all(), name
    latents, timesteps, conditioning = export.guided_step(plain, SD, 4, 16)
    with torch.no_grad():
        prompts = conditioning["prompt_embeds"]
        expected, found = (pipe.unet(latents, timesteps, prompts).sample for pipe in (plain, small))
    error = ((expected - found).square().mean() / expected.square().mean()).item()
    assert 0 < error < 1e-3
    row = next(line for line in output.splitlines() if line.startswith("| fp32, int8"))
    assert float(row.split("|")[3]) == pytest.approx(error, rel=0.05)
    assert small("a cat", num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)


def test_an_existing_file_is_left_alone(teacher, tmp_path):
    (tmp_path / "x.safetensors").write_text("mine")
    result = run(teacher, "single-file", tmp_path / "x.safetensors")
    assert result.exit_code == 2
    assert "already exists. Choose another name" in result.output
    assert (tmp_path / "x.safetensors").read_text() == "mine"


@pytest.mark.parametrize(
    ("model", "format", "out", "options", "message"),
    [
        ("nowhere/at/all", "onnx", "out", [], "--model nowhere/at/all is not a folder"),
        (".", "int8", "out", [], "has no model_index.json. Use a checkpoint in diffusers layout"),
        ("teacher", "single-file", "out.ckpt", [], "does not end in .safetensors"),
        ("teacher", "onnx", "out", ["--dtype", "bf16"], "--dtype bf16 does not work with --format onnx"),
        ("teacher", "onnx", "out", ["--layout", "sdcpp"], "--layout sdcpp is one of --format single-file"),
        (
            "xl",
            "single-file",
            "out.safetensors",
            [],
            "it has no tokenizer_2. Use a complete pipeline of SDXL.",
        ),
        (
            "projecting",
            "single-file",
            "out.safetensors",
            [],
            "text_encoder in its model_index.json is transformers.CLIPTextModelWithProjection",
        ),
        (
            "deep",
            "single-file",
            "out.safetensors",
            [],
            "text encoder has 24 layers, of which diffusers would load only 23",
        ),
        (
            "embedding",
            "single-file",
            "out.safetensors",
            [],
            "its U-Net needs class labels",
        ),
    ],
)
def test_bad_input_ends_in_one_message(models, tmp_path, model, format, out, options, message):
    result = run(models.get(model, tmp_path if model == "." else model), format, tmp_path / out, *options)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def models(teacher, tmp_path_factory):
    """Pipelines that cannot be exported in every format, by the reason."""
    place = tmp_path_factory.mktemp("models")
    xl = shutil.copytree(teacher, place / "xl")
    index = json.loads((xl / "model_index.json").read_text())
    names = {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": index["text_encoder"]}
    (xl / "model_index.json").write_text(json.dumps({**index, **names}))
    projecting = tiny_pipeline()
    projecting.register_modules(text_encoder=CLIPTextModelWithProjection(projecting.text_encoder.config))
    deep = tiny_pipeline()
    deep.text_encoder.config.update({"hidden_act": "gelu", "num_hidden_layers": 24})
    deep.register_modules(text_encoder=type(deep.text_encoder)(deep.text_encoder.config))
    return {
        "teacher": teacher,
        "xl": xl,
        "projecting": save(projecting, place / "projecting"),
        "deep": save(deep, place / "deep"),
        "embedding": save(tiny_pipeline(num_class_embeds=3), place / "embedding"),
    }


@pytest.mark.parametrize(("format", "package"), [("onnx", "onnx"), ("int8", "torchao")])
def test_a_missing_package_is_named_with_its_extra(teacher, tmp_path, monkeypatch, format, package):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    result = run(teacher, format, tmp_path / "out")
    assert result.exit_code == 2
    assert f"--format {format} needs {package}. Run: {install_command(format)}" in result.output


def test_a_full_disk_is_noticed_before_anything_is_written(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.system.disk.free_bytes", lambda out: 1000)
    result = run(teacher, "single-file", tmp_path / "x.safetensors")
    assert result.exit_code == 2
    assert (
        "its disk has only 1 kB free. Free some space, choose an --out on another disk, or use --dtype fp16"
        in result.output
    )
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_finished_is_removed(teacher, tmp_path, monkeypatch):
    def full(weights, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    result = run(teacher, "single-file", tmp_path / "x.safetensors")
    assert result.exit_code == 2
    assert "No space left on device. Fix this and rerun the same command." in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("schedule", "stated", "advice"),
    [
        ({}, ("epsilon", "False"), None),
        ({"prediction_type": "v_prediction"}, ("v", "False"), "The model uses v-prediction, which many"),
        (
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            ("v", "True"),
            "The model uses v-prediction and zero terminal SNR, which many",
        ),
    ],
)
def test_a_single_file_says_how_the_model_is_to_be_sampled(tmp_path, schedule, stated, advice):
    pipe = tiny_pipeline()
    pipe.scheduler = DDIMScheduler(**schedule)
    output = exported(save(pipe, tmp_path / "model"), "single-file", tmp_path / "model.safetensors")
    metadata = header(tmp_path / "model.safetensors")
    assert (metadata["modelspec.prediction_type"], metadata["ss_zero_terminal_snr"]) == stated
    marks = {"v_pred": stated[0] == "v", "ztsnr": stated[1] == "True"}
    found = keys(tmp_path / "model.safetensors")
    assert {name: name in found for name in marks} == marks
    assert advice in output if advice else "The model uses" not in output
    assert_same_weights(pipe, read_back(tmp_path / "model.safetensors", tmp_path / "model"))


def test_a_single_file_names_the_model_its_kind_and_its_licence_in_the_same_bytes_each_time(tmp_path):
    folder = save(pruned_pipeline("sd_tiny"), tmp_path / "my-student")
    (folder / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n")
    for name in ("one", "two"):
        exported(folder, "single-file", tmp_path / f"{name}.safetensors")
    found = {name.removeprefix("modelspec."): value for name, value in header(tmp_path / "one.safetensors").items()}
    assert found == {
        "format": "pt",
        "sai_model_spec": "1.0.0",
        "architecture": "stable-diffusion-v1",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": "my-student",
        "resolution": "32x32",
        "prediction_type": "epsilon",
        "license": "creativeml-openrail-m",
        "ss_zero_terminal_snr": "False",
    }
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_a_tiny_student_is_exported_for_stable_diffusion_cpp(tmp_path):
    """With the weights of the usual layout under its other names; what it cannot read is refused."""
    folder = save(pruned_pipeline("sd_tiny", **SD_BLOCKS), tmp_path / "student")
    output = exported(folder, "single-file", tmp_path / "sd.safetensors", "--layout", "sdcpp")
    assert "It is for stable-diffusion.cpp." in output
    exported(folder, "single-file", tmp_path / "dense.safetensors")
    sdcpp, dense = load_file(tmp_path / "sd.safetensors"), load_file(tmp_path / "dense.safetensors")
    assert len(sdcpp) == len(dense)
    start = "model.diffusion_model."
    for name, usual in (("input_blocks.7.0.in_layers.2.bias", "input_blocks.5.0.in_layers.2.bias"),
                        ("output_blocks.2.1.conv.weight", "output_blocks.1.2.conv.weight"),
                        ("output_blocks.7.1.norm.weight", "output_blocks.5.1.norm.weight")):  # fmt: skip
        assert torch.equal(sdcpp[start + name], dense[start + usual])
    small = save(pruned_pipeline("sd_small"), tmp_path / "small")
    result = run(small, "single-file", tmp_path / "small.safetensors", "--layout", "sdcpp")
    assert result.exit_code == 2
    assert "--layout sdcpp: of the students of SD-1.x and SD-2.x, stable-diffusion.cpp reads those of" in result.output
    assert not (tmp_path / "small.safetensors").exists()


@pytest.mark.parametrize(
    ("channels", "kind", "how"),
    [
        (9, "StableDiffusionInpaintPipeline", "Load it with StableDiffusionInpaintPipeline.from_single_file"),
        (5, "StableDiffusionDepth2ImgPipeline", "diffusers loads no StableDiffusionDepth2ImgPipeline from"),
    ],
)
def test_another_pipeline_is_named_as_what_it_is(tmp_path, channels, kind, how):
    folder = save(tiny_pipeline(in_channels=channels), tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": kind}))
    assert how in exported(folder, "single-file", tmp_path / "m.safetensors")

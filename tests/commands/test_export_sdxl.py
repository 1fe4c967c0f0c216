"""SDXL in the formats of other programs: ONNX, int8 weights, and a single file that diffusers reads bit for bit."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from support.stages import reset_accelerate
from support.tiny import tiny_xl_pipeline

from pipeline.cli import main
from pipeline.export import onnx
from pipeline.models.levels.sdxl import LEVELS
from pipeline.models.students import initialised_student

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def exported(model, format, out, *options):
    arguments = ["export", "--model", model, "--format", format, "--out", out, *options]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    reset_accelerate()
    assert result.exit_code == 0, result.output
    return result.output


def saved(folder, level=None, **options):
    """A tiny SDXL with the untrained student of a level in its U-Net's place."""
    pipe = tiny_xl_pipeline(**options)
    if level:
        student = initialised_student(dict(pipe.unet.config), pipe.unet.state_dict(), level)
        pipe.register_modules(unet=student.eval())
    pipe.save_pretrained(folder)
    return pipe


def read_back(file, folder):
    return StableDiffusionXLPipeline.from_single_file(
        str(file), config=str(folder), local_files_only=True, add_watermarker=False
    )


def assert_same_weights(left, right):
    for name in PARTS:
        left_weights, right_weights = getattr(left, name).state_dict(), getattr(right, name).state_dict()
        assert left_weights.keys() == right_weights.keys()
        for key in left_weights:
            assert torch.equal(left_weights[key], right_weights[key]), f"{name}.{key}"


def keys(file):
    with safe_open(file, "pt") as opened:
        return set(opened.keys())


@pytest.mark.parametrize("level", [None, *LEVELS])
def test_a_single_file_of_every_level_is_loaded_back_bit_for_bit(tmp_path, level):
    pipe = saved(tmp_path / "model", level)
    output = exported(tmp_path / "model", "single-file", tmp_path / "model.safetensors")
    assert "Wrote U-Net, VAE and text encoders to" in output
    assert "StableDiffusionXLPipeline.from_single_file" in output
    assert_same_weights(pipe, read_back(tmp_path / "model.safetensors", tmp_path / "model"))


def test_a_single_file_generates_the_same_image(tmp_path):
    saved(tmp_path / "model", "ssd_1b")
    exported(tmp_path / "model", "single-file", tmp_path / "model.safetensors")
    pipes = (
        DiffusionPipeline.from_pretrained(tmp_path / "model"),
        read_back(tmp_path / "model.safetensors", tmp_path / "model"),
    )
    images = [
        pipe("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
        for pipe in pipes
    ]
    np.testing.assert_allclose(*images, atol=1e-5)


def test_the_names_are_those_of_the_original_checkpoints(tmp_path):
    saved(tmp_path / "model")
    exported(tmp_path / "model", "single-file", tmp_path / "model.safetensors")
    found = keys(tmp_path / "model.safetensors")
    assert found >= {
        "model.diffusion_model.label_emb.0.0.weight",
        "model.diffusion_model.label_emb.0.2.bias",
        "model.diffusion_model.input_blocks.3.0.op.weight",
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.2.attn2.to_k.weight",
        "model.diffusion_model.middle_block.1.proj_in.weight",
        "model.diffusion_model.output_blocks.2.2.conv.weight",
        "model.diffusion_model.output_blocks.5.2.conv.weight",
        "model.diffusion_model.output_blocks.8.0.skip_connection.weight",
        "first_stage_model.encoder.mid.attn_1.proj_out.weight",
        "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",
        "conditioner.embedders.1.model.positional_embedding",
        "conditioner.embedders.1.model.text_projection",
        "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight",
        "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_proj.bias",
    }
    assert not {name for name in found if name.startswith("cond_stage_model.")}


def test_an_ssd_1b_has_no_attention_in_its_middle(tmp_path):
    """By this, and by the second transformer block of output_blocks.3.1, programs know SSD-1B and Vega."""
    for level in ("ssd_1b", "vega"):
        saved(tmp_path / level, level)
        exported(tmp_path / level, "single-file", tmp_path / f"{level}.safetensors")
        found = keys(tmp_path / f"{level}.safetensors")
        assert not [name for name in found if name.startswith("model.diffusion_model.middle_block.1.")]
        start = "model.diffusion_model.output_blocks.3.1.transformer_blocks.1."
        assert any(name.startswith(start) for name in found) == (level == "ssd_1b")
        with safe_open(tmp_path / f"{level}.safetensors", "pt") as opened:
            kind = "segmind-stable-diffusion-1b" if level == "ssd_1b" else "stable-diffusion-xl-v1-base"
            assert opened.metadata()["modelspec.architecture"] == kind


@pytest.mark.parametrize(("zero_snr", "marks"), [(False, {"v_pred"}), (True, {"v_pred", "ztsnr"})])
def test_a_student_that_predicts_v_is_marked_for_other_programs(tmp_path, zero_snr, marks):
    pipe = saved(tmp_path / "model", "ssd_1b", prediction_type="v_prediction", zero_snr=zero_snr)
    exported(tmp_path / "model", "single-file", tmp_path / "model.safetensors")
    assert keys(tmp_path / "model.safetensors") & {"v_pred", "ztsnr"} == marks
    assert_same_weights(pipe, read_back(tmp_path / "model.safetensors", tmp_path / "model"))


def test_text_encoders_of_one_width_are_refused_with_the_reason(tmp_path):
    pipe = tiny_xl_pipeline(cross_attention_dim=20)
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(**{**pipe.text_encoder_2.config.to_dict(), "hidden_size": 10})
    pipe.register_modules(text_encoder_2=CLIPTextModelWithProjection(config))
    pipe.save_pretrained(tmp_path / "model")
    arguments = [
        "export",
        "--model",
        tmp_path / "model",
        "--format",
        "single-file",
        "--out",
        tmp_path / "x.safetensors",
    ]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 2
    assert "both text encoders have width 10, by which diffusers tells them apart" in result.output


def test_onnx_matches_torch_at_any_size(tmp_path):
    """With a U-Net of two stages, because the exporter's time grows with the number of blocks."""
    import onnxruntime

    pipe = saved(
        tmp_path / "model",
        block_out_channels=(8, 12),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        transformer_layers_per_block=1,
        layers_per_block=1,
        mid_block_type=None,
    )
    output = exported(tmp_path / "model", "onnx", tmp_path / "onnx")
    assert "Its output differs from torch's by at most" in output
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    names = ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"]
    assert [given.name for given in session.get_inputs()] == names
    unet = pipe.unet.eval()
    shapes = {"pooled_prompt_embeds": (12,), "time_ids": (6,)}
    for batch, size, tokens in ((1, (16, 16), 8), (3, (8, 24), 5)):
        given = onnx.example_inputs(unet, batch, size, {"prompt_embeds": (tokens, 18), **shapes}, seed=batch)
        latents, timesteps, conditioning = given
        conditioning["time_ids"] = torch.tensor([[1024.0, 768, 0, 12, 1024, 1024]]).repeat(batch, 1)
        inputs = dict(zip(names, (latents, timesteps, *conditioning.values()), strict=True))
        (output,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        added = {"text_embeds": inputs["text_embeds"], "time_ids": inputs["time_ids"]}
        with torch.no_grad():
            expected = unet(latents, timesteps, inputs["encoder_hidden_states"], added_cond_kwargs=added).sample
        np.testing.assert_allclose(output, expected.numpy(), atol=1e-4)


def test_int8_is_a_pipeline_that_generates(tmp_path):
    saved(tmp_path / "model", "ssd_1b")
    output = exported(tmp_path / "model", "int8", tmp_path / "int8")
    assert "fp32, int8 linear layers" in output
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "int8", torch_dtype=torch.float32)
    assert type(pipe.unet.add_embedding.linear_1.weight.data).__name__ != "Tensor"
    assert np.isfinite(pipe("a cat", num_inference_steps=1, output_type="np").images).all()
    assert isinstance(pipe.unet, UNet2DConditionModel)

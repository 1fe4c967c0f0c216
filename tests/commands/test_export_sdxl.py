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


def test_onnx_graphs_match_torch_at_any_size(tmp_path):
    """The parts that SDXL has besides: the pooled prompts and sizes that its U-Net takes, and the text encoder that
    gives them. In fp16, its VAE stays in fp32."""
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
    assert pipe.vae.config.force_upcast
    exported(tmp_path / "model", "onnx", tmp_path / "onnx", "--dtype", "fp16")

    def run(part, inputs):
        session = onnxruntime.InferenceSession(tmp_path / "onnx" / part / "model.onnx")
        assert [given.name for given in session.get_inputs()] == list(inputs)
        given = {name: tensor.numpy() for name, tensor in inputs.items()}
        return dict(zip([output.name for output in session.get_outputs()], session.run(None, given), strict=True))

    for batch, height, width in ((1, 16, 16), (3, 8, 24)):
        sample, prompts, pooled = (
            torch.randn(batch, 4, height, width),
            torch.randn(batch, 8, 18),
            torch.randn(batch, 12),
        )
        sizes = torch.tensor([[1024.0, 768, 0, 12, 1024, 1024]]).repeat(batch, 1)
        named = {
            "sample": sample.half(),
            "timestep": torch.tensor(501.5),
            "encoder_hidden_states": prompts.half(),
            "text_embeds": pooled.half(),
            "time_ids": sizes.half(),
        }
        ids = torch.randint(50, (batch, 8))
        with torch.no_grad():
            added = {"text_embeds": pooled, "time_ids": sizes}
            expected = pipe.unet(sample, 501.5, prompts, added_cond_kwargs=added).sample.numpy()
            text = pipe.text_encoder_2(ids, output_hidden_states=True)
            decoded = pipe.vae.decode(sample).sample.numpy()
        np.testing.assert_allclose(run("unet", named)["out_sample"], expected, atol=2e-2)
        found = run("text_encoder_2", {"input_ids": ids})
        np.testing.assert_allclose(found["text_embeds"], text.text_embeds.numpy(), atol=2e-2)
        np.testing.assert_allclose(found["hidden_states.1"], text.hidden_states[1].numpy(), atol=2e-2)
        np.testing.assert_allclose(run("vae_decoder", {"latent_sample": sample})["sample"], decoded, atol=1e-4)


def test_int8_is_a_pipeline_that_generates(tmp_path):
    saved(tmp_path / "model", "ssd_1b")
    output = exported(tmp_path / "model", "int8", tmp_path / "int8")
    assert "fp32, int8 linear layers" in output
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "int8", torch_dtype=torch.float32)
    assert type(pipe.unet.add_embedding.linear_1.weight.data).__name__ != "Tensor"
    assert np.isfinite(pipe("a cat", num_inference_steps=1, output_type="np").images).all()
    assert isinstance(pipe.unet, UNet2DConditionModel)

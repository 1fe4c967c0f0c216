"""sample --engine: the images of exported graphs are those of torch."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from support.stages import reset_accelerate
from support.tiny import tiny_pipeline, tiny_xl_pipeline

from pipeline.cli import main

# U-Nets of two stages: tracing takes the longer the more blocks there are.
SHALLOW = {
    "block_out_channels": (8, 12),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "mid_block_type": None,
}
# The largest difference of a value of a pixel, of 255.
TOLERANCE = 1


def run(command, *arguments):
    result = CliRunner().invoke(main, [command, *map(str, arguments)])
    reset_accelerate()
    return result


def sample(model, out, *options):
    result = run("sample", "--model", model, "--out", out, "--prompts", "a cat", "--num-inference-steps", 3, *options)
    assert result.exit_code == 0, result.output
    return np.asarray(Image.open(out / "0000.png"), int)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A pipeline of each family and its graphs, by the family's name."""
    place = tmp_path_factory.mktemp("engines")
    made = {"sd": tiny_pipeline(**SHALLOW), "sdxl": tiny_xl_pipeline(**SHALLOW, transformer_layers_per_block=1)}
    for name, pipe in made.items():
        pipe.save_pretrained(place / name)
        result = run("export", "--model", place / name, "--format", "onnx", "--out", place / f"{name}-onnx")
        assert result.exit_code == 0, result.output
    return {name: (place / name, place / f"{name}-onnx") for name in made}


@pytest.mark.parametrize(("engine", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_images_are_those_of_torch(models, tmp_path, family, engine, package):
    """With guidance, a size of its own, and a scheduler whose timesteps lie between those of the training."""
    pytest.importorskip(package)
    options = ("--seed", 5, "--scheduler", "euler", "--negative-prompt", "dogs", "--height", 16, "--width", 32)
    model, graphs = models[family]
    expected = sample(model, tmp_path / "torch", *options)
    found = sample(graphs, tmp_path / "graphs", *options, "--engine", engine)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    torch_index, index = (json.loads((tmp_path / name / "samples.json").read_text()) for name in ("torch", "graphs"))
    assert index["device"].endswith(f"fp32, {engine}")
    assert index["parameters"] == torch_index["parameters"]


def refused(*arguments):
    result = run("sample", "--prompts", "a cat", *arguments)
    assert result.exit_code == 2, result.output
    return result.output


def test_a_model_that_the_engine_cannot_run_is_refused_with_what_to_do(models, tmp_path):
    model, graphs = models["sd"]
    out = ("--out", tmp_path / "out")
    assert "holds no ONNX graphs. Write some with" in refused("--model", model, "--engine", "onnx", *out)
    assert "holds ONNX graphs alone. Generate with" in refused("--model", graphs, *out)
    options = ("--model", graphs, "--engine", "onnx", "--dtype", "fp16", *out)
    assert "--dtype and --device do not work with --engine onnx" in refused(*options)
    options = ("--model", graphs, "--engine", "onnx", "--height", 18, "--width", 16, *out)
    assert "--height is 18, but must be a multiple of" in refused(*options)
    damaged = shutil.copytree(graphs, tmp_path / "damaged")
    (damaged / "unet" / "config.json").write_text("{}")
    assert "unet/config.json does not state block_out_channels" in refused("--model", damaged, "--engine", "onnx", *out)
    shutil.copy(graphs / "unet" / "config.json", damaged / "unet")
    shutil.copy(graphs / "vae_decoder" / "model.onnx", damaged / "unet" / "model.onnx")
    assert "unet/model.onnx cannot be run (" in refused("--model", damaged, "--engine", "onnx", *out)
    (damaged / "unet" / "model.onnx").write_bytes(b"half a graph")
    assert "onnxruntime cannot read" in refused("--model", damaged, "--engine", "onnx", *out)
    assert not (tmp_path / "out").exists()

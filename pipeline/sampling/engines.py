"""Pipelines whose networks are ONNX graphs, run by onnxruntime or OpenVINO on the CPU.

diffusers' own pipeline generates with them, so prompts, noise and schedulers are those of every other pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn
from transformers import CLIPTextConfig
from transformers.utils import ModelOutput

from pipeline.models.graphs import DENOISED, GRAPH, HIDDEN, PIXELS, UNET, VAE_DECODER, holds_graphs
from pipeline.models.load import MODEL_INDEX, family_of, part_classes
from pipeline.models.reading import read_json, read_part
from pipeline.system.errors import UserError, first_line
from pipeline.system.extras import install_command

EXPORT_AGAIN = "Export the pipeline again, with `distill-sd export --format onnx`."
# What a pipeline looks up in the configs.
NEEDED = {
    UNET: ("block_out_channels", "in_channels", "sample_size"),
    VAE_DECODER: ("block_out_channels", "latent_channels", "scaling_factor"),
    "text_encoder": ("model_type", "num_hidden_layers"),
    "text_encoder_2": ("model_type", "num_hidden_layers"),
}
# From inputs by name to outputs by name.
Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def onnx_runner(file: Path) -> tuple[Run, dict[str, np.dtype]]:
    """A graph run by onnxruntime, and the dtypes of its inputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    dtypes = {given.name: np.dtype(NUMPY_NAMES[given.type]) for given in session.get_inputs()}
    return lambda inputs: dict(zip(outputs, session.run(outputs, dict(inputs)), strict=True)), dtypes


NUMPY_NAMES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}


def openvino_runner(file: Path) -> tuple[Run, dict[str, np.dtype]]:
    """A graph run by OpenVINO, and the dtypes of its inputs."""
    import openvino

    compiled = openvino.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    # A tensor that is also passed on has further names.
    dtypes = {
        name: np.dtype(given.get_element_type().to_dtype()) for given in compiled.inputs for name in given.get_names()
    }

    def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = compiled(dict(inputs))
        return {name: found[output] for output in compiled.outputs for name in output.get_names()}

    return run, dtypes


RUNNERS = {"onnx": onnx_runner, "openvino": openvino_runner}
PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino"}


class Network(nn.Module):
    """What a pipeline of diffusers needs of each network: a config, a device, and a dtype, float32 whatever the graph
    computes in."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, file: Path, run: Run, dtypes: Mapping[str, np.dtype], config: Any) -> None:
        super().__init__()
        self.file, self.run_graph, self.dtypes, self.config = file, run, dtypes, config

    def outputs(self, *names: str, **inputs: Tensor) -> dict[str, Tensor]:
        """The graph's outputs, float32, from inputs in any dtype. Raises UserError if it cannot be run, or has no
        outputs of these names."""
        try:
            given = {name: tensor.numpy().astype(self.dtypes[name]) for name, tensor in inputs.items()}
            found = self.run_graph(given)
        except Exception as error:
            # Each engine has errors of its own.
            raise UserError(f"{self.file} cannot be run ({first_line(error)}). {EXPORT_AGAIN}") from error
        if missing := [name for name in names if name not in found]:
            raise UserError(f"{self.file} has no output {missing[0]}, but {', '.join(found)}. {EXPORT_AGAIN}")
        return {name: torch.from_numpy(array).float() for name, array in found.items()}


class UNet(Network):
    """A U-Net; in SDXL's, diffusers looks up the width of `add_embedding`."""

    def __init__(self, file: Path, run: Run, dtypes: Mapping[str, np.dtype], config: Any) -> None:
        super().__init__(file, run, dtypes, config)
        width = config.projection_class_embeddings_input_dim
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        **_: Any,
    ) -> tuple[Tensor]:
        given = {"sample": sample, "timestep": timestep, "encoder_hidden_states": encoder_hidden_states}
        return (self.outputs(DENOISED, **given, **(added_cond_kwargs or {}))[DENOISED],)

    def num_parameters(self) -> int:
        """Those of a U-Net of this config."""
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(dict(self.config)).num_parameters()


class TextEncoder(Network):
    def forward(self, input_ids: Tensor, **_: Any) -> ModelOutput:
        names = [f"{HIDDEN}.{number}" for number in range(self.config.num_hidden_layers + 1)]
        found = self.outputs(*names, input_ids=input_ids)
        hidden = tuple(found.pop(name) for name in names)
        return ModelOutput({**found, HIDDEN: hidden})


class VAE(Network):
    """The half of a VAE that generating needs."""

    def decode(self, latents: Tensor, **_: Any) -> tuple[Tensor]:
        return (self.outputs(PIXELS, latent_sample=latents)[PIXELS],)


def load_graphs(folder: Path, engine: str) -> DiffusionPipeline:
    """The pipeline of the graphs in a folder, which `engine`, a key of RUNNERS, runs.

    Raises UserError if the engine is not installed or cannot read them, or if their configs are not those of `export`.
    """
    if find_spec(PACKAGES[engine]) is None:
        raise UserError(f"--engine {engine} needs {PACKAGES[engine]}. Run: {install_command(engine)}")
    family, classes = family_of(folder), part_classes(folder)
    parts: dict[str, Any] = {}
    for part, kind in classes.items():
        if part in family.encoders or part == UNET:
            made, place = (VAE, VAE_DECODER) if part == "vae" else (UNet if part == UNET else TextEncoder, part)
            file = folder / place / GRAPH
            parts[part] = made(file, *opened(file, engine), config_of(folder / place))
        else:
            parts[part] = read_part(kind, folder, part)
    try:
        return family.assemble(read_json(folder / MODEL_INDEX), **parts)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{folder} has a config that does not fit ({first_line(error)}). {EXPORT_AGAIN}") from None


def refuse_size(pipe: DiffusionPipeline, size: tuple[int, int] | None, model: str) -> None:
    """Raise UserError for a size (height, width) in pixels that the graph of a U-Net cannot take: each of its stages
    but one halves the latents, and a graph does not pad what is odd, as torch does."""
    multiple = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    for name, side in zip(("height", "width"), size or (), strict=False):
        if side % multiple:
            raise UserError(f"--{name} is {side}, but must be a multiple of {multiple} for the graphs of {model}")


def refuse_no_graphs(folder: Path) -> None:
    """Raise UserError unless a folder is a pipeline of ONNX graphs."""
    if not holds_graphs(folder):
        raise UserError(
            f"--model {folder} holds no ONNX graphs. Write some with `distill-sd export --format onnx`, or leave out "
            "--engine."
        )


def opened(file: Path, engine: str) -> tuple[Run, dict[str, np.dtype]]:
    """The graph in a file. Raises UserError if the engine cannot read it."""
    try:
        return RUNNERS[engine](file)
    except Exception as error:
        # Each engine has errors of its own.
        raise UserError(f"{PACKAGES[engine]} cannot read {file} ({first_line(error)}). {EXPORT_AGAIN}") from error


def config_of(folder: Path) -> Any:
    """A network's config, as attributes."""
    config = read_json(folder / "config.json")
    known = FrozenDict(config)
    missing = [key for key in NEEDED.get(folder.name, ()) if key not in known]
    if missing:
        raise UserError(f"{folder}/config.json does not state {', '.join(missing)}. {EXPORT_AGAIN}")
    return CLIPTextConfig(**config) if str(config.get("model_type", "")).startswith("clip_text") else known

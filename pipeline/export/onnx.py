"""A U-Net as an ONNX graph: written by torch's exporter, and compared with torch by running it in onnxruntime.

    sample       (B, C, 2^s h, 2^s w) float32; s is the number of the U-Net's downsamplers
    timestep     (B,) int64
    ...          (B, ...) float32: conditioning, such as the prompts' (B, L, D), under the names of diffusers' U-Nets
    noise_pred   like sample: the U-Net's output, whatever its prediction type

h, w and L may have any value, and B any value up to 63.
"""

from __future__ import annotations

import logging
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.export import Dim

from pipeline.models.families import Family, Shapes, denoise, random_conditioning

GRAPH = "model.onnx"
OUTPUT = "noise_pred"

# Latents, timesteps and conditioning.
Inputs = tuple[Tensor, Tensor, dict[str, Tensor]]


def write_onnx(unet: UNet2DConditionModel, family: Family, conditioning: Shapes, folder: Path) -> None:
    """Write the graph, its weights in a separate file (a graph holds 2 GB at most) and the U-Net's config.json.

    `conditioning` holds the shapes, without B, that the graph is traced with.
    """
    factor, size = downscaling(unet), latents_size(unet)
    height, width, length = (Dim(name) for name in ("height", "width", "tokens"))
    # From a batch of 64 on, diffusers' upsamplers take another branch, and a graph holds only one branch.
    batch = Dim("batch", max=63)
    dynamic_shapes = {
        "sample": {0: batch, 2: factor * height, 3: factor * width},
        "timestep": {0: batch},
        "conditioning": {
            name: {0: batch, 1: length} if len(shape) == 2 else {0: batch} for name, shape in conditioning.items()
        },
    }
    # No two sizes may be equal, or the exporter could treat them as one dimension.
    traced = example_inputs(unet, 2, (size, size + factor), conditioning, seed=0)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Denoiser(unet, family).eval(),
            traced[:2],
            kwargs={"conditioning": traced[2]},
            input_names=input_names(family, traced),
            output_names=[OUTPUT],
            dynamo=True,
            dynamic_shapes=dynamic_shapes,
            verbose=False,
        )
    assert program is not None
    program.save(folder / GRAPH, external_data=True)
    unet.save_config(folder)


def largest_difference(
    unet: UNet2DConditionModel, family: Family, conditioning: Shapes, folder: Path
) -> tuple[float, float] | None:
    """(largest difference between the outputs of onnxruntime and torch, largest output), both absolute values.

    The batch and the size differ from those that the graph was traced with. None without onnxruntime.
    """
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    factor, size = downscaling(unet), latents_size(unet)
    inputs = example_inputs(unet, 1, (size + factor, size), conditioning, seed=1)
    session = onnxruntime.InferenceSession(folder / GRAPH, providers=["CPUExecutionProvider"])
    (output,) = session.run([OUTPUT], graph_inputs(family, inputs))
    with torch.no_grad():
        expected = _Denoiser(unet, family).eval()(*inputs)
    return (torch.from_numpy(output) - expected).abs().max().item(), expected.abs().max().item()


def input_names(family: Family, inputs: Inputs) -> list[str]:
    """The names of the graph's inputs: those of diffusers' U-Nets."""
    return ["sample", "timestep", *flat(family.unet_kwargs(inputs[2]))]


def flat(kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors by name, with those that lie in a dictionary, such as `added_cond_kwargs`, beside the others."""
    return {
        name: tensor
        for key, value in kwargs.items()
        for name, tensor in (value.items() if isinstance(value, dict) else [(key, value)])
    }


def graph_inputs(family: Family, inputs: Inputs) -> dict[str, np.ndarray]:
    """The inputs as onnxruntime takes them, by name."""
    latents, timesteps, conditioning = inputs
    tensors = (latents, timesteps, *flat(family.unet_kwargs(conditioning)).values())
    return {name: tensor.numpy() for name, tensor in zip(input_names(family, inputs), tensors, strict=True)}


def example_inputs(
    unet: UNet2DConditionModel, batch: int, size: tuple[int, int], conditioning: Shapes, seed: int
) -> Inputs:
    """Random latents (batch, C, *size), timesteps (batch,) and conditioning (batch, ...) of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, unet.config.in_channels, *size, generator=generator)
    prompts = random_conditioning(conditioning, batch, generator)
    return latents, torch.randint(0, 1000, (batch,), generator=generator), prompts


def downscaling(unet: UNet2DConditionModel) -> int:
    """The number that both sides of the latents must be a multiple of."""
    return 2 ** (len(unet.config.down_block_types) - 1)


def latents_size(unet: UNet2DConditionModel) -> int:
    """The longer side of the latents that the U-Net was made for; 64, as of SD at 512 px, if it does not say."""
    size = unet.config.sample_size or 64
    return size if isinstance(size, int) else max(size)


class _Denoiser(nn.Module):
    """The U-Net with the latents, the timesteps and the conditioning as its inputs, and one output."""

    def __init__(self, unet: UNet2DConditionModel, family: Family) -> None:
        super().__init__()
        self.unet, self.family = unet, family

    def forward(self, sample: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return denoise(self.unet, sample, timestep, conditioning, self.family)

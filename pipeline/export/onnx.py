"""A U-Net as an ONNX graph: written by torch's exporter, and held against torch with onnxruntime.

    sample                  (B, C, 2^s h, 2^s w) float32; s is the number of the U-Net's downsamplers
    timestep                (B,) int64
    encoder_hidden_states   (B, L, D) float32
    noise_pred              as sample: what the U-Net says, whatever its prediction type

h, w and L are free, and so is B up to 63.
"""

from __future__ import annotations

import logging
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.export import Dim

GRAPH = "model.onnx"
INPUTS, OUTPUT = ("sample", "timestep", "encoder_hidden_states"), "noise_pred"

Inputs = tuple[Tensor, Tensor, Tensor]


class _Denoiser(nn.Module):
    """The U-Net with three inputs and one output."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


def write_onnx(unet: UNet2DConditionModel, tokens: int, folder: Path) -> None:
    """Write the graph, its weights beside it (a graph holds 2 GB at most) and the U-Net's config.json.

    `tokens` is the length of the prompts it is traced with.
    """
    factor, size = downscaling(unet), latents_size(unet)
    height, width, length = (Dim(name) for name in ("height", "width", "tokens"))
    # From 64 on diffusers' upsamplers take another way, and a graph has one way only.
    batch = Dim("batch", max=63)
    shapes = (
        {0: batch, 2: factor * height, 3: factor * width},
        {0: batch},
        {0: batch, 1: length},
    )
    # No two sizes alike, or the exporter might take them for one.
    traced = example_inputs(unet, 2, (size, size + factor), tokens, seed=0)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Denoiser(unet).eval(),
            traced,
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            dynamo=True,
            dynamic_shapes=shapes,
            verbose=False,
        )
    program.save(folder / GRAPH, external_data=True)
    unet.save_config(folder)


def largest_difference(unet: UNet2DConditionModel, tokens: int, folder: Path) -> tuple[float, float] | None:
    """(largest difference of onnxruntime's output from torch's, largest output), at another batch and size than the
    graph was traced with; None without onnxruntime."""
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    factor, size = downscaling(unet), latents_size(unet)
    inputs = example_inputs(unet, 1, (size + factor, size), tokens, seed=1)
    session = onnxruntime.InferenceSession(folder / GRAPH, providers=["CPUExecutionProvider"])
    (said,) = session.run([OUTPUT], {name: value.numpy() for name, value in zip(INPUTS, inputs, strict=True)})
    with torch.no_grad():
        expected = _Denoiser(unet).eval()(*inputs)
    return (torch.from_numpy(said) - expected).abs().max().item(), expected.abs().max().item()


def example_inputs(unet: UNet2DConditionModel, batch: int, size: tuple[int, int], tokens: int, seed: int) -> Inputs:
    """Random inputs: latents of `size`, timesteps, and prompts of `tokens` tokens."""
    draw = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, unet.config.in_channels, *size, generator=draw)
    prompts = torch.randn(batch, tokens, unet.config.cross_attention_dim, generator=draw)
    return latents, torch.randint(0, 1000, (batch,), generator=draw), prompts


def downscaling(unet: UNet2DConditionModel) -> int:
    """What the sides of the latents must be a multiple of."""
    return 2 ** (len(unet.config.down_block_types) - 1)


def latents_size(unet: UNet2DConditionModel) -> int:
    """The side of the latents that the U-Net was made for (the longer one)."""
    size = unet.config.sample_size
    return size if isinstance(size, int) else max(size)

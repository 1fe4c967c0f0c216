"""The networks of a pipeline as ONNX graphs: traced by torch, and compared with it by running them in onnxruntime.

What the graphs are called, take and give is in `pipeline.models.graphs`. Batches, heights and widths may have any size
that the network takes. torch's older exporter is used, as in optimum: the newer one takes thirty times as long, and
binds a graph of a U-Net to batches of up to 63.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from pipeline.export.qdq import store_integers
from pipeline.models.families import Family, Shapes, denoise, placed, random_conditioning
from pipeline.models.graphs import DENOISED, GRAPH, HIDDEN, LATENTS, PIXELS, UNET, VAE_DECODER, VAE_ENCODER, WEIGHTS

OPSET = 18
# What the axes of tensors are called in the graphs, by the tensors' numbers of dimensions.
IMAGE_AXES = {0: "batch_size", 2: "height", 3: "width"}
TEXT_AXES = {0: "batch_size", 1: "sequence_length"}
BATCH_AXIS = {0: "batch_size"}


@dataclass(frozen=True)
class Graph:
    """A network to be written as `name`: a function of its `inputs` in their order, which gives the tensors `outputs`.

    `inputs` are examples by name, and `axes` names those of their axes that may have another size. `network` holds the
    weights and the config. `bits` are those of its weights if it has fake quantisers.
    """

    name: str
    network: Any
    call: Callable[..., Any]
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    axes: dict[str, dict[int, str]]
    bits: int | None = None


def graphs_of(
    pipe: DiffusionPipeline,
    family: Family,
    conditioning: Shapes,
    batch: int,
    size: tuple[int, int],
    seed: int,
    bits: int | None = None,
) -> Iterator[Graph]:
    """The graphs of a pipeline, with random inputs. `conditioning` holds shapes without B, and `size` is (height,
    width) of the latents in units of the U-Net's own downscaling. `bits` are those that the U-Net's weights were
    rounded to, if it has fake quantisers."""
    generator = torch.Generator().manual_seed(seed)
    for name in family.encoders:
        if name != "vae":
            yield text_graph(name, getattr(pipe, name), batch, generator)
    yield unet_graph(pipe.unet, family, conditioning, batch, size, generator, bits)
    yield from vae_graphs(pipe.vae, batch, size, generator)


def unet_graph(
    unet: UNet2DConditionModel,
    family: Family,
    conditioning: Shapes,
    batch: int,
    size: tuple[int, int],
    generator: torch.Generator | None = None,
    bits: int | None = None,
) -> Graph:
    """The graph of a U-Net; the arguments are those of `graphs_of` and `Graph`."""
    height, width = (downscaling(unet) * side for side in size)
    sample = torch.randn(batch, unet.config.in_channels, height, width, generator=generator).to(unet.dtype)
    given = placed(random_conditioning(conditioning, batch, generator), unet.device, unet.dtype)
    named = flat(family.unet_kwargs(given))
    inputs = {"sample": sample, "timestep": torch.tensor(601.0), **named}
    axes = {"sample": IMAGE_AXES, **{name: TEXT_AXES if t.ndim == 3 else BATCH_AXIS for name, t in named.items()}}

    def call(sample: Tensor, timestep: Tensor, *tensors: Tensor) -> Tensor:
        return denoise(unet, sample, timestep, dict(zip(given, tensors, strict=True)), family)

    return Graph(UNET, unet, call, inputs, (DENOISED,), axes, bits)


def vae_graphs(vae: Any, batch: int, size: tuple[int, int], generator: torch.Generator) -> Iterator[Graph]:
    """The graphs of a VAE's encoder and decoder."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    image = torch.randn(batch, 3, *(8 * factor * side for side in size), generator=generator).to(vae.dtype)
    latents = torch.randn(batch, vae.config.latent_channels, *(8 * side for side in size), generator=generator)
    yield Graph(
        VAE_ENCODER,
        vae,
        lambda sample: vae.encode(sample).latent_dist.parameters,
        {"sample": image},
        (LATENTS,),
        {"sample": IMAGE_AXES},
    )
    yield Graph(
        VAE_DECODER,
        vae,
        lambda latent_sample: vae.decode(latent_sample, return_dict=False)[0],
        {"latent_sample": latents.to(vae.dtype)},
        (PIXELS,),
        {"latent_sample": IMAGE_AXES},
    )


def text_graph(name: str, encoder: Any, batch: int, generator: torch.Generator) -> Graph:
    """The graph of one of CLIP's text encoders, with all hidden states."""
    config = encoder.config
    # The exporter makes the mask of the fused attention in fp32 alone.
    encoder.set_attn_implementation("eager")
    ids = torch.randint(config.vocab_size, (batch, config.max_position_embeddings), generator=generator)
    projects = isinstance(encoder, CLIPTextModelWithProjection)
    outputs = ("text_embeds", "last_hidden_state") if projects else ("last_hidden_state", "pooler_output")

    def call(input_ids: Tensor) -> tuple[Tensor, ...]:
        output = encoder(input_ids, output_hidden_states=True)
        return (*(output[name] for name in outputs), *output.hidden_states)

    hidden = (f"{HIDDEN}.{number}" for number in range(config.num_hidden_layers + 1))
    return Graph(name, encoder, call, {"input_ids": ids}, (*outputs, *hidden), {"input_ids": BATCH_AXIS})


def write_graph(graph: Graph, folder: Path) -> None:
    """Write a graph with its weights in a file next to it: a graph holds 2 GB at most."""
    import onnx

    with tempfile.TemporaryDirectory(dir=folder.parent) as traced, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Called(graph.network, graph.call).eval(),
            tuple(graph.inputs.values()),
            f"{traced}/{GRAPH}",
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_axes=graph.axes,
            opset_version=OPSET,
            dynamo=False,
        )
        folder.mkdir(exist_ok=True)
        # Of more than 2 GB, torch writes each weight to a file of its own.
        model = onnx.load(f"{traced}/{GRAPH}")
        if graph.bits:
            store_integers(model, graph.bits)
        onnx.save_model(model, folder / GRAPH, save_as_external_data=True, location=WEIGHTS)


def largest_difference(graph: Graph, folder: Path) -> tuple[float, float] | None:
    """(largest difference between the outputs of onnxruntime and torch, largest output), both absolute values.

    The inputs are those of `graph`. None without onnxruntime.
    """
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / GRAPH, providers=["CPUExecutionProvider"])
    found = session.run(list(graph.outputs), {name: tensor.numpy() for name, tensor in graph.inputs.items()})
    with torch.no_grad():
        output = graph.call(*graph.inputs.values())
    expected = [tensor.float() for tensor in (output if isinstance(output, tuple) else (output,))]
    pairs = [(torch.from_numpy(other).float(), tensor) for other, tensor in zip(found, expected, strict=True)]
    difference = max((other - tensor).abs().max().item() for other, tensor in pairs)
    return difference, max(tensor.abs().max().item() for tensor in expected)


def flat(kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors by name, with those that lie in a dictionary, such as `added_cond_kwargs`, beside the others."""
    return {
        name: tensor
        for key, value in kwargs.items()
        for name, tensor in (value.items() if isinstance(value, dict) else [(key, value)])
    }


def downscaling(unet: UNet2DConditionModel) -> int:
    """The number that both sides of the latents must be a multiple of."""
    return 2 ** (len(unet.config.down_block_types) - 1)


class _Called(nn.Module):
    """A function of a network's as its forward pass."""

    def __init__(self, network: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.network, self.call = network, call

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(*inputs)

"""A family of teachers: one record holds everything that is particular to it. Also the one call of a U-Net."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from pipeline.models.levels.level import Level

# A U-Net's inputs besides noisy latents and timesteps, by name: (B, ...) each, or their shapes without B.
Conditioning = Mapping[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Frame:
    """What an image's pixels show of it, each (height, width) in pixels: its `original` size, the `corner` at which the
    crop begins, after resizing and flipping, and the `size` of the crop."""

    original: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True)
class Family:
    """What the stages need to know about a kind of teacher.

    `pipelines` are the classes of diffusers that a model_index.json may name. `parts` are the pipeline's parts that
    must exist, each with the classes that it may have, such as `diffusers.AutoencoderKL`; nothing else is imported. Of
    them `encoders` make latents and conditioning, and the spec states their hashes. `assemble` makes a pipeline that
    generates images from the pipeline's model_index.json and its loaded parts. Where `follows_force_upcast`, the VAE
    runs in float32 instead of fp16 if its config says force_upcast, as diffusers' pipelines of the family do.

    `levels` are its students by name, and `default_level` the one that a cache serves where none is named.

    `refusal` says, from a model_index.json, why a pipeline of the family's classes is none of the family all the same.
    `problems(folder, any_channels)` gives, from the configs of a pipeline, (whether it holds, the problem and its
    remedy) for everything that must hold in every command. Unless `any_channels`, the U-Net must take and give the
    VAE's latents alone. `check` raises ValueError for a U-Net config that the levels do not fit. `modules` are the
    teacher's modules that can be tapped, in the order of the forward pass, and `blocks` those that a student with all
    of the teacher's layers is compared at.

    `conditioning_shapes` reads the shapes of the conditioning from a pipeline's folder, without B. What belongs to
    captions is computed by `encode_prompts`, float32, and what belongs to an image by `image_conditioning`, without B.
    For the empty prompt the first gives the unconditional conditioning; what belongs to an image stays with it.
    Conditioning is stored in fp16, or as `dtypes` says by name. `count_truncated` counts the captions that do not fit
    the text encoder. `unet_kwargs` names conditioning as the U-Net does.

    `single_file` gives a pipeline's weights under the names of the original single-file layout, and raises ValueError
    if that layout has no name for one. `sdcpp` renames its tensors as stable-diffusion.cpp reads them, and raises
    ValueError for a U-Net that it does not know. `architecture` is what ModelSpec calls a pipeline's kind.
    `single_file_configs` finds out from the shapes of such a file's tensors and its header what it is: in words, and as
    the configs of the pipeline's parts by their files. It gives None for a file of another family, and raises
    ValueError for one that holds no complete pipeline of this family.

    `spec` is what specs of latents and caches state about the family; SD-1.x, the first, states nothing.
    """

    name: str
    title: str
    pipelines: tuple[str, ...]
    parts: Mapping[str, tuple[str, ...]]
    encoders: tuple[str, ...]
    levels: Mapping[str, Level]
    default_level: str
    modules: tuple[str, ...]
    blocks: tuple[str, ...]
    assemble: Callable[..., DiffusionPipeline]
    problems: Callable[[Path, bool], Iterable[tuple[bool, str]]]
    check: Callable[[Mapping[str, Any]], None]
    conditioning_shapes: Callable[[Path], Shapes]
    encode_prompts: Callable[[DiffusionPipeline, list[str]], dict[str, Tensor]]
    count_truncated: Callable[[DiffusionPipeline, list[str]], int]
    unet_kwargs: Callable[[Conditioning], dict[str, Any]]
    single_file: Callable[[DiffusionPipeline], dict[str, Tensor]]
    sdcpp: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    architecture: Callable[[DiffusionPipeline], str]
    single_file_configs: Callable[
        [Mapping[str, tuple[int, ...]], Mapping[str, str]], tuple[str, dict[str, dict[str, Any]]] | None
    ]
    image_conditioning: Callable[[Frame], dict[str, Tensor]] = lambda frame: {}
    refusal: Callable[[Mapping[str, Any]], str | None] = lambda index: None
    dtypes: Mapping[str, str] = field(default_factory=dict)
    follows_force_upcast: bool = False
    spec: Mapping[str, str] = field(default_factory=dict)

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The parts that turn captions into the numbers that text encoders take."""
        return tuple(part for part in self.parts if part.startswith("tokenizer"))


def denoise(unet: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, family: Family) -> Tensor:
    """What a U-Net predicts: (B, C, H, W), in the U-Net's dtype and on its device, to which all inputs are moved.

    noisy (B, C, H, W); timesteps (B,) int64; conditioning (B, ...) by name. `unet` may be wrapped, as for compiled or
    distributed training.
    """
    first = next(unet.parameters())
    device, dtype = first.device, first.dtype
    inputs = family.unet_kwargs(placed(conditioning, device, dtype))
    return unet(noisy.to(device, dtype), timesteps.to(device), **inputs, return_dict=False)[0]


def placed(conditioning: Conditioning, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The conditioning on a device and in a dtype. Integers stay integers: half precision could not tell large ones."""
    return {
        name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in conditioning.items()
    }


def random_conditioning(shapes: Shapes, batch_size: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Gaussian conditioning (B, ...) float32 of these shapes: for timing and tracing."""
    return {name: torch.randn(batch_size, *shape, generator=generator) for name, shape in shapes.items()}

"""A U-Net with fake quantisers: it computes in floats what a program with integers computes from its weights.

Each convolution and linear layer rounds its input to 8 bits, over one range for all of the tensor, and its weight to 8
or 4 bits, over a range for each output channel. The range of a weight is its largest value, so it needs no storage and
follows the weight in training. Those of inputs are measured once:

    unet/qat.json   {"qat": "int8", "ranges": {"mid_block.attentions.0.proj_in": 4.25, ...}}

lies next to the weights, which stay plain floats. The first and the last convolution and the small networks that embed
a timestep compute in floats, as in programs that run these U-Nets with integers: they take hardly any time, and all
that a step takes in or gives passes through them.

The quantisers are NVIDIA modelopt's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from pipeline.models.reading import read_json
from pipeline.system.errors import UserError
from pipeline.system.extras import install_command
from pipeline.system.options import QAT_BITS
from shards.files import write_json

QUANTISERS = "qat.json"
# Parts of a U-Net that compute in floats.
FLOAT = ("conv_in", "conv_out", "time_embedding", "add_embedding")
# Of the integers that modelopt writes to ONNX.
GRID_BITS = 8


def require_modelopt(what: str) -> None:
    """Raise UserError, in which `what` needs modelopt, if it is not installed."""
    if find_spec("modelopt") is None:
        raise UserError(f"{what} needs nvidia-modelopt. Run: {install_command('qat')}")


def layers_to_quantise(unet: UNet2DConditionModel) -> dict[str, nn.Module]:
    """The layers that get quantisers, by name."""
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and name.split(".")[0] not in FLOAT
    }


def quantised_layers(unet: nn.Module) -> dict[str, Any]:
    """The layers that have quantisers, by name."""
    return {name: module for name, module in unet.named_modules() if hasattr(module, "weight_quantizer")}


def weight_bits(unet: nn.Module) -> int | None:
    """The bits that weights are rounded to; None without quantisers."""
    return next((layer.weight_quantizer.num_bits for layer in quantised_layers(unet).values()), None)


def add_quantisers(unet: UNet2DConditionModel, qat: str) -> None:
    """Give a U-Net the quantisers of `qat`, a key of QAT_BITS, in place. Its inputs have no ranges yet.

    Its parameters stay the same objects under the same names, and its state has no others.
    """
    registry = modelopt_layers()
    for name, layer in layers_to_quantise(unet).items():
        quantised = registry.convert(layer)
        quantised.weight_quantizer.num_bits = QAT_BITS[qat]
        unet.set_submodule(name, quantised)


def modelopt_layers() -> Any:
    """modelopt's registry of quantised layers."""
    with warnings.catch_warnings():
        # It warns of every version of transformers that it was not tested with, and uses none of it here.
        warnings.simplefilter("ignore")
        from modelopt.torch.quantization import QuantModuleRegistry
    return QuantModuleRegistry


@contextmanager
def measuring_ranges(unet: UNet2DConditionModel) -> Iterator[None]:
    """Set the ranges of all inputs to the largest values that a block's forward passes, in floats, give them.

    Raises UserError if there are NaN or Inf among them.
    """
    layers = quantised_layers(unet).values()
    for layer in layers:
        layer.weight_quantizer.disable()
        layer.input_quantizer.disable_quant()
        layer.input_quantizer.enable_calib()
    try:
        yield
    except AssertionError as error:
        raise UserError(
            f"the ranges of the layers' inputs cannot be measured ({error}). Check the weights that are quantised."
        ) from error
    for layer in layers:
        quantiser = layer.input_quantizer
        quantiser.load_calib_amax()
        measured = float(quantiser.amax)
        quantiser.reset_amax()
        set_range(quantiser, torch.tensor(measured, device=layer.weight.device))
        quantiser.disable_calib()
        quantiser.enable_quant()
        layer.weight_quantizer.enable()


def set_range(quantiser: Any, largest: Tensor) -> None:
    """Set the largest value that a quantiser rounds to. It moves with the network and is no part of its state, so the
    weights of a quantised network are those of a plain one."""
    quantiser.register_buffer("_amax", largest, persistent=False)


def state_of_quantisers(unet: nn.Module) -> dict[str, Any]:
    """What qat.json says of a U-Net; empty without quantisers."""
    bits = weight_bits(unet)
    if bits is None:
        return {}
    qat = next(name for name, known in QAT_BITS.items() if known == bits)
    ranges = {name: float(layer.input_quantizer.amax) for name, layer in quantised_layers(unet).items()}
    return {"qat": qat, "ranges": ranges}


def has_quantisers(folder: Path) -> bool:
    """Whether a U-Net's folder holds the ranges of quantisers."""
    return (folder / QUANTISERS).is_file()


def save_unet(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write a U-Net to a folder as diffusers does, and qat.json if it has quantisers."""
    unet.save_pretrained(folder)
    state = state_of_quantisers(unet)
    if state:
        write_json(folder / QUANTISERS, state, indent=2)


def load_quantisers(unet: UNet2DConditionModel, folder: Path) -> None:
    """Give a U-Net the quantisers that the qat.json in `folder` describes.

    Raises UserError if the file is damaged or of another U-Net, or if modelopt is not installed.
    """
    path = folder / QUANTISERS
    state = read_json(path)
    qat, ranges = state.get("qat"), state.get("ranges")
    if not isinstance(qat, str) or qat not in QAT_BITS:
        raise UserError(f"{path} states the format {qat!r}. Use one of {', '.join(QAT_BITS)}, or copy it again.")
    layers = layers_to_quantise(unet)
    if not isinstance(ranges, dict) or ranges.keys() != layers.keys():
        raise UserError(f"{path} does not have a range for each layer of its U-Net. Copy or download it again.")
    bad = [name for name, value in ranges.items() if not is_range(value)]
    if bad:
        raise UserError(f"{path} has the range {ranges[bad[0]]!r} for {bad[0]}. Copy or download it again.")
    require_modelopt(f"{folder}, which has the quantisers of --qat {qat},")
    add_quantisers(unet, qat)
    for name, layer in quantised_layers(unet).items():
        set_range(layer.input_quantizer, torch.tensor(ranges[name], device=layer.weight.device))


def is_range(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


@torch.no_grad()
def bake(unet: UNet2DConditionModel) -> None:
    """Round the weights of a quantised U-Net once and for all, for ONNX: its quantisers get the steps of their present
    grids as fixed ones of GRID_BITS, and what the U-Net computes stays the same."""
    for layer in quantised_layers(unet).values():
        weight, quantiser = layer.weight, layer.weight_quantizer
        others = tuple(range(1, weight.ndim))
        step = weight.abs().amax(others, keepdim=True) / largest_integer(quantiser.num_bits)
        weight.copy_(quantiser(weight))
        quantiser.num_bits = GRID_BITS
        set_range(quantiser, step * largest_integer(GRID_BITS))


def largest_integer(bits: int) -> int:
    return 2 ** (bits - 1) - 1

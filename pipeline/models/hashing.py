"""The identity of what computes: hashes of weights and tokenizers, what configs decide, versions of libraries."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import diffusers
import numpy
import torch
import transformers
from diffusers import UNet2DConditionModel
from torch import nn
from tqdm import tqdm

from pipeline.models.reading import defaults_of
from pipeline.system.echo import is_first_process

# The seconds after which the bar of hashing appears.
DELAY = 2.0

# Keys of configs that decide nothing of what is stored: the size of generated images, how weights are drawn, what
# training drops in a frozen network, and what only the pooled output of a text encoder depends on.
DECIDES_NOTHING = {
    "sample_size",
    "force_upcast",
    "initializer_range",
    "initializer_factor",
    "attention_dropout",
    "projection_dim",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
}
# Of these, what decides the pooled output, at the end token of the prompt.
DECIDES_POOLED = {"eos_token_id"}
# Keys that a family reads from a text encoder's config, though its class does not know them.
READ_BY_FAMILIES = {"use_attention_mask": False}
# Keys of a U-Net's config that state a number for all of its blocks, or one for each.
PER_BLOCK = ("attention_head_dim", "cross_attention_dim", "layers_per_block", "transformer_layers_per_block")
SPECIAL_TOKENS = ("bos", "eos", "pad", "unk")


def weights_sha256(module: nn.Module, dtype: torch.dtype | None = None) -> str:
    """A hash of a network's tensors and their names. Equal weights have equal hashes, however they are stored.

    With a `dtype`, of its floats in that precision, whatever they have in memory. Shows a bar if it takes long.
    """
    digest = hashlib.sha256()
    state = sorted(module.state_dict().items())
    tensors = list(itertools.chain.from_iterable(plain_tensors(*item) for item in state))
    with tqdm(
        total=sum(tensor.nbytes for _, tensor in tensors),
        unit="B",
        unit_scale=True,
        desc=f"hashing {type(module).__name__}",
        delay=DELAY,
        disable=not is_first_process(),
    ) as progress:
        for name, tensor in tensors:
            progress.update(tensor.nbytes)
            tensor = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def plain_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor with its name. A quantised one is taken apart into its plain tensors, such as integers and scales."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(f"{name}.{part}", getattr(tensor, part))


def config_of(network: Any) -> dict[str, Any]:
    """What a network of diffusers or transformers computes besides its weights; see `deciding`."""
    config = network.config
    if isinstance(network, transformers.CLIPTextModelWithProjection):
        return deciding(type(config), config.to_dict(), DECIDES_NOTHING - DECIDES_POOLED)
    if isinstance(config, transformers.PretrainedConfig):
        return deciding(type(config), config.to_dict())
    return deciding(type(network), config)


def deciding(kind: Any, config: Mapping[str, Any], left_out: Collection[str] = DECIDES_NOTHING) -> dict[str, Any]:
    """The keys of a config that decide what its network computes, as JSON has them, sorted.

    Keys with the default of the class `kind`, whose parameters they are, are left out. So it is the same whether a file
    states a default, and in versions of the libraries that know more keys.
    """
    known = defaults_of(kind)
    if issubclass(kind, transformers.PretrainedConfig):
        general = defaults_of(transformers.PretrainedConfig)
        known = {key: value for key, value in known.items() if key not in general} | READ_BY_FAMILIES
    stated = {key: config[key] for key in sorted(known) if key in config and key not in left_out}
    # JSON has neither tuples nor NaN.
    plain, defaults = (json.loads(json.dumps(value, default=str), parse_constant=str) for value in (stated, known))
    return {key: value for key, value in plain.items() if value != defaults[key]}


def stated_once(config: Mapping[str, Any]) -> dict[str, Any]:
    """A U-Net's config, as `deciding` gives it, with a number that it states for each block alike stated once.

    Two configs that mean the same are equal by it. Their hashes are not, so what is stored keeps its own way.
    """
    once = {key: number_of(config[key]) if key in PER_BLOCK else config[key] for key in config}
    known = defaults_of(UNet2DConditionModel)
    return {key: value for key, value in once.items() if key not in PER_BLOCK or value != known[key]}


def number_of(value: Any) -> Any:
    """The number that a list repeats; anything else as it is."""
    repeats = isinstance(value, list) and len(set(map(repr, value))) == 1 and isinstance(value[0], int)
    return value[0] if repeats else value


def as_stated(config: dict[str, Any], earlier: dict[str, Any] | None) -> dict[str, Any]:
    """A U-Net's config as an `earlier` one states it, if they mean the same."""
    return earlier if earlier is not None and stated_once(earlier) == stated_once(config) else config


def tokenizer_sha256(tokenizer: Any) -> str:
    """A hash of what decides the numbers of a text's tokens: vocabulary, merges, special tokens, and the sides that are
    padded and cut off. It does not depend on the files."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    stated = {
        "vocabulary": tokenizer.get_vocab(),
        # A pair in newer versions, and a string with a space in older ones.
        "merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", ())],
        "added": sorted(tokenizer.get_added_vocab()),
        "special": {name: getattr(tokenizer, f"{name}_token_id") for name in SPECIAL_TOKENS},
        "sides": [tokenizer.padding_side, tokenizer.truncation_side],
    }
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """The versions that decide what the networks compute."""
    modules = {"torch": torch, "diffusers": diffusers, "transformers": transformers, "numpy": numpy}
    return {name: module.__version__ for name, module in modules.items()}


def shapes_of(module: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}

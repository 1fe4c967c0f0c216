"""The identity of a network, whatever its files: hashes, shapes, and the versions of the libraries that run it."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator

import diffusers
import numpy
import torch
import transformers
from torch import nn


def weights_sha256(module: nn.Module) -> str:
    """A hash of a network's tensors and their names. Equal weights have equal hashes, however they are stored."""
    digest = hashlib.sha256()
    tensors = itertools.chain.from_iterable(plain_tensors(*item) for item in sorted(module.state_dict().items()))
    for name, tensor in tensors:
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


def library_versions() -> dict[str, str]:
    """The versions that decide what the networks compute."""
    modules = {"torch": torch, "diffusers": diffusers, "transformers": transformers, "numpy": numpy}
    return {name: module.__version__ for name, module in modules.items()}


def shapes_of(module: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}

"""The vocabulary of the format: its version, the names of shards and members, and the error that readers raise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

FORMAT_VERSION = 2
# Those that are read; sets of the first are also what earlier versions wrote.
READABLE_VERSIONS = (1, 2)
SIDECAR_ENDINGS = {1: ".json", 2: ".index"}

MANIFEST = "manifest.json"
# The file of a cache with the calibrations of its taps.
CALIBRATION = "calibration.safetensors"
# The folder of a cache that holds its images: what `encode` wrote.
IMAGES = "images"
LATENTS = "latents"
NOISE = "noise"
# With input perturbation, this is added to the latents in place of the noise.
INPUT_NOISE = "input_noise"
TEACHER_PRED = "teacher_pred"
TAP_PREFIX = "tap."
# The spec states the shape of each of an image's tensors as `<name>_shape`.
SHAPE_SUFFIX = "_shape"
# And the dtype of those that are not fp16 as `<name>_dtype`.
DTYPE_SUFFIX = "_dtype"

# A tar is made of blocks: a header takes one, and data is padded to full ones.
BLOCK = 512
# What a sidecar states of a member: where its data is in the tar, and what it must decode to.
COLUMNS = ("offset", "length", "raw_bytes", "crc32")


class ShardError(ValueError):
    """Something in a shard set that its owner can fix. The message names the file and the remedy."""


def image_key(index: int) -> str:
    """The key of an image's latents: its place in the input.

    Keys contain no dots, because WebDataset splits a member's name at the first one.
    """
    return f"{index:09d}"


def entry_key(image: str, round_index: int) -> str:
    """The key of an image's entry in one round."""
    return f"{image}-r{round_index:04d}"


def image_of(key: str) -> int:
    """The place in the input of a key's image."""
    return int(key.partition("-")[0])


def shard_name(place: int, round_index: int | None) -> str:
    """The name of shard number `place`, of a round or, for latents, of none."""
    return f"s{place:05d}.tar" if round_index is None else f"r{round_index:04d}-s{place:05d}.tar"


def round_of(shard: str) -> int | None:
    """The round of a shard, from its name; None for latents."""
    return int(shard[1:].split("-")[0]) if shard.startswith("r") else None


def sidecar_name(shard: str, version: int = FORMAT_VERSION) -> str:
    return shard.removesuffix(".tar") + SIDECAR_ENDINGS[version]


def added_noise(spec: dict[str, Any]) -> str:
    """The name of the tensor that is added to the latents in a cache with this spec."""
    return INPUT_NOISE if spec.get("input_perturbation") else NOISE


def tap_member(tap: str) -> str:
    """The tensor name of a tap, without file ending: `down_blocks.0` -> `tap.down_blocks.0`."""
    return TAP_PREFIX + tap


def stated_shapes(latents: tuple[int, ...], conditioning: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """How the spec of latents states the shapes of an image's tensors: `{"latents_shape": (4, 64, 64), ...}`."""
    return {name + SHAPE_SUFFIX: shape for name, shape in {LATENTS: latents, **conditioning}.items()}


def stated_dtypes(dtypes: Mapping[str, str]) -> dict[str, str]:
    """How the spec of latents states the dtypes of the tensors that are not fp16: `{"time_ids_dtype": "int32"}`."""
    return {name + DTYPE_SUFFIX: dtype for name, dtype in dtypes.items()}


def conditioning_shapes(spec: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The conditioning tensors of an entry, by name, as the spec of latents or of a cache states them.

    They are all the tensors of an image but its latents: `prompt_embeds_shape: [77, 768]` states `prompt_embeds`.
    """
    names = [key.removesuffix(SHAPE_SUFFIX) for key in spec.get("latents", spec) if key.endswith(SHAPE_SUFFIX)]
    return {name: tuple(spec.get("latents", spec)[name + SHAPE_SUFFIX]) for name in names if name != LATENTS}


def empty_prompt_file(name: str) -> str:
    """The file next to the latents that holds a conditioning tensor of the empty prompt."""
    return f"empty_{name}.npy"


def json_bytes(value: Any, indent: int | None = 1) -> bytes:
    """`value` as a JSON file. NaN and Inf are refused: JSON has no such numbers."""
    return json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False).encode() + b"\n"

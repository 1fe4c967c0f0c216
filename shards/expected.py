"""What a spec promises about each entry: its tensors with their shapes and dtypes, its key, its .json member."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.buckets import of_bucket
from shards.codec import DITHER_TABLE_SIZE, EXACT_DTYPES
from shards.manifest import Manifest
from shards.schema import (
    DTYPE_SUFFIX,
    INPUT_NOISE,
    LATENTS,
    NOISE,
    TEACHER_PRED,
    ShardError,
    conditioning_shapes,
    tap_member,
)

KEY = re.compile(r"\d{9}(?:-r(\d{4,}))?")
# The bytes of a .npy header of format 1.0, as numpy writes it for shapes of a few dimensions.
NPY_HEADER = 128
BYTE_PLANES = (1, 2, 4)


@dataclass(frozen=True)
class Expected:
    """A tensor's `shape`, and its `dtype` if it is stored exactly; None if it is quantised, and then whether it was
    `rotated` before."""

    shape: tuple[int, ...]
    dtype: np.dtype | None
    rotated: bool = False

    @property
    def ending(self) -> str:
        return ".npy" if self.dtype else ".npy.zst"

    def check_size(self, raw_bytes: int) -> None:
        """Raise ShardError, before decompressing, unless a quantised member of format 1 may have that size."""
        sizes = [2 * NPY_HEADER + 4 * self.shape[0] + planes * math.prod(self.shape) for planes in BYTE_PLANES]
        if self.dtype is None and raw_bytes not in sizes:
            raise ShardError(f"it states {raw_bytes} bytes, but values of shape {list(self.shape)} take one of {sizes}")

    def check_values(self, values: np.ndarray) -> None:
        """Raise ShardError unless `values`, exact or quantised, have this shape and dtype."""
        fits = values.dtype == self.dtype if self.dtype else values.dtype.kind == "i"
        if values.shape != self.shape or not fits:
            wanted = self.dtype or "integers"
            raise ShardError(f"it is {list(values.shape)} of {values.dtype}, not {list(self.shape)} of {wanted}")


HALF = np.dtype(np.float16)
# The dtypes of an image's tensors, as specs state them.
IMAGE_DTYPES: dict[str, np.dtype] = {"float16": HALF, "int32": np.dtype(np.int32)}


def image_tensors(spec: dict[str, Any]) -> dict[str, Expected]:
    """The tensors of an image, by name without file ending: latents and conditioning, fp16 unless the spec states
    another dtype. The spec is one without buckets (see `of_bucket`)."""
    latents = spec.get("latents", spec)
    if "latents_shape" not in latents:
        return {}
    shapes = {LATENTS: tuple(latents["latents_shape"]), **conditioning_shapes(spec)}
    return {name: Expected(shape, image_dtype(latents, name)) for name, shape in shapes.items()}


def image_dtype(latents_spec: dict[str, Any], name: str) -> np.dtype:
    """The dtype of an image's tensor. Raises ShardError for one that this version does not know."""
    stated = latents_spec.get(name + DTYPE_SUFFIX, "float16")
    if stated not in IMAGE_DTYPES:
        raise ShardError(f"its spec states the dtype {stated!r} for {name}. Read it with the version that wrote it.")
    return IMAGE_DTYPES[stated]


def target_tensors(manifest: Manifest, bucket: int = 0) -> dict[str, Expected]:
    """The tensors that a cache adds to those of an image of a bucket."""
    spec = of_bucket(manifest.spec, bucket)
    shape = tuple(spec["latents"]["latents_shape"])
    exact = EXACT_DTYPES.get(spec["codec"]["name"])
    tensors = {NOISE: Expected(shape, HALF), TEACHER_PRED: Expected(shape, exact or HALF)}
    if spec.get("input_perturbation"):
        tensors[INPUT_NOISE] = Expected(shape, HALF)
    rotated = exact is None and manifest.version > 1
    return tensors | {tap_member(tap): Expected(sampled_shape(t), exact, rotated) for tap, t in spec["taps"].items()}


def expected_tensors(manifest: Manifest, bucket: int = 0) -> dict[str, Expected]:
    """Every tensor in an entry of the shards next to a manifest, by name without file ending. The names are the same in
    all buckets."""
    images = image_tensors(of_bucket(manifest.spec, bucket)) if manifest.has_own_images else {}
    return images | (target_tensors(manifest, bucket) if manifest.is_cache else {})


def sampled_shape(tap_spec: dict[str, Any]) -> tuple[int, int, int]:
    """(C, H // stride, W // stride): the shape of a tap of which one position per cell is kept."""
    channels, height, width = tap_spec["shape"]
    return channels, height // tap_spec["stride"], width // tap_spec["stride"]


def offsets(side: int, stride: int) -> int:
    """How many rows (or columns) a tap's kept positions may start from: any if `stride` does not divide the side."""
    return side if side % stride else stride


def check_key(key: str, round_index: int | None) -> None:
    """Raise ShardError unless a shard of that round (None for latents) may hold `key`."""
    match = KEY.fullmatch(key)
    if not match or (None if match[1] is None else int(match[1])) != round_index:
        raise ShardError(f"key {key!r} does not belong in this shard")


def check_meta(meta: Any, manifest: Manifest, round_index: int | None, image: int) -> None:
    """Raise ShardError unless the .json of the entry of an image, by its place in the input, has every field that
    training reads, within its limits."""
    spec = of_bucket(manifest.spec, manifest.bucket_of(image))
    try:
        of_image = ("source_id", "caption") if manifest.has_own_images else ()
        problems = [name for name in of_image if not isinstance(meta[name], str)]
        if manifest.is_cache:
            if meta["round"] != round_index:
                problems.append("round")
            if type(meta["unconditional"]) is not bool:
                problems.append("unconditional")
            if not 0 <= meta["timestep"] < spec["noise_scheduler"]["num_train_timesteps"]:
                problems.append("timestep")
            for tap, tap_spec in spec["taps"].items():
                if not _is_valid_record(meta["taps"][tap], tap_spec, spec["codec"]["name"] == "dither"):
                    problems.append(f"taps.{tap}")
    except (KeyError, TypeError) as error:
        raise ShardError(f"its .json lacks a field ({error!r})") from None
    if problems:
        raise ShardError(f"invalid {', '.join(problems)} in its .json")


def _is_valid_record(record: dict[str, Any], tap_spec: dict[str, Any], quantised: bool) -> bool:
    sides = zip(("row", "column"), tap_spec["shape"][1:], strict=True)
    placed = all(0 <= record[name] < offsets(side, tap_spec["stride"]) for name, side in sides)
    if not quantised:
        return placed
    step = record["step"]
    return placed and math.isfinite(step) and step >= 0 and 0 <= record["dither"] < DITHER_TABLE_SIZE

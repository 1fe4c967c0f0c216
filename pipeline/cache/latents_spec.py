"""The spec of latents: what they are, whatever computes them, and which bucket each image is in."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from pipeline.cache.latents import encoders_spec
from pipeline.cache.output import existing_manifest
from pipeline.core.buckets import Size
from pipeline.data.buckets import Assignment, assign
from pipeline.data.inputs import settled_spec
from pipeline.data.loading import read_patiently
from pipeline.data.records import inputs_sha256
from pipeline.data.source import OpenSource
from pipeline.models.encoders import latents_shape
from pipeline.models.families import Family
from pipeline.models.hashing import library_versions
from pipeline.models.load import family_of
from pipeline.settings.encode import EncodeSettings
from pipeline.system.device import DTYPES
from pipeline.system.errors import UserError
from shards.buckets import BUCKETS, BUCKETS_FILE
from shards.codec import decode_npy
from shards.manifest import known_to, read_file
from shards.schema import stated_dtypes, stated_shapes
from shards.store import open_store


def latents_spec(settings: EncodeSettings, source: OpenSource, folder: Path, base: DiffusionPipeline) -> dict[str, Any]:
    """What the latents are, whatever computes them."""
    family = family_of(folder)
    return {
        "stage": "latents",
        **family.spec,
        "entries": len(source.records),
        "entries_per_shard": settings.entries_per_shard,
        "inputs_sha256": inputs_sha256(source.records),
        "seed": settings.seed,
        "resolution": settings.resolution,
        "center_crop": settings.crops_at_centre,
        "random_flip": settings.random_flip,
        # Left out at its default, as by earlier versions.
        **({"min_size": settings.min_size} if settings.min_size else {}),
        "dtype": settings.dtype,
        **({"vae_dtype": "fp32"} if vae_dtype(settings, base, family) != DTYPES[settings.dtype] else {}),
        **stated_shapes(latents_shape(base.vae, settings.resolution), family.conditioning_shapes(folder)),
        **stated_dtypes(family.dtypes),
        **encoders_spec(base, family),
        "libraries": library_versions(),
    }


def in_buckets(
    settings: EncodeSettings, source: OpenSource, spec: dict[str, Any], base: DiffusionPipeline
) -> tuple[OpenSource, dict[str, Any], dict[str, bytes]]:
    """With --buckets: the source with its records sorted by bucket, the spec that says so, and the file that keeps
    which bucket each is in. Without it: the same source and spec, and no file.

    Buckets are those of existing latents in the output, if there are any. Raises UserError if these have none, or have
    other numbers of entries.
    """
    if not settings.buckets:
        return source, spec, {}
    found = existing_manifest(settings.out, "latents")
    if found is None:
        with tqdm(total=len(source.records), unit="image", desc="buckets") as progress:
            assigned = assign(source, settings.resolution, settings.min_size, settings.workers, progress.update)
    elif BUCKETS not in found.spec:
        raise UserError(f"{settings.out} was made without --buckets. Drop it, or choose another --out.")
    else:
        numbers = decode_npy(read_file(open_store(settings.out), found, BUCKETS_FILE))
        if len(numbers) != len(source.records):
            raise UserError(
                f"{settings.out} was made from other inputs: {len(numbers)} entries -> {len(source.records)}. Restore "
                "the inputs, or choose another output directory."
            )
        assigned = Assignment(sizes_of(found.spec), numbers)
    in_order = source.sorted(assigned.order())
    buckets = [
        {"size": size, "latents_shape": latents_shape(base.vae, *size), "entries": count}
        for size, count in zip(assigned.sizes, assigned.counts(), strict=True)
    ]
    # In place of the shape of them all.
    stated = {BUCKETS if name == "latents_shape" else name: value for name, value in spec.items()}
    stated |= {"inputs_sha256": inputs_sha256(in_order.records), BUCKETS: buckets}
    return in_order, stated, {BUCKETS_FILE: assigned.as_npy()}


def settled(settings: EncodeSettings, source: OpenSource, spec: dict[str, Any]) -> dict[str, Any]:
    """The spec as existing latents in the output state it, if the inputs are theirs. See `settled_spec`."""
    found = existing_manifest(settings.out, "latents")
    if found is None:
        return spec
    read = functools.partial(read_patiently, source)
    return settled_spec(open_store(settings.out), found, known_to(found.spec, spec), source.records, read)


def vae_dtype(settings: EncodeSettings, base: DiffusionPipeline, family: Family) -> torch.dtype:
    """The precision of the VAE: that of the settings, or float32 in place of fp16 where the VAE overflows in it."""
    upcasts = family.follows_force_upcast and base.vae.config.force_upcast and settings.dtype == "fp16"
    return torch.float32 if upcasts else DTYPES[settings.dtype]


def sizes_of(spec: dict[str, Any]) -> list[Size]:
    """(height, width) in pixels of the images of each bucket; without buckets that of the square."""
    if BUCKETS not in spec:
        return [(spec["resolution"], spec["resolution"])]
    return [(bucket["size"][0], bucket["size"][1]) for bucket in spec[BUCKETS]]

"""Opening latents, and checking that they belong to the model that is to use them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline

from pipeline.models.families import Family, family_of_pipeline, family_of_spec
from pipeline.models.hashing import config_of, tokenizer_sha256, weights_sha256
from pipeline.system.echo import plural
from pipeline.system.errors import UserError
from shards.buckets import BUCKETS, counts
from shards.location import Location
from shards.manifest import Manifest, difference, read_manifest
from shards.reader import ShardSet
from shards.schema import IMAGES, MANIFEST
from shards.store import at_once, open_store


def open_latents(directory: Location) -> ShardSet:
    """Finished latents. Raises ShardError if they are not, and UserError if they hold no images."""
    latents = ShardSet(open_store(directory), "latents", manifest=manifest_at(directory, "latents"))
    if not len(latents):
        raise UserError(f"{directory} holds no images: all were skipped. See its skipped.jsonl for the reasons.")
    return latents


def manifest_at(place: Location, stage: str | None = None) -> Manifest:
    """The manifest of a directory or an address. It knows whether that is the images of a cache."""
    manifest = read_manifest(open_store(place), stage)
    if manifest.is_cache or place.name != IMAGES or place.parent is None:
        return manifest
    return replace(manifest, in_cache=True) if open_store(place.parent).exists(MANIFEST) else manifest


def captions_of(latents: ShardSet, count: int) -> list[str]:
    """Up to `count` captions, evenly spread over the images."""
    chosen = np.linspace(0, len(latents) - 1, min(count, len(latents))).astype(int)
    return list(at_once(latents.store, lambda index: latents.read(int(index), ()).meta["caption"], chosen))


def sampling_size(latents: ShardSet, config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The size in pixels of images by a U-Net of this config: None for its own, or as large as the data. Of data in
    buckets that is the square."""
    resolution = latents.manifest.spec["resolution"]
    return None if config["sample_size"] else (resolution, resolution)


def size_in_words(spec: dict[str, Any]) -> str:
    """The size of the images of latents, by their spec: `512 px`."""
    of_buckets = f" in {plural(len(counts(spec)), 'aspect ratio')}" if BUCKETS in spec else ""
    return f"{spec['resolution']} px{of_buckets}"


def check_encoders(latents: ShardSet, base: DiffusionPipeline, model: str) -> None:
    """Raise UserError if the latents were made with a pipeline of another family, or with another VAE, text encoder or
    tokenizer than those of `base`.

    `model` is how the message calls the pipeline, such as `--teacher path`.
    """
    spec = latents.manifest.spec
    family, its_own = family_of_spec(spec), family_of_pipeline(base)
    if family is not its_own:
        raise UserError(
            f"{latents.store} was encoded with a pipeline of {family.title}, and {model} is of {its_own.title}. "
            "Use the pipeline that it was encoded with, or encode again."
        )
    other = other_part(spec, encoders_spec(base, family))
    if other:
        raise UserError(
            f"{latents.store} was encoded with another {other[0]} than the one of {model}{other[1]}. "
            "Use the pipeline that it was encoded with, or encode again."
        )


def encoders_spec(base: DiffusionPipeline, family: Family) -> dict[str, Any]:
    """What the spec of latents states of the parts that made them."""
    return {
        "scaling_factor": base.vae.config.scaling_factor,
        **{f"{part}_sha256": weights_sha256(getattr(base, part)) for part in family.encoders},
        **{f"{part}_sha256": tokenizer_sha256(getattr(base, part)) for part in family.tokenizers},
        "configs": {part: config_of(getattr(base, part)) for part in family.encoders},
    }


def other_part(spec: dict[str, Any], used: dict[str, Any]) -> tuple[str, str] | None:
    """The first part that the specs of two latents state differently, and in what if that is its config.

    What only one of them states, because an earlier version wrote the other, counts as the same.
    """
    family = family_of_spec(spec)
    for part in (*family.encoders, *family.tokenizers):
        name, key = {"vae": "VAE"}.get(part, part.replace("_", " ")), f"{part}_sha256"
        if key in spec and key in used and spec[key] != used[key]:
            return name, ""
        stated = [latents["configs"].get(part) for latents in (spec, used) if "configs" in latents]
        keys = [line.split(":")[0] for line in difference(*stated)] if len(stated) == 2 else []
        if part == "vae" and spec["scaling_factor"] != used["scaling_factor"]:
            keys = list(dict.fromkeys([*keys, "scaling_factor"]))
        if keys:
            return name, f": their config.json differ in {', '.join(keys)}"
    return None

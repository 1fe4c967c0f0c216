"""The spec of a cache: what its entries are, and what is refused before any is written."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from pipeline.cache.output import existing_manifest
from pipeline.cache.parts import TAP_SET
from pipeline.cache.taps import tap_specs
from pipeline.models.families import family_of_spec
from pipeline.models.hashing import as_stated, config_of, library_versions, weights_sha256
from pipeline.models.levels.tap_sets import BLOCKS
from pipeline.models.shapes import tap_shapes
from pipeline.models.students import levels_of, refuse_foreign
from pipeline.models.tap_pairs import taps_of_teacher
from pipeline.settings.teacher_cache import TeacherCacheSettings
from pipeline.system.device import resolve_dtype
from pipeline.system.errors import UserError
from shards.buckets import BUCKETS, of_bucket
from shards.buckets import counts as bucket_counts
from shards.location import Location
from shards.manifest import Manifest, known_to
from shards.reader import ShardSet
from shards.schema import conditioning_shapes


def cache_spec(
    settings: TeacherCacheSettings,
    latents: ShardSet,
    unet: UNet2DConditionModel,
    noise_scheduler: DDPMScheduler,
    device: torch.device,
) -> dict[str, Any]:
    """What the entries are. `strata` is the number of rounds of the first run and never changes."""
    found = existing_cache(settings.out)
    config = dict(noise_scheduler.config)
    spec = {
        "stage": "cache",
        **counted_entries(latents),
        "entries_per_shard": settings.entries_per_shard,
        "strata": found.spec["strata"] if found else settings.rounds,
        "seed": settings.seed,
        "taps": wanted_taps(checked_taps(settings, latents, dict(unet.config)), found),
        **({} if settings.taps == BLOCKS else {TAP_SET: settings.taps}),
        "codec": {"name": settings.codec, **({"snr_db": settings.snr_db} if settings.codec == "dither" else {})},
        "noise_offset": settings.noise_offset,
        "input_perturbation": settings.input_perturbation,
        "uncond_fraction": settings.uncond_fraction,
        "prediction_type": noise_scheduler.config.prediction_type,
        "noise_scheduler": {key: config[key] for key in sorted(config) if not key.startswith("_")},
        "dtype": resolve_dtype(settings.dtype, device),
        "teacher_sha256": weights_sha256(unet, torch.float32),
        "teacher_config": as_stated(config_of(unet), found.spec.get("teacher_config") if found else None),
        "latents": latents.manifest.spec,
        "libraries": library_versions(),
    }
    return known_to(found.spec, spec) if found else spec


def counted_entries(latents: ShardSet) -> dict[str, Any]:
    """The entries of a round as the spec of the cache states them: all, and where there are buckets, those of each."""
    if BUCKETS not in latents.manifest.spec:
        return {"entries": len(latents)}
    return {"entries": len(latents), BUCKETS: [{"entries": count} for count in latents.counts()]}


def existing_cache(out: Location) -> Manifest | None:
    """The manifest of the cache in `out`, if there is one. Raises UserError for one that is not added to."""
    found = existing_manifest(out, "cache")
    if found is not None and found.has_own_images:
        raise UserError(
            f"{out} holds a cache of format 1, which this version reads but does not add to. Train from it as it is "
            f"(`distill-sd distill --cache {out}`), or make a new one in another --out; the latents can stay."
        )
    return found


def wanted_taps(taps: dict[str, Any], found: Manifest | None) -> dict[str, Any]:
    """The taps of the spec: those of the existing cache, if it already has all that are wanted."""
    stored = found.spec["taps"] if found else {}
    return stored if all(stored.get(tap) == tap_spec for tap, tap_spec in taps.items()) else taps


def checked_taps(settings: TeacherCacheSettings, latents: ShardSet, config: dict[str, Any]) -> dict[str, Any]:
    """The taps of the cache's spec, where there are buckets a list for each tap. Raises UserError for a teacher that
    the levels do not fit."""
    spec = latents.manifest.spec
    family = family_of_spec(spec)
    levels = levels_of(settings.students, family)
    refuse_foreign(levels, family, f"--teacher {settings.teacher}")
    try:
        family.check(config)
    except ValueError as error:
        raise UserError(f"--teacher {settings.teacher}: {error}. Pass a teacher of that family.") from None
    taps, conditioning = taps_of_teacher(config, levels, settings.taps), conditioning_shapes(spec)
    described = []
    for bucket in range(len(bucket_counts(spec))):
        shape = of_bucket(spec, bucket)["latents_shape"]
        described.append(tap_specs(settings, tap_shapes(config, shape, conditioning, taps, family)))
    return {tap: [each[tap] for each in described] for tap in taps} if BUCKETS in spec else described[0]

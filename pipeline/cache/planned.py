"""What a run still has to write: its shards, and what their entries take."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from torch import nn

from pipeline.cache import sizes
from pipeline.cache.cache_spec import existing_cache
from pipeline.cache.images import bytes_to_copy
from pipeline.cache.latents_spec import sizes_of
from pipeline.cache.parts import BASE, student_part
from pipeline.models.families import family_of_spec
from pipeline.models.students import levels_of, meta_student
from pipeline.settings.teacher_cache import TeacherCacheSettings
from pipeline.system.options import range_of
from shards.buckets import counts as bucket_counts
from shards.buckets import of_bucket
from shards.manifest import Manifest
from shards.plan import PlannedShard, ShardPlan, count_entries
from shards.reader import ShardSet
from shards.schema import conditioning_shapes
from shards.store import open_store


def latents_sizes(spec: dict[str, Any], shards: list[PlannedShard]) -> list[sizes.Planned]:
    """What the entries of shards take, for each bucket."""
    dtypes, conditioning = family_of_spec(spec).dtypes, conditioning_shapes(spec)
    return [
        sizes.Planned(
            f"{width} x {height} px",
            count_entries([shard for shard in shards if shard.bucket == bucket]),
            sizes.latents_entry(of_bucket(spec, bucket)["latents_shape"], conditioning, dtypes),
        )
        for bucket, (height, width) in enumerate(sizes_of(spec))
    ]


def bytes_left(
    settings: TeacherCacheSettings,
    out: Path,
    latents: ShardSet,
    spec: dict[str, Any],
    base_bytes: int,
    unet: UNet2DConditionModel,
) -> int:
    """About how many bytes a run adds to --out: shards, the `base_bytes` of base/, and students."""
    found = existing_cache(settings.out)
    unfinished = shards_left(settings, latents, found)
    written = sizes.total_bytes(cache_sizes(latents.manifest.spec, spec["taps"], settings, unfinished))
    shards = bytes_to_copy(latents, out, found) + written
    levels = levels_of(settings.students, family_of_spec(latents.manifest.spec))
    students = [level for level in levels if not (out / student_part(level)).is_dir()]
    weights = bytes_in_float32(meta_student(dict(unet.config), level) for level in students)
    return shards + weights + (0 if (out / BASE).is_dir() else base_bytes)


def bytes_in_float32(networks: Iterable[nn.Module]) -> int:
    return sum(4 * parameter.numel() for network in networks for parameter in network.parameters())


def shards_left(settings: TeacherCacheSettings, latents: ShardSet, found: Manifest | None) -> list[PlannedShard]:
    """The shards that a run writes: those of --shard-range that are unfinished, of all rounds that `found` has too.
    Of a rolling cache, as many as are added to what is there until the window is full."""
    rounds = max(settings.rounds, (found.rounds or 0) if found else 0)
    plan = ShardPlan(len(latents), settings.entries_per_shard, rounds, buckets=latents.counts())
    unfinished = plan.unfinished(open_store(settings.out), range_of(settings.shard_range))
    if settings.window is None:
        return unfinished
    there = len(plan) - len(unfinished)
    return plan.shards[there : settings.window * plan.in_round]


def cache_sizes(
    latents_spec: dict[str, Any], taps: dict[str, Any], settings: TeacherCacheSettings, shards: list[PlannedShard]
) -> list[sizes.Planned]:
    """What the entries of shards take, for each bucket of the latents. `taps` is as in the spec of the cache."""
    spec = {"latents": latents_spec, "taps": taps}
    planned = []
    for bucket in range(len(bucket_counts(latents_spec))):
        stated = of_bucket(spec, bucket)
        shape = stated["latents"]["latents_shape"]
        kept = settings.codec, settings.snr_db, settings.input_perturbation > 0
        entries = count_entries([shard for shard in shards if shard.bucket == bucket])
        named = " x ".join(map(str, shape[1:]))
        planned.append(sizes.Planned(f"latents of {named}", entries, sizes.cache_entry(shape, stated["taps"], *kept)))
    return planned

"""Whether latents are still those that the finished shards of a cache were made from.

`encode` may write a shard again, as after an image was replaced. The spec stays the same then.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache.output import existing_manifest, range_of
from pipeline.system.echo import printable
from pipeline.system.errors import UserError
from shards.manifest import Manifest, sha256_of_json
from shards.plan import PlannedShard
from shards.reader import ShardSet, Sidecar, read_entry, read_sidecar
from shards.schema import LATENTS, image_of, sidecar_name
from shards.store import open_store

# Other hardware gives other latents, but their mean square differs by much less than this share.
TOLERANCE = 1e-3


def refuse_replaced(out: Path, spec: dict[str, Any], latents: ShardSet, shard_range: str | None) -> None:
    """Raise UserError if the cache in `out`, of the same `spec`, holds targets of images that are others now.

    Only the sidecars are read, unless checksums differ.
    """
    manifest = existing_manifest(out, "cache")
    if manifest is None or manifest.spec_sha256 != sha256_of_json(spec):
        return
    found = list(_replaced(out, manifest, latents, range_of(shard_range)))
    if not found:
        return
    shard, image = found[0]
    names = list(dict.fromkeys(shard for shard, _ in found))
    files = ", ".join(f"{name} and {sidecar_name(name)}" for name in names)
    raise UserError(
        printable(
            f"the latents of {image} in {latents.store} were written again, for another image, after {out}/{shard} was "
            f"made from them. That is so for {len(found)} entries in {len(names)} shards. To make them again, delete "
            f"{files} in {out}, and rerun the same command. The other shards are kept."
        )
    )


def _replaced(out: Path, manifest: Manifest, latents: ShardSet, part: slice) -> Iterator[tuple[str, str]]:
    """(shard of the cache, the image's name) for each entry in a finished shard that was made from other latents."""
    store = open_store(out)
    unfinished = set(manifest.plan.unfinished(store, part))
    for shard in manifest.plan.shards[part]:
        if shard in unfinished:
            continue
        sidecar = read_sidecar(store, shard.name, manifest.spec_sha256)
        for place, index in _other_checksums(shard, sidecar, latents):
            old = read_entry(store, sidecar, place, [LATENTS], {})
            new = latents.read(index, [LATENTS])
            other = _differ(old.tensors[LATENTS].values, new.tensors[LATENTS].values)
            if other or image_of(old.key) != image_of(new.key):
                yield shard.name, old.meta["source_id"]


def _other_checksums(shard: PlannedShard, sidecar: Sidecar, latents: ShardSet) -> Iterator[tuple[int, int]]:
    """(place in the shard, index in the latents) of the entries whose latents have another checksum there."""
    for place, (key, index) in enumerate(zip(sidecar.keys, shard.indices, strict=False)):
        image, checksum = latents.checksum(index, LATENTS)
        if image_of(image) != image_of(key) or checksum != sidecar.checksum(place, LATENTS):
            yield place, index


def _differ(old: np.ndarray, new: np.ndarray) -> bool:
    difference = np.square(old.astype(np.float64) - new.astype(np.float64)).mean()
    return bool(difference > TOLERANCE * np.square(old.astype(np.float64)).mean())

"""Whether latents are still those that the finished shards of a cache were made from.

`encode` may write a shard again, as after an image was replaced. The spec stays the same then.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache.output import existing_manifest
from pipeline.system.echo import plural, printable
from pipeline.system.errors import UserError
from pipeline.system.options import range_of
from shards.manifest import Manifest, sha256_of_json
from shards.reader import ShardSet, read_entry, read_sidecar
from shards.schema import LATENTS, files_of, image_of
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
    count = f"{plural(len(found), 'entry', 'entries')} in {plural(len(names), 'shard')}"
    raise UserError(
        printable(
            f"the latents of {image} in {latents.store} were written again, for another image, after {out}/{shard} was "
            f"made from them. That is so for {count}. To make them again, delete "
            f"{files_of(names)} in {out}, and rerun the same command. The other shards are kept."
        )
    )


def _replaced(out: Path, manifest: Manifest, latents: ShardSet, part: slice) -> Iterator[tuple[str, str]]:
    """(shard of the cache, the image's name) for each entry in a finished shard that was made from other latents."""
    store = open_store(out)
    unfinished = set(manifest.plan.unfinished(store, part))
    finished = [shard for shard in manifest.plan.shards[part] if shard not in unfinished]
    if not finished:
        return
    images, checksums = latents.checksums(LATENTS)
    for shard in finished:
        sidecar = read_sidecar(store, shard.name, manifest.spec_sha256)
        indices = np.array(shard.indices[: sidecar.count], dtype=np.int64)
        count = len(indices)
        others = images[indices] != sidecar.images[:count]
        others |= checksums[indices] != sidecar.checksums(LATENTS)[:count]
        for place in np.flatnonzero(others).tolist():
            old = read_entry(store, sidecar, place, [LATENTS], {})
            new = latents.read(int(indices[place]), [LATENTS])
            other = _differ(old.tensors[LATENTS].values, new.tensors[LATENTS].values)
            if other or image_of(old.key) != image_of(new.key):
                yield shard.name, old.meta["source_id"]


def _differ(old: np.ndarray, new: np.ndarray) -> bool:
    difference = np.square(old.astype(np.float64) - new.astype(np.float64)).mean()
    return bool(difference > TOLERANCE * np.square(old.astype(np.float64)).mean())

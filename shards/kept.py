"""The entries of a shard that an interrupted run had written, kept for the next run.

`.s00003.tar.kept` is the beginning of the tar, up to the end of an entry; `.s00003.index.kept`, written after it, says
what it holds. A run that goes on from there ends in the same bytes as one that nobody interrupted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO

from shards.manifest import Manifest, sha256_of_json
from shards.schema import json_bytes
from shards.sidecar import Row
from shards.store import CHUNK, Store


@dataclass(frozen=True)
class Kept:
    """The first entries of a shard: their rows of the sidecar's table, and the inputs skipped so far."""

    shard: str
    rows: tuple[Row, ...]
    skipped: tuple[dict[str, str], ...]

    @property
    def length(self) -> int:
        """The bytes of the tar up to the end of the last entry."""
        return self.rows[-1].end if self.rows else 0

    def first(self, count: int) -> Kept:
        """The first `count` of the entries."""
        return replace(self, rows=self.rows[:count])


def kept_name(name: str) -> str:
    return f".{name}.kept"


def keep(store: Store, kept: Kept, manifest: Manifest, written: IO[bytes]) -> None:
    """Keep those entries that lie complete in `written`, the beginning of the tar, which can be read."""
    written.flush()
    available = written.seek(0, 2)
    kept = kept.first(sum(row.end <= available for row in kept.rows))
    if not kept.rows:
        return
    written.seek(0)
    digest, left = hashlib.sha256(), kept.length
    with store.write(kept_name(kept.shard)) as stream:
        while left and (chunk := written.read(min(left, CHUNK))):
            digest.update(chunk)
            left -= stream.write(chunk)
    content = {
        "format": manifest.version,
        "spec_sha256": manifest.spec_sha256,
        "calibration_sha256": manifest.calibration_sha256,
        "tar_sha256": digest.hexdigest(),
        "rows": [[row.key, row.image_crc32, row.members] for row in kept.rows],
        "skipped": kept.skipped,
    }
    with store.write(kept_name(manifest.sidecar_name(kept.shard))) as stream:
        stream.write(json_bytes({"sha256": sha256_of_json(content), "content": content}, indent=None))


def read_kept(store: Store, shard: str, manifest: Manifest) -> Kept | None:
    """What is kept of a shard; None if that is nothing, or not to be trusted."""
    try:
        described = json.loads(store.read(kept_name(manifest.sidecar_name(shard))))
        content = described["content"]
        if sha256_of_json(content) != described["sha256"]:
            return None
        if content["format"] != manifest.version or content["spec_sha256"] != manifest.spec_sha256:
            return None
        if content["calibration_sha256"] != manifest.calibration_sha256:
            return None
        kept = Kept(shard, tuple(Row(*row) for row in content["rows"]), tuple(content["skipped"]))
        digest = hashlib.sha256()
        for chunk in kept_chunks(store, kept):
            digest.update(chunk)
        return kept if digest.hexdigest() == content["tar_sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def kept_chunks(store: Store, kept: Kept) -> Iterator[bytes]:
    """The tar up to the end of the kept entries."""
    for offset in range(0, kept.length, CHUNK):
        yield store.read_ranges(kept_name(kept.shard), [(offset, min(CHUNK, kept.length - offset))])[0]


def forget(store: Store, shard: str, manifest: Manifest) -> None:
    """Delete what is kept of a shard, its description first."""
    store.delete(kept_name(manifest.sidecar_name(shard)))
    store.delete(kept_name(shard))

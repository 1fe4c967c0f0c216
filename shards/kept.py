"""The entries of a shard that an interrupted run had written, kept for the next run.

`.s00003.tar.kept` is the beginning of the tar, up to the end of an entry; `.s00003.json.kept`, written after it, says
what it holds. A run that goes on from there ends in the same bytes as one that nobody interrupted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO

from shards.manifest import sha256_of_json
from shards.schema import BLOCK, FORMAT_VERSION, json_bytes, sidecar_name
from shards.store import CHUNK, Store

Rows = dict[str, list[int]]


@dataclass(frozen=True)
class Kept:
    """The first entries of a shard: their keys, their rows of the sidecar's table, and the inputs skipped so far."""

    shard: str
    keys: tuple[str, ...]
    table: tuple[Rows, ...]
    skipped: tuple[dict[str, str], ...]

    @property
    def length(self) -> int:
        """The bytes of the tar up to the end of the last entry."""
        return end_of(self.table[-1]) if self.table else 0

    def first(self, count: int) -> Kept:
        """The first `count` of the entries."""
        return replace(self, keys=self.keys[:count], table=self.table[:count])


def end_of(rows: Rows) -> int:
    """Where an entry's padded data ends in the tar."""
    return max(offset + -(-length // BLOCK) * BLOCK for offset, length, _, _ in rows.values())


def kept_name(name: str) -> str:
    return f".{name}.kept"


def keep(store: Store, kept: Kept, spec_sha256: str, written: IO[bytes]) -> None:
    """Keep those entries that lie complete in `written`, the beginning of the tar, which can be read."""
    written.flush()
    available = written.seek(0, 2)
    kept = kept.first(sum(end_of(rows) <= available for rows in kept.table))
    if not kept.keys:
        return
    written.seek(0)
    digest, left = hashlib.sha256(), kept.length
    with store.write(kept_name(kept.shard)) as stream:
        while left and (chunk := written.read(min(left, CHUNK))):
            digest.update(chunk)
            left -= stream.write(chunk)
    content = {
        "format": FORMAT_VERSION,
        "spec_sha256": spec_sha256,
        "tar_sha256": digest.hexdigest(),
        "keys": kept.keys,
        "table": kept.table,
        "skipped": kept.skipped,
    }
    with store.write(kept_name(sidecar_name(kept.shard))) as stream:
        stream.write(json_bytes({"sha256": sha256_of_json(content), "content": content}, indent=None))


def read_kept(store: Store, shard: str, spec_sha256: str) -> Kept | None:
    """What is kept of a shard; None if that is nothing, or not to be trusted."""
    try:
        described = json.loads(store.read(kept_name(sidecar_name(shard))))
        content = described["content"]
        if sha256_of_json(content) != described["sha256"]:
            return None
        if content["format"] != FORMAT_VERSION or content["spec_sha256"] != spec_sha256:
            return None
        kept = Kept(shard, tuple(content["keys"]), tuple(content["table"]), tuple(content["skipped"]))
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


def forget(store: Store, shard: str) -> None:
    """Delete what is kept of a shard, its description first."""
    store.delete(kept_name(sidecar_name(shard)))
    store.delete(kept_name(shard))

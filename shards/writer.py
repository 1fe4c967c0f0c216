"""Writing one shard: a tar in WebDataset form, then the sidecar that marks it as finished."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from shards.codec import encode_npy
from shards.files import HashingFile, atomic_file, write_json
from shards.schema import BLOCK, COLUMNS, FORMAT_VERSION, sidecar_name


@dataclass
class EntryBuilder:
    """One sample on its way into a shard. Add tensors with `add`, then write it."""

    key: str
    meta: dict[str, Any]
    members: dict[str, bytes] = field(default_factory=dict)
    raw_bytes: dict[str, int] = field(default_factory=dict)

    def add_array(self, tensor: str, array: np.ndarray) -> None:
        self.members[f"{tensor}.npy"] = encode_npy(array)

    def add_compressed(self, tensor: str, data: bytes, raw_bytes: int) -> None:
        self.members[f"{tensor}.npy.zst"] = data
        self.raw_bytes[f"{tensor}.npy.zst"] = raw_bytes


def is_finished(directory: Path, shard: str) -> bool:
    return (directory / sidecar_name(shard)).is_file()


def write_shard(
    directory: Path, shard: str, spec_sha256: str, entries: Iterable[EntryBuilder], skipped: list[dict[str, str]]
) -> None:
    """Write `entries` as directory/shard, then its sidecar; nothing appears under either name before.

    The tar is hashed while it is written, synced and renamed; the sidecar follows in the same way and
    is the only mark of a finished shard. `skipped` is read after the last entry, so a producer may
    append to it as it goes. Members have mtime 0: equal entries give equal bytes.
    """
    keys: list[str] = []
    table: list[dict[str, list[int]]] = []
    with atomic_file(directory / shard) as stream:
        hashing = HashingFile(stream)
        with webdataset.TarWriter(hashing, encoder=False, mtime=0) as tar:
            for entry in entries:
                keys.append(entry.key)
                table.append(_write_entry(tar, entry))
    members = sorted(table[0]) if table else []
    assert all(sorted(located) == members for located in table), "the entries of a shard differ in their members"
    sidecar = {
        "format": FORMAT_VERSION,
        "spec_sha256": spec_sha256,
        "shard": shard,
        "count": len(keys),
        "bytes": hashing.length,
        "sha256": hashing.hexdigest(),
        "skipped": skipped,
        "columns": COLUMNS,
        "members": members,
        "keys": keys,
        "table": [[located[name] for name in members] for located in table],
    }
    write_json(directory / sidecar_name(shard), sidecar, indent=None)


def _write_entry(tar: webdataset.TarWriter, entry: EntryBuilder) -> dict[str, list[int]]:
    """Append one entry; returns, for each member, its row of the table: [offset, length, raw_bytes, crc32]."""
    meta = json.dumps(entry.meta, allow_nan=False, ensure_ascii=False).encode()
    members = {"json": meta, **entry.members}
    position = tar.tarstream.offset
    located = {}
    for name in sorted(members):
        data = members[name]
        raw_bytes = entry.raw_bytes.get(name, len(data))
        located[name] = [position + BLOCK, len(data), raw_bytes, zlib.crc32(data)]
        position += BLOCK + -(-len(data) // BLOCK) * BLOCK
    tar.write({"__key__": entry.key, **members})
    assert tar.tarstream.offset == position, "a member took other than one header block"
    return located

"""Writing one shard: a tar in WebDataset form, then the sidecar that marks it as finished."""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import webdataset

from shards.codec import encode_npy
from shards.kept import Kept, forget, keep, kept_chunks
from shards.manifest import Manifest
from shards.schema import BLOCK
from shards.sidecar import Row, crc32_of_tensors, make_sidecar
from shards.store import CHUNK, Store, read_chunks, scratch

# Seconds between looks for the sidecar of a tar that another writer put.
PATIENCE = (1.0, 2.0, 4.0, 8.0)


@dataclass
class EntryBuilder:
    """An entry on its way into a shard: add its tensors, then write it.

    `source_id` names its image. An entry of a cache has the `image_crc32` of its image's row; latents get that of their
    own tensors.
    """

    key: str
    meta: dict[str, Any]
    source_id: str = ""
    image_crc32: int | None = None
    members: dict[str, bytes] = field(default_factory=dict)
    raw_bytes: dict[str, int] = field(default_factory=dict)

    def add_array(self, tensor: str, array: np.ndarray) -> None:
        self.members[f"{tensor}.npy"] = encode_npy(array)

    def add_compressed(self, tensor: str, data: bytes, raw_bytes: int) -> None:
        self.members[f"{tensor}.npy.zst"] = data
        self.raw_bytes[f"{tensor}.npy.zst"] = raw_bytes


class HashingStream:
    """A binary stream that takes the sha256 and the length of the bytes written through it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._sha256 = hashlib.sha256()
        self.length = 0

    def write(self, data: bytes) -> int:
        self._sha256.update(data)
        self.length += len(data)
        return self._stream.write(data)

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


def write_shard(
    store: Store,
    shard: str,
    manifest: Manifest,
    entries: Iterable[EntryBuilder],
    skipped: list[dict[str, str]],
    kept: Kept | None = None,
) -> None:
    """Write `entries` as the tar `shard`, then its sidecar. Neither file appears before it is complete.

    With what an interrupted run `kept`, `entries` are those that follow. If it ends early, by Ctrl-C or by an error,
    what is written is kept.

    The tar is hashed as it is written; one that is to be uploaded lies in a temporary file until then. The sidecar
    follows and is the only mark of a finished shard. `skipped` is read after the last entry, so a producer may append
    to it while it yields entries. Members have mtime 0, so equal entries give equal bytes.
    """
    if store.in_flight == 1:
        with store.write(shard) as stream:
            sidecar, _ = _write_tar(stream, store, shard, manifest, entries, skipped, kept)
        with store.write(manifest.sidecar_name(shard)) as stream:
            stream.write(sidecar)
    else:
        with scratch() as stream:
            sidecar, sha256 = _write_tar(stream, store, shard, manifest, entries, skipped, kept)
            _upload(store, shard, manifest, stream, sidecar, sha256)
    forget(store, shard, manifest)


def _write_tar(
    stream: IO[bytes],
    store: Store,
    shard: str,
    manifest: Manifest,
    entries: Iterable[EntryBuilder],
    skipped: list[dict[str, str]],
    kept: Kept | None,
) -> tuple[bytes, str]:
    """Write the tar of a shard to a stream. Returns its sidecar and its sha256."""
    rows = list(kept.rows) if kept else []
    hashing = HashingStream(stream)
    for chunk in kept_chunks(store, kept) if kept else ():
        hashing.write(chunk)
    with webdataset.TarWriter(hashing, encoder=False, mtime=0) as tar:
        tar.tarstream.offset = hashing.length
        try:
            for entry in entries:
                rows.append(_write_entry(tar, entry))
        except BaseException:
            # Where it cannot be kept, as on a full disk, it is written again by the next run.
            with suppress(OSError):
                keep(store, Kept(shard, tuple(rows), tuple(skipped)), manifest, stream)
            raise
    assert len({tuple(sorted(row.members)) for row in rows}) <= 1, "the entries of a shard differ in their members"
    content = make_sidecar(manifest, shard, rows, hashing.length, hashing.hexdigest(), skipped)
    return content, hashing.hexdigest()


def _upload(store: Store, shard: str, manifest: Manifest, tar: IO[bytes], sidecar: bytes, sha256: str) -> None:
    """Put a tar and then its sidecar into a store in which another writer may do the same.

    Nothing is locked. Whoever comes second leaves a finished shard as it is, and where the bytes are equal it does not
    matter who was first. A tar without a sidecar is another writer's, which is about to put that too, or which was
    killed: after some seconds it is replaced.
    """
    name = manifest.sidecar_name(shard)
    try:
        _put(store, shard, _chunks(tar), new=True)
    except FileExistsError:
        if _sha256(store, shard) != sha256:
            if any(_finished_after(store, name, seconds) for seconds in PATIENCE):
                return
            _put(store, shard, _chunks(tar))
    try:
        _put(store, name, [sidecar], new=True)
    except FileExistsError:
        if store.read(name) != sidecar:
            # The other writer's tar may be gone by now. These two belong together.
            _put(store, shard, _chunks(tar))
            _put(store, name, [sidecar])


def _put(store: Store, name: str, data: Iterable[bytes], *, new: bool = False) -> None:
    with store.write(name, new=new) as stream:
        stream.writelines(data)


def _chunks(stream: IO[bytes]) -> Iterator[bytes]:
    """A file from its beginning on."""
    stream.seek(0)
    while chunk := stream.read(CHUNK):
        yield chunk


def _finished_after(store: Store, name: str, seconds: float) -> bool:
    """Whether a sidecar is there, at the latest after so many seconds."""
    if store.exists(name):
        return True
    time.sleep(seconds)
    return store.exists(name)


def _sha256(store: Store, name: str) -> str:
    digest = hashlib.sha256()
    for chunk in read_chunks(store, name):
        digest.update(chunk)
    return digest.hexdigest()


def _write_entry(tar: webdataset.TarWriter, entry: EntryBuilder) -> Row:
    """Append one entry. Returns its row of the table."""
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
    assert tar.tarstream.offset == position, "a member took more than one header block"
    image_crc32 = crc32_of_tensors(located) if entry.image_crc32 is None else entry.image_crc32
    return Row(entry.key, image_crc32, located)

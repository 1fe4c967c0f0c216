"""The images of a cache: what `encode` wrote, linked or copied into its images/, so that the cache needs nothing else.

A link takes no room, and stays when the latents are deleted or written again. Where the cache is on another disk than
the latents, they are copied.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pipeline.system.echo import plural, printable
from pipeline.system.errors import UserError
from shards.files import atomic_file, fsync_directory
from shards.manifest import Manifest, difference, read_manifest
from shards.plan import PlannedShard
from shards.reader import ShardSet, read_entry
from shards.schema import IMAGES, LATENTS, MANIFEST
from shards.sidecar import Sidecar, read_sidecar
from shards.store import LocalStore, open_store

# Other hardware gives other latents, but their mean square differs by much less than this share.
TOLERANCE = 1e-3


def add_images(latents: ShardSet, out: Path) -> ShardSet:
    """The images in a cache, an existing directory; those that it lacks are taken from the latents.

    Raises UserError if it holds other ones already.
    """
    source, images = Path(str(latents.store)), out / IMAGES
    images.mkdir(exist_ok=True)
    if (images / MANIFEST).is_file():
        refuse_others(latents, images)
    names = [*latents.manifest.files, MANIFEST]
    for head in latents.heads:
        names += [head.shard, latents.manifest.sidecar_name(head.shard)]
    missing = [name for name in names if not (images / name).is_file()]
    with tqdm(total=len(missing), unit="file", desc="images", delay=2) as progress:
        for name in missing:
            add_file(source / name, images / name)
            progress.update()
    fsync_directory(images)
    return ShardSet(open_store(images), "latents")


def add_file(source: Path, target: Path) -> None:
    """Link `target` to a file, or copy it where the two are on different disks."""
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError:
        with open(source, "rb") as content, atomic_file(target) as stream:
            shutil.copyfileobj(content, stream, 1 << 20)


def bytes_to_copy(latents: ShardSet, out: Path) -> int:
    """The bytes that `add_images` copies: none on the disk of the latents."""
    nearest = next(place for place in (out.resolve(), *out.resolve().parents) if place.exists())
    if nearest.stat().st_dev == Path(str(latents.store)).stat().st_dev:
        return 0
    store = open_store(out / IMAGES)
    return sum(head.bytes for head in latents.heads if not store.exists(head.shard))


def refuse_others(latents: ShardSet, images: Path) -> None:
    """Raise UserError if the images of a cache are those of other latents."""
    found = read_manifest(open_store(images), "latents")
    lines = difference(found.spec, latents.manifest.spec)
    if lines or found.version != latents.manifest.version:
        shown = "\n".join(f"  {line}" for line in lines or [f"format: {found.version} -> {latents.manifest.version}"])
        raise UserError(
            f"{images} holds the images of other latents than {latents.store} (existing -> requested):\n{shown}\n"
            "Use the latents that the cache was made from, or choose another --out."
        )


def refuse_replaced(out: Path, manifest: Manifest | None, latents: ShardSet, part: slice) -> None:
    """Raise UserError if finished shards of a cache were made from images that are others in the latents now, as after
    an image was replaced and encoded again.

    Only the sidecars are read, and of them the tables only of those that changed.
    """
    if manifest is None or manifest.spec["latents"] != latents.manifest.spec:
        return
    found = list(_replaced(out, manifest, latents, part))
    if not found:
        return
    shard, name, images = found[0]
    shards = list(dict.fromkeys(shard for shard, _, _ in found))
    count = f"{plural(len(found), 'entry', 'entries')} in {plural(len(shards), 'shard')}"
    files = manifest.files_of(shards)
    of_images = latents.manifest.files_of(dict.fromkeys(f"{IMAGES}/{images}" for _, _, images in found))
    raise UserError(
        printable(
            f"the latents of {name} in {latents.store} were written again, for another image, after {out}/{shard} was "
            f"made from them. That is so for {count}. To make them again, delete {files}, and {of_images}, in {out}, "
            "and rerun the same command. The other shards are kept."
        )
    )


def _replaced(out: Path, manifest: Manifest, latents: ShardSet, part: slice) -> Iterator[tuple[str, str, str]]:
    """(shard of the cache, the image's name, shard of the latents) for each entry that was made from another image."""
    store = open_store(out)
    unfinished = set(manifest.plan.unfinished(store, part))
    finished = [shard for shard in manifest.plan.shards[part] if shard not in unfinished]
    if not finished:
        return
    first = 0
    for head in latents.heads:
        if not _same_sidecar(out, latents, head.shard):
            entries = range(first, first + head.count)
            now = read_sidecar(latents.store, head.shard, latents.manifest)
            for shard in finished:
                yield from _others(store, manifest, shard, entries, now, latents)
        first += head.count


def _same_sidecar(out: Path, latents: ShardSet, shard: str) -> bool:
    """Whether the cache holds this shard of the latents as it is now."""
    name, own = latents.manifest.sidecar_name(shard), open_store(out / IMAGES)
    return own.exists(name) and own.read(name) == latents.store.read(name)


def _others(
    store: LocalStore, manifest: Manifest, shard: PlannedShard, entries: range, now: Sidecar, latents: ShardSet
) -> Iterator[tuple[str, str, str]]:
    """As `_replaced`, for the entries of one shard of the cache that were made from `entries`, images of one shard."""
    shared = range(max(entries.start, shard.indices.start), min(entries.stop, shard.indices.stop))
    if not shared:
        return
    made = read_sidecar(store, shard.name, manifest)
    ours = slice(shared.start - shard.indices.start, shared.stop - shard.indices.start)
    theirs = slice(shared.start - entries.start, shared.stop - entries.start)
    others = made.table[ours, :2] != now.table[theirs, :2]
    for number in np.flatnonzero(others.any(axis=1)).tolist():
        place = shared[number] - entries.start
        row = now.row(place)
        image = read_entry(latents.store, now.shard, row, [LATENTS], latents.manifest, latents.expected)
        if not _kept_alike(store, now.shard, place, image.tensors[LATENTS].values, latents):
            yield shard.name, image.meta["source_id"], now.shard


def _kept_alike(store: LocalStore, shard: str, place: int, new: np.ndarray, latents: ShardSet) -> bool:
    """Whether the cache holds this image itself, and it is the same but for the arithmetic of another machine.

    Then the cache goes on with its own.
    """
    own, manifest = store.folder(IMAGES), latents.manifest
    if not own.exists(manifest.sidecar_name(shard)):
        return False
    sidecar = read_sidecar(own, shard, manifest)
    if place >= sidecar.count:
        return False
    row = sidecar.row(place)
    old = read_entry(own, shard, row, [LATENTS], manifest, latents.expected).tensors[LATENTS].values
    difference = np.square(old.astype(np.float64) - new.astype(np.float64)).mean()
    return bool(difference <= TOLERANCE * np.square(old.astype(np.float64)).mean())

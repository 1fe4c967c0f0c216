"""The images of a cache: what `encode` wrote, linked or copied into its images/, so that the cache needs nothing else.

A link takes no room, and stays when the latents are deleted or written again. Where no links can be made, as from one
disk to another, the files are copied. Once targets were made from an image, the cache keeps it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pipeline.system.echo import plural, printable
from pipeline.system.errors import UserError
from shards.cache import images_manifest
from shards.files import atomic_file, file_sha256, fsync_directory, partial_name
from shards.kept import read_kept
from shards.manifest import Manifest, difference
from shards.plan import PlannedShard
from shards.reader import ShardSet, placed_head, read_entry
from shards.schema import IMAGES, LATENTS, MANIFEST, conditioning_shapes, empty_prompt_file, image_of
from shards.sidecar import Head, Sidecar, read_head, read_sidecar
from shards.store import open_store

# Other hardware gives other latents, but their mean square differs by much less than this share.
TOLERANCE = 1e-3


def add_images(latents: ShardSet, out: Path, manifest: Manifest) -> ShardSet:
    """The images in a cache, an existing directory; those that it lacks are taken from the latents.

    Raises UserError if that cannot be done without making finished targets wrong.
    """
    source, images = Path(str(latents.store)), out / IMAGES
    images.mkdir(exist_ok=True)
    # A first link is made in passing; what fills a gap later is checked, since both names may be the same bad file.
    fills_gaps = (images / MANIFEST).is_file()
    shards = shards_to_take(out, manifest, latents)
    files = [empty_prompt_file(name) for name in conditioning_shapes(latents.manifest.spec)]
    names = [name for name in (*files, MANIFEST) if name == MANIFEST or name in latents.manifest.files]
    total = 2 * len(shards) + len(names)
    with tqdm(total=total, unit="file", desc="images", delay=2) as progress:
        for head in shards:
            if fills_gaps and file_sha256(source / head.shard) != head.sha256:
                raise UserError(
                    f"{source / head.shard} is damaged, so it cannot be put into {images}. Run `distill-sd verify "
                    f"{source} --full --remove-damaged`, encode what that removes, and rerun the same command."
                )
            sidecar = latents.manifest.sidecar_name(head.shard)
            # Without its sidecar, a shard that is replaced counts as missing.
            (images / sidecar).unlink(missing_ok=True)
            for name in (head.shard, sidecar):
                add_file(source / name, images / name)
                progress.update()
        for name in names:
            if not (images / name).is_file():
                add_file(source / name, images / name)
            progress.update()
    fsync_directory(images)
    return ShardSet(open_store(images), "latents", manifest=images_manifest(open_store(out)))


def add_file(source: Path, target: Path) -> None:
    """Link `target` to a file, or copy it where that cannot be done. What has that name is replaced."""
    real, temporary = os.path.realpath(source), partial_name(target)
    try:
        os.link(real, temporary)
        os.replace(temporary, target)
    except OSError:
        with open(real, "rb") as content, atomic_file(target) as stream:
            shutil.copyfileobj(content, stream, 1 << 20)
    finally:
        # To replace a link by another one of the same file does nothing.
        temporary.unlink(missing_ok=True)


def bytes_to_copy(latents: ShardSet, out: Path, manifest: Manifest | None, *, try_it: bool) -> int:
    """The bytes that `add_images` copies: none where it can link. Whether it can is tried, or guessed by the disk."""
    missing = sum(head.bytes for head in shards_to_take(out, manifest, latents))
    nearest = next(place for place in (out.resolve(), *out.resolve().parents) if place.exists())
    source = Path(str(latents.store))
    if not missing or not try_it:
        return missing if nearest.stat().st_dev != source.stat().st_dev else 0
    link = partial_name(nearest / "link")
    try:
        os.link(os.path.realpath(source / MANIFEST), link)
        link.unlink()
        return 0
    except OSError:
        return missing


@dataclass(frozen=True)
class Stale:
    """Entries of one shard of a cache that were made from other images than the latents hold now, all of one shard."""

    shard: PlannedShard
    images: np.ndarray


def shards_to_take(out: Path, manifest: Manifest | None, latents: ShardSet) -> list[Head]:
    """The shards of the latents that a cache lacks, and those that it holds otherwise although nothing was made from
    them yet.

    Raises UserError if it holds images of other latents, or if targets were made from an image that is another now.
    Only heads are read, and of the shards that differ the tables.
    """
    if not open_store(out).exists(f"{IMAGES}/{MANIFEST}"):
        return latents.heads
    stated = images_manifest(open_store(out))
    refuse_others(latents, stated, out / IMAGES)
    wanted, replaced = [], []
    first = 0
    for head in latents.heads:
        entries = range(first, first + head.count)
        first = entries.stop
        own = own_head(out, stated, head.shard)
        if own and (own.sha256, own.table_crc32) == (head.sha256, head.table_crc32):
            continue
        now = read_sidecar(latents.store, head.shard, latents.manifest)
        stale = list(stale_entries(out, manifest, entries, now)) if manifest else []
        if not stale:
            wanted.append(head)
        elif not (own and kept_alike(out, stated, latents, now, stale)):
            replaced.append((now, stale))
    if manifest and replaced:
        raise UserError(printable(replaced_message(out, manifest, latents, replaced)))
    return wanted


def own_head(out: Path, stated: Manifest, shard: str) -> Head | None:
    """The head of a shard of a cache's images; None if it lacks the tar or the sidecar."""
    store = open_store(out / IMAGES)
    complete = store.exists(stated.sidecar_name(shard)) and store.exists(shard)
    return read_head(store, shard, stated) if complete else None


def refuse_others(latents: ShardSet, found: Manifest, images: Path) -> None:
    """Raise UserError if the images of a cache are those of other latents."""
    lines = difference(found.spec, latents.manifest.spec)
    if lines or found.version != latents.manifest.version:
        shown = "\n".join(f"  {line}" for line in lines or [f"format: {found.version} -> {latents.manifest.version}"])
        raise UserError(
            f"{images} holds the images of other latents than {latents.store} (existing -> requested):\n{shown}\n"
            "Use the latents that the cache was made from, or choose another --out."
        )


def stale_entries(out: Path, manifest: Manifest, entries: range, now: Sidecar) -> Iterator[Stale]:
    """The entries of a cache's finished and interrupted shards, made from `entries` of the images, that state another
    image than `now`, which holds those."""
    store = open_store(out)
    unfinished = {shard.name for shard in manifest.plan.unfinished(store)}
    for shard in manifest.plan:
        shared = range(max(entries.start, shard.indices.start), min(entries.stop, shard.indices.stop))
        if not shared:
            continue
        made = rows_of(out, manifest, shard, shard.name in unfinished)
        made = made[shared.start - shard.indices.start : shared.stop - shard.indices.start]
        expected = now.table[shared.start - entries.start : shared.stop - entries.start, :2][: len(made)]
        others = np.flatnonzero((made != expected).any(axis=1))
        if len(others):
            yield Stale(shard, others + shared.start - entries.start)


def rows_of(out: Path, manifest: Manifest, shard: PlannedShard, unfinished: bool) -> np.ndarray:
    """(entries, 2): the image and the image_crc32 that each entry of a shard states, as far as it is written."""
    store = open_store(out)
    if not unfinished:
        placed_head(store, shard, manifest)
        return read_sidecar(store, shard.name, manifest).table[:, :2]
    kept = read_kept(store, shard.name, manifest)
    rows = [(image_of(row.key), row.image_crc32) for row in kept.rows] if kept else []
    return np.array(rows, np.int64).reshape(-1, 2)


def kept_alike(out: Path, stated: Manifest, latents: ShardSet, now: Sidecar, stale: list[Stale]) -> bool:
    """Whether the images that a cache holds are the same as `now` but for the arithmetic of another machine, where
    targets were made from them. Then the cache goes on with its own."""
    store = open_store(out / IMAGES)
    own = read_sidecar(store, now.shard, stated)
    for place in np.unique(np.concatenate([entries.images for entries in stale])).tolist():
        if place >= own.count or own.images[place] != now.images[place]:
            return False
        old, new = (
            read_entry(place_of, now.shard, sidecar.row(place), [LATENTS], stated, latents.expected)
            for place_of, sidecar in ((store, own), (latents.store, now))
        )
        if differ(old.tensors[LATENTS].values, new.tensors[LATENTS].values):
            return False
    return True


def differ(old: np.ndarray, new: np.ndarray) -> bool:
    difference = np.square(old.astype(np.float64) - new.astype(np.float64)).mean()
    return bool(difference > TOLERANCE * np.square(old.astype(np.float64)).mean())


def replaced_message(
    out: Path, manifest: Manifest, latents: ShardSet, replaced: list[tuple[Sidecar, list[Stale]]]
) -> str:
    """What was replaced, and which files to delete so that it is made again."""
    now, stale = replaced[0]
    row = now.row(int(stale[0].images[0]))
    name = read_entry(latents.store, now.shard, row, [], latents.manifest, latents.expected).meta["source_id"]
    shards = list(dict.fromkeys(each.shard.name for _, of_images in replaced for each in of_images))
    images = [f"{IMAGES}/{sidecar.shard}" for sidecar, _ in replaced]
    entries = sum(len(each.images) for _, of_images in replaced for each in of_images)
    return (
        f"the latents of {name} in {latents.store} were written again, for another image, after {out}/{shards[0]} was "
        f"made from them. That is so for {plural(entries, 'entry', 'entries')} in {plural(len(shards), 'shard')}. To "
        f"make them again, delete {manifest.files_of(shards)}, and {latents.manifest.files_of(images)}, in {out}, and "
        "rerun the same command. The other shards are kept."
    )

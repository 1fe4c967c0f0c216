"""The images of a cache: what `encode` wrote, linked or copied into its images/, so that the cache needs nothing else.

The tars are linked. A link takes no room, and stays when the latents are deleted or written again. Where no links can
be made, as from one disk to another, tars are copied. The small files are always copied: a tar that is overwritten in
place changes under both names, and then it no longer fits the cache's sidecar. Once targets were made from a shard of
images, the cache keeps that shard.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import shutil
from pathlib import Path

from tqdm import tqdm

from pipeline.system.echo import plural, printable
from pipeline.system.errors import UserError
from shards.buckets import BUCKETS_FILE
from shards.cache import images_manifest, open_images
from shards.files import atomic_file, file_sha256, fsync_directory, partial_name
from shards.location import Location
from shards.manifest import Manifest, difference, read_file
from shards.plan import PlannedShard
from shards.reader import ShardSet
from shards.schema import IMAGES, MANIFEST, conditioning_shapes, empty_prompt_file
from shards.sidecar import Head, read_head, read_sidecar
from shards.store import LocalStore, Store, at_once, open_store, read_chunks

SHOWN = 3


def add_images(latents: ShardSet, out: Location, manifest: Manifest, *, alone: bool) -> ShardSet:
    """The images in a cache, an existing directory or an address; those that it lacks are taken from the latents. What
    it has is replaced only where no targets were made from it, and in a directory only by a job that is `alone` there.

    Raises UserError if that cannot be done without making finished targets wrong.
    """
    if isinstance(out, Path) and isinstance(latents.store, LocalStore):
        link_images(latents, out, manifest, alone=alone)
    else:
        copy_images(latents, out, manifest)
    return open_images(open_store(out), manifest)


def copy_images(latents: ShardSet, out: Location, manifest: Manifest) -> None:
    """Copy images from or to an address. Every byte is compared with the sidecar's checksum on its way."""
    source, images = latents.store, open_store(out).folder(IMAGES)
    if isinstance(images, LocalStore):
        images.directory.mkdir(exist_ok=True)
    heads = shards_to_take(out, manifest, latents)
    with tqdm(total=sum(head.bytes for head in heads), unit="B", unit_scale=True, desc="images", delay=2) as progress:
        for head in heads:
            sidecar, digest = latents.manifest.sidecar_name(head.shard), hashlib.sha256()
            # Without its sidecar, a shard that is replaced counts as missing.
            images.delete(sidecar)
            with images.write(head.shard) as stream:
                for chunk in read_chunks(source, head.shard):
                    digest.update(chunk)
                    progress.update(stream.write(chunk))
                if digest.hexdigest() != head.sha256:
                    raise UserError(
                        f"{source}/{head.shard} is damaged, so it cannot be put into {images}. Run `distill-sd verify "
                        f"{source} --full`, follow what it says, and rerun the same command."
                    )
            with images.write(sidecar) as stream:
                stream.write(source.read(sidecar))
    for name in files_beside(latents.manifest):
        data = read_file(source, latents.manifest, name)
        if not images.exists(name) or images.read(name) != data:
            with images.write(name) as stream:
                stream.write(data)
    if not images.exists(MANIFEST):
        with images.write(MANIFEST) as stream:
            stream.write(source.read(MANIFEST))


def link_images(latents: ShardSet, out: Path, manifest: Manifest, *, alone: bool) -> None:
    """Link or copy images from one directory to another."""
    source, images = Path(str(latents.store)), out / IMAGES
    images.mkdir(exist_ok=True)
    heads = shards_to_take(out, manifest, latents)
    # What fills a gap is checked: both names may be links to the same bad file.
    fills_gaps = (images / MANIFEST).is_file() or any(images.glob("s*.tar"))
    with tqdm(total=len(heads), unit="shard", desc="images", delay=2) as progress:
        for head in heads:
            sidecar = images / latents.manifest.sidecar_name(head.shard)
            if sidecar.exists() and not alone:
                raise UserError(
                    f"{sidecar} is to be replaced, but other jobs write to {out}. Wait until they are done."
                )
            if fills_gaps and file_sha256(source / head.shard) != head.sha256:
                raise UserError(
                    f"{source / head.shard} is damaged, so it cannot be put into {images}. Run `distill-sd verify "
                    f"{source} --full`, follow what it says, and rerun the same command."
                )
            # Without its sidecar, a shard that is replaced counts as missing.
            sidecar.unlink(missing_ok=True)
            link_file(source / head.shard, images / head.shard)
            copy_file(source / sidecar.name, sidecar)
            progress.update()
    for file in files_beside(latents.manifest):
        if not is_intact(images / file, latents.manifest.files[file]):
            read_file(latents.store, latents.manifest, file)
            copy_file(source / file, images / file)
    if not (images / MANIFEST).is_file():
        copy_file(source / MANIFEST, images / MANIFEST)
    fsync_directory(images)


def files_beside(manifest: Manifest) -> list[str]:
    """The files that belong to all shards of latents, by name."""
    names = [BUCKETS_FILE, *map(empty_prompt_file, conditioning_shapes(manifest.spec))]
    return [name for name in names if name in manifest.files]


def is_intact(path: Path, sha256: str) -> bool:
    return path.is_file() and file_sha256(path) == sha256


def copy_file(source: Path, target: Path) -> None:
    """Copy a file to `target`, which appears complete or not at all. What has that name is replaced."""
    with open(source, "rb") as content, atomic_file(target) as stream:
        shutil.copyfileobj(content, stream, 1 << 20)


def link_file(source: Path, target: Path) -> None:
    """Link `target` to a file, or copy it where that cannot be done. What has that name is replaced."""
    real, temporary = os.path.realpath(source), partial_name(target)
    try:
        os.link(real, temporary)
        os.replace(temporary, target)
    except OSError:
        copy_file(Path(real), target)
    finally:
        # To replace a link by another one of the same file does nothing.
        temporary.unlink(missing_ok=True)


def bytes_to_copy(latents: ShardSet, out: Location, manifest: Manifest | None) -> int:
    """The bytes that `add_images` copies: none where it can link, as far as that can be told beforehand."""
    missing = sum(head.bytes for head in shards_to_take(out, manifest, latents))
    if not (isinstance(out, Path) and isinstance(latents.store, LocalStore)):
        return missing
    nearest = next(place for place in (out.resolve(), *out.resolve().parents) if place.exists())
    same_disk = nearest.stat().st_dev == Path(str(latents.store)).stat().st_dev
    return 0 if same_disk else missing


def shards_to_take(out: Location, manifest: Manifest | None, latents: ShardSet) -> list[Head]:
    """The shards of the latents that a cache lacks, and those that it holds otherwise although no targets were made
    from them.

    Raises UserError if it holds images of other latents, or if targets were made from shards that are others now. Heads
    are read, and tables of shards that a cache with targets lacks.
    """
    store = open_store(out)
    stated = images_manifest(store) if store.exists(f"{IMAGES}/{MANIFEST}") else latents.manifest
    refuse_others(latents, stated, out)
    unfinished = {shard.name for shard in manifest.plan.unfinished(store)} if manifest else set()
    wanted, replaced, first = [], [], 0
    images = store.folder(IMAGES)
    owns = at_once(images, lambda head: own_head(images, stated, head.shard), latents.heads)
    for head, own in zip(latents.heads, owns, strict=True):
        entries = range(first, first + head.count)
        first = entries.stop
        if own and (own.sha256, own.table_crc32) == (head.sha256, head.table_crc32):
            continue
        made = [shard for shard in covering(manifest, entries) if shard.name not in unfinished] if manifest else []
        if manifest and made and (own or any(differs(out, manifest, shard, entries, latents, head) for shard in made)):
            replaced.append((head, made))
        else:
            wanted.append(head)
    if manifest and replaced:
        raise UserError(printable(replaced_message(out, manifest, latents, replaced)))
    return wanted


def own_head(images: Store, stated: Manifest, shard: str) -> Head | None:
    """The head of a shard of a cache's images; None if they lack the tar or the sidecar."""
    complete = images.exists(stated.sidecar_name(shard)) and images.exists(shard)
    return read_head(images, shard, stated) if complete else None


def refuse_others(latents: ShardSet, found: Manifest, out: Location) -> None:
    """Raise UserError if the images of a cache are those of other latents."""
    lines = difference(found.spec, latents.manifest.spec)
    if lines or found.version != latents.manifest.version:
        shown = "\n".join(f"  {line}" for line in lines or [f"format: {found.version} -> {latents.manifest.version}"])
        raise UserError(
            f"{out / IMAGES} holds the images of other latents than {latents.store} (existing -> requested):\n{shown}\n"
            f"Go on with them by --latents {out / IMAGES}, or choose another --out."
        )


def covering(manifest: Manifest, entries: range) -> list[PlannedShard]:
    """The shards of all rounds of a cache that are made from `entries` of its images."""
    shards = manifest.plan.shards
    in_round = len(shards) // (manifest.rounds or 1)
    one_round = range(in_round)
    first = bisect.bisect_right(one_round, entries.start, key=lambda place: shards[place].indices.stop)
    end = bisect.bisect_left(one_round, entries.stop, key=lambda place: shards[place].indices.start)
    places = range(first, end) if entries else range(0)
    return [shards[first + place] for first in range(0, len(shards), in_round or 1) for place in places]


def overlap(shard: PlannedShard, entries: range) -> range:
    """The images of a shard of a cache that are among `entries`."""
    return range(max(entries.start, shard.indices.start), min(entries.stop, shard.indices.stop))


def differs(
    out: Location, manifest: Manifest, shard: PlannedShard, entries: range, latents: ShardSet, head: Head
) -> bool:
    """Whether a finished shard states other images than the latents hold now, in a shard that has `entries`."""
    shared = overlap(shard, entries)
    made = read_sidecar(open_store(out), shard.name, manifest).table[:, :2]
    now = read_sidecar(latents.store, head.shard, latents.manifest).table[:, :2]
    made = made[shared.start - shard.indices.start : shared.stop - shard.indices.start]
    now = now[shared.start - entries.start : shared.stop - entries.start]
    return made.shape != now.shape or bool((made != now).any())


def replaced_message(
    out: Location, manifest: Manifest, latents: ShardSet, replaced: list[tuple[Head, list[PlannedShard]]]
) -> str:
    """What was written again, and what can be done."""
    images = [f"{IMAGES}/{head.shard}" for head, _ in replaced]
    made = list(dict.fromkeys(shard.name for _, shards in replaced for shard in shards))
    more = f" and {plural(len(replaced) - 1, 'more shard')}" if len(replaced) > 1 else ""
    shared = False
    if isinstance(out, Path) and isinstance(latents.store, LocalStore):
        pairs = [(out / name, latents.store.directory / Path(name).name) for name in images]
        shared = any(own.exists() and own.samefile(theirs) for own, theirs in pairs)
    own = (
        "It was overwritten in place, and the cache's own images with it: restore it, or"
        if shared
        else f"To go on with the cache's own images, pass --latents {out / IMAGES}. For the new ones,"
    )
    what = (
        f"{latents.store}/{replaced[0][0].shard}{more} changed after {out} was made from it. {own} choose another --out"
    )
    if len(images) > SHOWN:
        return f"{what}."
    return (
        f"{what}, or delete {latents.manifest.files_of(images)}, and {manifest.files_of(made)}, in {out}, and rerun "
        "the same command, which makes only these again."
    )

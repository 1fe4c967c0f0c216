"""A cache as its readers see it: each entry's targets joined with its image.

The rounds hold the targets, and images/ holds once what `encode` wrote. An entry states which image it was made from.
In a cache of format 1 each entry holds its image itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from shards.buckets import of_bucket
from shards.calibration import Calibration, read_calibrations, spec_of_calibrations
from shards.codec import decode_npy
from shards.expected import image_tensors, target_tensors
from shards.manifest import Manifest, known_to, read_file, read_manifest, sha256_of_json
from shards.reader import ShardSet, StoredEntry, StoredTensor, read_entry
from shards.rolling import RollingSet
from shards.schema import CALIBRATION, IMAGES, MANIFEST, ShardError, conditioning_shapes, empty_prompt_file, image_of
from shards.sidecar import Row, damaged
from shards.store import Store

RESTORE_EMPTY = "Restore it from a backup, or make a new cache from the latents."
RESTORE = (
    "Restore the image or the entry from a backup, or delete this shard's files and rerun `distill-sd teacher-cache`, "
    "which makes its entries from the images that are there."
)


class Cache:
    """The entries of a finished cache, numbered from 0, round after round. With `rounds` N, those of the first N.

    A cache may be a `rolling` one: then only entries of rounds that are there can be read. Raises ShardError for a
    cache that is unfinished, damaged, or whose images are not its own.
    """

    def __init__(self, store: Store, rounds: int | None = None, *, rolling: bool = False) -> None:
        self.store = store
        self.targets = RollingSet(store, rounds) if rolling else ShardSet(store, "cache", rounds)
        self.images = None if self.manifest.has_own_images else open_images(store, self.manifest)
        self._empty = empty_prompt(self.images) if self.images else {}
        self.tensors = [*image_tensors(of_bucket(self.manifest.spec, 0)), *target_tensors(self.manifest)]

    @property
    def manifest(self) -> Manifest:
        return self.targets.manifest

    def calibrations(self) -> dict[str, Calibration]:
        """The calibrations of the taps, by name; empty where taps are not rotated."""
        return stored_calibrations(self.store, self.manifest)

    def digest(self) -> str:
        """As that of a ShardSet, of the targets and their images. What a rolling cache will hold nobody knows."""
        assert isinstance(self.targets, ShardSet)
        sets = [self.targets, self.images] if self.images else [self.targets]
        return sha256_of_json([shards.digest() for shards in sets])

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, index: int, tensors: Iterable[str]) -> StoredEntry:
        """Entry `index` with the named tensors, of its image and of its targets. Raises ShardError for one that is
        missing, damaged or not as the spec says, and for one whose image is another."""
        if self.images is None:
            assert isinstance(self.targets, ShardSet)
            return self.targets.read(index, tensors)
        images = self.images
        of_image = images.tensors
        shard, row = self.targets.row(index)
        image_shard, image_row = images.row(index % len(images))
        check_image(f"{self.store}/{shard}", row, f"{images.store}/{image_shard}", image_row)
        names = list(tensors)
        own = [name for name in names if name not in of_image]
        entry = read_entry(self.store, shard, row, own, self.manifest, self.targets.expected_of(row.key))
        unconditional = entry.meta.get("unconditional") if isinstance(entry.meta, dict) else None
        if not isinstance(unconditional, bool):
            what = f"entry {row.key} does not say whether it is unconditional"
            raise damaged(f"{self.store}/{shard}", what, self.manifest)
        if unconditional and not self._empty:
            raise ShardError(f"{images.store} has no empty prompt, but entry {row.key} needs it. {RESTORE_EMPTY}")
        empty = self._empty if unconditional else {}
        shared = [name for name in names if name in of_image and name not in empty]
        expected = images.expected_of(image_row.key)
        image = read_entry(images.store, image_shard, image_row, shared, images.manifest, expected)
        replaced = {name: StoredTensor(empty[name]) for name in names if name in empty}
        return StoredEntry(entry.key, {**image.meta, **entry.meta}, {**image.tensors, **replaced, **entry.tensors})


def stored_calibrations(store: Store, manifest: Manifest) -> dict[str, Calibration]:
    """The calibrations next to a manifest; empty if its codec is exact or it has no shard yet. Raises ShardError if the
    file is not as it was."""
    if CALIBRATION not in manifest.files:
        return {}
    data = read_file(store, manifest, CALIBRATION)
    try:
        found = read_calibrations(data)
    except ShardError as error:
        raise ShardError(f"{store}/{CALIBRATION} is damaged: {error}. Restore it from a backup.") from None
    channels = {tap: stated["shape"][0] for tap, stated in of_bucket(manifest.spec, 0)["taps"].items()}
    same = {tap: len(calibration.mu) for tap, calibration in found.items()} == channels
    if not same or spec_of_calibrations(data) != manifest.spec_sha256:
        raise ShardError(
            f"{store}/{CALIBRATION} is another cache's. Restore its own from a backup, or delete it if no shard exists."
        )
    return found


def check_image(path: str, row: Row, image_path: str, image: Row) -> None:
    """Raise ShardError unless an entry of a cache was made from an image. The paths are those of their shards."""
    if not same_image(row, image):
        raise ShardError(f"{path}: entry {row.key} was not made from the image {image.key} of {image_path}. {RESTORE}")


def same_image(row: Row, image: Row) -> bool:
    """Whether an entry of a cache was made from an image, by their rows."""
    return (image_of(row.key), row.image_crc32) == (image_of(image.key), image.image_crc32)


def open_images(store: Store, manifest: Manifest) -> ShardSet:
    """The images of a cache of this manifest. Raises ShardError unless they are those that its spec describes."""
    images = ShardSet(store.folder(IMAGES), "latents", manifest=images_manifest(store))
    if not describes(manifest, images.manifest) or len(images) != manifest.spec["entries"]:
        raise ShardError(foreign_images(store))
    return images


def describes(manifest: Manifest, images: Manifest) -> bool:
    """Whether the spec of a cache is of these latents. What an earlier version did not state counts as the same."""
    stated = manifest.spec["latents"]
    return known_to(stated, images.spec) == stated


def foreign_images(store: Store) -> str:
    return (
        f"{store}/{IMAGES} holds the images of another cache. Delete it, and rerun `distill-sd teacher-cache` with the "
        "latents that the cache was made from."
    )


def images_manifest(store: Store) -> Manifest:
    """The manifest of a cache's images. Raises ShardError, with a remedy for a cache, if there is none."""
    if not store.exists(f"{IMAGES}/{MANIFEST}"):
        raise ShardError(
            f"{store} lacks its images: there is no {IMAGES}/{MANIFEST}. Copy {IMAGES}/ from where the cache was "
            "copied from, or rerun the same `distill-sd teacher-cache`, which takes them from the latents."
        )
    return replace(read_manifest(store.folder(IMAGES), "latents"), in_cache=True)


def empty_prompt(images: ShardSet) -> dict[str, np.ndarray]:
    """The conditioning of the empty prompt as `encode` stored it, without B, by name. Unconditional entries have it."""
    files = {name: empty_prompt_file(name) for name in conditioning_shapes(images.manifest.spec)}
    return {
        name: decode_npy(read_file(images.store, images.manifest, file))
        for name, file in files.items()
        if file in images.manifest.files
    }

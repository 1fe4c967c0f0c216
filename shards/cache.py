"""A cache as its readers see it: each entry's targets joined with its image.

The rounds hold the targets, and images/ holds once what `encode` wrote. An entry states which image it was made from.
In a cache of format 1 each entry holds its image itself.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from shards.calibration import Calibration, read_calibrations
from shards.codec import decode_npy
from shards.expected import image_tensors, target_tensors
from shards.manifest import Manifest, read_file, read_manifest
from shards.reader import ShardSet, StoredEntry, StoredTensor, read_entry
from shards.schema import CALIBRATION, IMAGES, MANIFEST, ShardError, conditioning_shapes, empty_prompt_file, image_of
from shards.store import Store

RESTORE = "Restore the cache from a backup, or delete the shard's files and rerun `teacher-cache` with its own latents."


class Cache:
    """The entries of a finished cache, numbered from 0, round after round. With `rounds` N, those of the first N.

    Raises ShardError for a cache that is unfinished, damaged, or whose images are not its own.
    """

    def __init__(self, store: Store, rounds: int | None = None) -> None:
        self.store = store
        self.targets = ShardSet(store, "cache", rounds)
        self.images = None if self.manifest.has_own_images else open_images(store, self.manifest)
        self._empty = empty_prompt(self.images) if self.images else {}
        self.tensors = [*image_tensors(self.manifest.spec), *target_tensors(self.manifest)]

    @property
    def manifest(self) -> Manifest:
        return self.targets.manifest

    def calibrations(self) -> dict[str, Calibration]:
        """The calibrations of the taps, by name; empty where taps are not rotated."""
        return stored_calibrations(self.store, self.manifest)

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, index: int, tensors: Iterable[str]) -> StoredEntry:
        """Entry `index` with the named tensors, of its image and of its targets. Raises ShardError for one that is
        missing, damaged or not as the spec says, and for one whose image is another."""
        if self.images is None:
            return self.targets.read(index, tensors)
        images = self.images
        of_image = images.expected
        shard, row = self.targets.row(index)
        image_shard, image_row = images.row(index % len(images))
        if (image_of(row.key), row.image_crc32) != (image_of(image_row.key), image_row.image_crc32):
            raise ShardError(
                f"{self.store}/{shard}: entry {row.key} was not made from the image {image_row.key} of "
                f"{images.store}/{image_shard}. {RESTORE}"
            )
        names = list(tensors)
        own = [name for name in names if name not in of_image]
        entry = read_entry(self.store, shard, row, own, self.manifest, self.targets.expected)
        unconditional = entry.meta.get("unconditional", False)
        empty = self._empty if unconditional else {}
        shared = [name for name in names if name in of_image and name not in empty]
        image = read_entry(images.store, image_shard, image_row, shared, images.manifest, of_image)
        replaced = {name: StoredTensor(empty[name]) for name in names if name in empty}
        return StoredEntry(entry.key, {**image.meta, **entry.meta}, {**image.tensors, **replaced, **entry.tensors})


def stored_calibrations(store: Store, manifest: Manifest) -> dict[str, Calibration]:
    """The calibrations next to a manifest; empty if it has none. Raises ShardError if the file is not as it was."""
    if CALIBRATION not in manifest.files:
        return {}
    return read_calibrations(read_file(store, manifest, CALIBRATION))


def open_images(store: Store, manifest: Manifest) -> ShardSet:
    """The images of a cache of this manifest. Raises ShardError unless they are those that its spec describes."""
    images_manifest(store)
    images = ShardSet(store.folder(IMAGES), "latents")
    if images.manifest.spec != manifest.spec["latents"] or len(images) != manifest.spec["entries"]:
        raise ShardError(f"{images.store} holds the images of another cache than {store}. {RESTORE}")
    return images


def images_manifest(store: Store) -> Manifest:
    """The manifest of a cache's images. Raises ShardError, with a remedy for a cache, if there is none."""
    if not store.exists(f"{IMAGES}/{MANIFEST}"):
        raise ShardError(
            f"{store} lacks its images: there is no {IMAGES}/{MANIFEST}. Copy {IMAGES}/ from where the cache was "
            "copied from, or rerun the same `distill-sd teacher-cache`, which takes them from the latents."
        )
    return read_manifest(store.folder(IMAGES), "latents")


def empty_prompt(images: ShardSet) -> dict[str, np.ndarray]:
    """The conditioning of the empty prompt as `encode` stored it, without B, by name. Unconditional entries have it."""
    files = {name: empty_prompt_file(name) for name in conditioning_shapes(images.manifest.spec)}
    return {
        name: decode_npy(read_file(images.store, images.manifest, file))
        for name, file in files.items()
        if file in images.manifest.files
    }

"""The folders of weights in a cache, base/ and students/<level>/: bound to its manifest, checked before they are used.

The manifest states the hash of each folder's checksums.json, which states those of the files. Caches of earlier
versions state nothing, and their folders are used as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel

from pipeline.models.checksums import CHECKSUMS, changed_files, has_checksums
from pipeline.models.families import family_of_spec
from pipeline.models.levels import LEVELS
from pipeline.models.levels.tap_sets import BLOCKS
from pipeline.models.reading import reading
from pipeline.models.shapes import tap_shapes
from pipeline.models.tap_pairs import tap_pairs
from pipeline.system.errors import UserError
from pipeline.system.json_files import read_json
from shards.buckets import of_bucket
from shards.files import file_sha256
from shards.location import Location
from shards.manifest import Manifest
from shards.schema import conditioning_shapes
from shards.store import Store, write_json

BASE, STUDENTS = "base", "students"
REMEDY = "Copy it from an intact cache, or delete the folder and rerun the same `distill-sd teacher-cache`."
# What the spec states of the taps, unless they are those of blocks.
TAP_SET = "tap_set"
# The config of the teacher's U-Net, without weights.
TEACHER = "teacher.json"


def student_part(level: str) -> str:
    return f"{STUDENTS}/{level}"


def existing_parts(cache: Path) -> list[str]:
    """The names of the folders of weights that a cache has: `base`, `students/sd_small`."""
    return [part for part in (BASE, *map(student_part, sorted(LEVELS))) if (cache / part).is_dir()]


def checksums_of_parts(cache: Path, parts: Iterable[str]) -> dict[str, str]:
    """What the manifest states of these folders: the sha256 of each checksums.json, by name in the cache.

    A folder that was changed since it was written is left out.
    """
    intact = [part for part in sorted(parts) if has_checksums(cache / part) and not changed_files(cache / part)]
    return {f"{part}/{CHECKSUMS}": file_sha256(cache / part / CHECKSUMS) for part in intact}


def bound_parts(manifest: Manifest) -> list[str]:
    """The folders of weights whose checksums the manifest states."""
    return [name.removesuffix(f"/{CHECKSUMS}") for name in manifest.files if name.endswith(f"/{CHECKSUMS}")]


def write_teacher_config(store: Store, unet: UNet2DConditionModel) -> None:
    """Keep the config of the teacher's U-Net, from which one can be made to measure how long a pass takes."""
    if not store.exists(TEACHER):
        write_json(store, TEACHER, {key: value for key, value in unet.config.items() if not key.startswith("_")})


def teacher_config(cache: Path) -> dict[str, Any] | None:
    """The config of the teacher's U-Net; None in a cache of an earlier version. Raises UserError if it is damaged."""
    path = cache / TEACHER
    return read_json(path, "Delete it and rerun the same `distill-sd teacher-cache`.") if path.is_file() else None


def is_bound(manifest: Manifest, part: str) -> bool:
    return part in bound_parts(manifest)


def changes(cache: Path, manifest: Manifest, part: str, *, contents: bool) -> list[str]:
    """What differs in a folder from when it was written for this cache: `config.json is missing`.

    Without `contents`, the files are only looked for and not read. Empty if the folder is intact, or if an earlier
    version wrote nothing to compare it with.
    """
    stated = manifest.files.get(f"{part}/{CHECKSUMS}")
    path = cache / part / CHECKSUMS
    if stated and not path.is_file():
        return [f"{CHECKSUMS} is missing"]
    if stated and file_sha256(path) != stated:
        return [f"{CHECKSUMS} was changed, or the folder is of another cache"]
    return changed_files(cache / part, contents=contents)


def check_part(cache: Path, manifest: Manifest, part: str, *, contents: bool) -> None:
    """Raise UserError, with the first of its `changes`, unless a folder is as it was written for this cache."""
    changed = changes(cache, manifest, part, contents=contents)
    if changed:
        raise UserError(f"{cache / part}: {changed[0]}. {REMEDY}")


def missing_student(cache: Location | Store, level: str) -> UserError:
    """The error for a cache that does not hold the initial student of a level."""
    return UserError(
        f"{cache} has no initial weights of {level}. "
        f"Run `teacher-cache --students {level}` on it with the other settings unchanged."
    )


def stored_pairs(store: Store, level: str, spec: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """(student module, teacher module) pairs of the set of taps that a cache with this spec holds.

    Raises UserError if it needs to be known what the level's student is like, and the cache does not hold it.
    """
    tap_set = spec.get(TAP_SET, BLOCKS)
    if tap_set == BLOCKS:
        return LEVELS[level].taps
    name = f"{student_part(level)}/config.json"
    if not store.exists(name):
        raise missing_student(store, level)
    try:
        config = json.loads(store.read(name))
    except ValueError as error:
        raise UserError(f"{store}/{name} is damaged ({error}). {REMEDY}") from None
    return tap_pairs(config, level, tap_set)


def check_student(cache: Path, level: str, spec: dict[str, Any]) -> None:
    """Raise UserError unless the initial student takes the cache's tensors and its taps have the teacher's shapes.

    The config alone tells. This is for folders that are not bound to their cache.
    """
    spec = of_bucket(spec, 0)
    folder, family = cache / student_part(level), family_of_spec(spec)
    taps = {
        student: spec["taps"][teacher]["shape"] for student, teacher in LEVELS[level].taps if teacher in spec["taps"]
    }
    config = reading(folder, lambda: UNet2DConditionModel.load_config(folder))
    stated = spec["latents"]["latents_shape"], conditioning_shapes(spec)
    try:
        shapes: dict[str, Any] = dict(tap_shapes(config, *stated, list(taps), family))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        shapes = {}
    if any(list(shapes.get(tap, ())) != list(shape) for tap, shape in taps.items()):
        raise UserError(f"{folder} does not hold the {level} student of this cache's teacher. {REMEDY}")

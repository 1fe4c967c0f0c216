"""The folders of weights of a cache at an address: copied to this machine, uploaded, and compared.

~/.cache/distill-sd/SPEC_SHA256/   base/, students/<level>/ and small files, as in the cache

A folder at an address has its checksums.json, which is written last; without one it counts as missing. A copy has the
name of the spec that it was made for, so it serves every training on that cache, and is compared with the manifest each
time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from pipeline.cache.parts import BASE, REMEDY, STUDENTS, checksums_of_parts, existing_parts, student_part
from pipeline.models.checksums import CHECKSUMS, changed_files
from pipeline.models.levels import LEVELS
from pipeline.system.copies import copies
from pipeline.system.errors import UserError
from shards.files import atomic_directory, file_sha256, write_bytes
from shards.location import Location
from shards.manifest import Manifest
from shards.store import Store, at_once, open_store, read_chunks


def folder_of(cache: Location, manifest: Manifest) -> Path:
    """Where the files of a cache besides its shards are on this machine: in the cache itself, or in the copy of one at
    an address, which `take_part` and `take_file` fill."""
    if isinstance(cache, Path):
        return cache
    return copies() / manifest.spec_sha256


def parts_of(cache: Location) -> list[str]:
    """The names of the folders of weights that a cache has: `base`, `students/sd_small`."""
    if isinstance(cache, Path):
        return existing_parts(cache)
    store, names = open_store(cache), [BASE, *map(student_part, sorted(LEVELS))]
    found = at_once(store, lambda part: store.exists(f"{part}/{CHECKSUMS}"), names)
    return [part for part, exists in zip(names, found, strict=True) if exists]


def checksums_of(cache: Location, parts: Iterable[str]) -> dict[str, str]:
    """What the manifest states of these folders; see `checksums_of_parts`. At an address their files are not read."""
    if isinstance(cache, Path):
        return checksums_of_parts(cache, parts)
    store, names = open_store(cache), [f"{part}/{CHECKSUMS}" for part in sorted(parts)]
    hashes = at_once(store, lambda name: hashlib.sha256(store.read(name)).hexdigest(), names)
    return dict(zip(names, hashes, strict=True))


def take_file(store: Store, name: str, folder: Path) -> bool:
    """Copy a small file to `folder`, whatever it held under that name. Returns whether the store has it."""
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        data = store.read(name)
    except FileNotFoundError:
        target.unlink(missing_ok=True)
        return False
    if not target.is_file() or target.read_bytes() != data:
        write_bytes(target, data)
    return True


def take_part(store: Store, manifest: Manifest, part: str, folder: Path) -> None:
    """Copy base/ or a student to `folder`, unless it holds what the manifest states, down to the last byte.

    Raises UserError if the store's is missing, or not what the manifest states.
    """
    target, stated = folder / part, manifest.files.get(f"{part}/{CHECKSUMS}")
    if (target / CHECKSUMS).is_file() and file_sha256(target / CHECKSUMS) == stated and not changed_files(target):
        return
    listed = listed_files(store, manifest, part)
    shutil.rmtree(target, ignore_errors=True)
    sizes = list(at_once(store, lambda name: store.size(f"{part}/{name}"), listed))
    if None in sizes:
        raise changed(store, part, f"{list(listed)[sizes.index(None)]} is missing")
    bar = tqdm(total=sum(filter(None, sizes)), unit="B", unit_scale=True, desc=f"download {part}", delay=2)
    with bar as progress, atomic_directory(target, exist_ok=True) as temporary:
        for name, sha256 in listed.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            with open(temporary / name, "wb") as stream:
                for chunk in read_chunks(store, f"{part}/{name}"):
                    digest.update(chunk)
                    progress.update(stream.write(chunk))
            if digest.hexdigest() != sha256:
                raise changed(store, part, f"{name} was changed")
        (temporary / CHECKSUMS).write_bytes(store.read(f"{part}/{CHECKSUMS}"))


def put_folder(store: Store, name: str, folder: Path, last: str) -> None:
    """Upload the files of a folder under `name`, the one called `last` when all others are there."""
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    for file in sorted(files, key=lambda file: file == last):
        with open(folder / file, "rb") as source, store.write(f"{name}/{file}") as stream:
            shutil.copyfileobj(source, stream, 1 << 20)


def listed_files(store: Store, manifest: Manifest, part: str) -> dict[str, str]:
    """The files of a folder and their sha256, as its checksums.json lists them. Raises UserError if the folder is
    missing, or not the manifest's."""
    stated = manifest.files.get(f"{part}/{CHECKSUMS}")
    if stated is None:
        level = part.removeprefix(f"{STUDENTS}/")
        which = "base/, the pipeline of its students" if part == BASE else f"initial weights of {level}"
        remedy = "" if part == BASE else f" --students {level}"
        raise UserError(
            f"{store} has no {which}, with checksums in its manifest. "
            f"Run `distill-sd teacher-cache{remedy}` on it with the other settings unchanged."
        )
    try:
        data = store.read(f"{part}/{CHECKSUMS}")
    except FileNotFoundError:
        raise changed(store, part, f"{CHECKSUMS} is missing") from None
    if hashlib.sha256(data).hexdigest() != stated:
        raise changed(store, part, f"{CHECKSUMS} was changed, or the folder is of another cache")
    try:
        listed = dict(json.loads(data))
    except (ValueError, TypeError, RecursionError) as error:
        raise changed(store, part, f"{CHECKSUMS} cannot be read ({error})") from None
    outside = next((name for name in listed if ".." in PurePosixPath(name).parts or name.startswith("/")), None)
    if outside is not None:
        raise changed(store, part, f"{outside!r} in {CHECKSUMS} lies outside the folder")
    return listed


def changed(store: Store, part: str, what: str) -> UserError:
    return UserError(f"{store}/{part}: {what}. {REMEDY}")


def changes_at(store: Store, manifest: Manifest, part: str, *, contents: bool) -> list[str]:
    """What differs in a folder at an address from when it was written, as messages with their remedy.

    Without `contents`, the files are only looked for and not read.
    """
    try:
        listed = listed_files(store, manifest, part)
    except UserError as error:
        return [str(error)]
    return [str(changed(store, part, what)) for what in _changed_files(store, part, listed, contents)]


def _changed_files(store: Store, part: str, listed: dict[str, str], contents: bool) -> Iterator[str]:
    found = at_once(store, lambda name: store.exists(f"{part}/{name}"), listed)
    for (name, sha256), exists in zip(listed.items(), found, strict=True):
        if not exists:
            yield f"{name} is missing"
        elif contents and sha256_at(store, f"{part}/{name}") != sha256:
            yield f"{name} was changed"


def sha256_at(store: Store, name: str) -> str:
    """The sha256 of a file in a store."""
    digest = hashlib.sha256()
    for chunk in read_chunks(store, name):
        digest.update(chunk)
    return digest.hexdigest()

"""What is wrong with a shard set: which shards are whole, which are damaged, and which are still to be written."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shards.expected import check_meta, expected_tensors
from shards.files import file_sha256
from shards.manifest import STAGE_COMMANDS, Manifest, read_file
from shards.reader import ForeignShardError, Sidecar, damaged, read_entry, read_sidecar, sound_sidecar
from shards.schema import BLOCK, MANIFEST, ShardError, round_of, sidecar_name

SHARD_FILE = re.compile(r"(?:r\d{4,}-)?s\d{5,}\.(?:tar|json)")


@dataclass(frozen=True)
class Problem:
    """One line that names a file, what is wrong, and the remedy. `shard` is a damaged shard, fit to be deleted."""

    message: str
    shard: str | None = None

    @staticmethod
    def of(error: Exception, shard: str | None = None) -> Problem:
        return Problem(" ".join(str(error).split()), shard)


@dataclass(frozen=True)
class Size:
    """What a shard holds, in entries and bytes."""

    entries: int
    bytes: int


@dataclass
class Survey:
    """The shards that are there with a sound sidecar, in the plan's order; those not there yet; what is wrong."""

    sizes: dict[str, Size] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def damaged_shards(self) -> list[str]:
        return list(dict.fromkeys(problem.shard for problem in self.problems if problem.shard))


def survey(directory: Path, manifest: Manifest) -> Survey:
    """What can be said without reading the shards: sidecars, sizes, and the numbering, without gaps."""
    found = Survey()
    again = f"run the same `distill-sd {STAGE_COMMANDS[manifest.spec['stage']]}` again"
    planned = manifest.shard_names()
    marked = [shard for shard in planned if (directory / sidecar_name(shard)).is_file()]
    marks, foreign = set(marked), 0
    last = planned.index(marked[-1]) if marked else -1
    for place, shard in enumerate(planned):
        path = directory / shard
        try:
            if shard in marks:
                sidecar = sound_sidecar(directory, shard, manifest.spec_sha256)
                found.sizes[shard] = Size(sidecar.count, sidecar.bytes)
            elif path.is_file():
                what = f"{path} has no sidecar {sidecar_name(shard)}, and so counts as unfinished"
                found.problems.append(Problem(f"{what}; {again}: only this shard is rewritten"))
            elif place < last:
                what = f"{path} is missing, though later shards are there"
                found.problems.append(Problem(f"{what}; unless its writer is still at work, {again}"))
            else:
                found.unfinished.append(shard)
        except ForeignShardError as error:
            foreign += 1
            found.problems.append(Problem.of(error, shard))
        except ShardError as error:
            found.problems.append(Problem.of(error, shard))
    if foreign and foreign == len(marked):
        # It is the one manifest that is foreign then, and not every shard.
        what = f"{directory / MANIFEST} is of another shard set than all the shards beside it"
        kept = [problem for problem in found.problems if not problem.shard]
        found.problems = [*kept, Problem(f"{what}; restore the one that they were written with")]
    found.problems += stray_files(directory, manifest) + changed_files(directory, manifest)
    return found


def stray_files(directory: Path, manifest: Manifest) -> list[Problem]:
    """Files named like shards that are not in the plan."""
    planned = set(manifest.shard_names())
    return [
        Problem(f"{path} is no shard of {MANIFEST}'s plan; restore the manifest that it was written with, or delete it")
        for path in sorted(directory.iterdir())
        if SHARD_FILE.fullmatch(path.name) and path.with_suffix(".tar").name not in planned
    ]


def changed_files(directory: Path, manifest: Manifest) -> list[Problem]:
    """Files beside the shards that are not as the manifest has them."""
    problems = []
    for name in manifest.files:
        try:
            read_file(directory, manifest, name)
        except ShardError as error:
            problems.append(Problem.of(error))
    return problems


def check_contents(directory: Path, manifest: Manifest, found: Survey, advance: Callable[[int], Any]) -> None:
    """Read every shard of `found` to its last byte; the problems are added to it, a line for each shard.

    `advance` is told of the bytes as they are done.
    """
    last_key = ""
    for shard, size in found.sizes.items():
        try:
            sidecar = read_sidecar(directory, shard, manifest.spec_sha256)
            check_shard(directory, sidecar, manifest.spec, last_key)
            last_key = sidecar.keys[-1] if sidecar.keys else last_key
        except ShardError as error:
            found.problems.append(Problem.of(error, shard))
        except OSError as error:
            unread = damaged(directory / shard, f"it cannot be read ({error.strerror})")
            found.problems.append(Problem.of(unread, shard))
        advance(size.bytes)


def check_shard(directory: Path, sidecar: Sidecar, spec: dict[str, Any], last_key: str) -> None:
    """Raise ShardError unless the tar has its sha256, its members and no others, and each is as the spec says.

    Keys rise through a round, so that they are unique when each comes after `last_key`, that of the shard before.
    """
    path = directory / sidecar.shard
    round_index = round_of(sidecar.shard)
    if file_sha256(path) != sidecar.sha256:
        raise damaged(path, f"it does not have its sha256{first_bad_member(directory, sidecar, spec)}")
    try:
        for key in sidecar.keys:
            if round_of_key(last_key) == round_index and key <= last_key:
                raise ShardError(f"key {key} does not come after {last_key}, as keys do that are unique")
            last_key = key
        expected = expected_tensors(spec)
        members = sorted(["json", *(name + tensor.ending for name, tensor in expected.items())])
        if sidecar.keys and sidecar.members != members:
            raise ShardError(f"its entries hold {', '.join(sidecar.members)}, not {', '.join(members)}")
        check_headers(path, sidecar)
    except ShardError as error:
        raise damaged(path, str(error)) from None
    for place in range(sidecar.count):
        check_entry(directory, sidecar, place, spec)


def check_entry(directory: Path, sidecar: Sidecar, place: int, spec: dict[str, Any]) -> None:
    """Raise ShardError unless every member of an entry decodes to finite values of its shape and type."""
    expected = expected_tensors(spec)
    sample = read_entry(directory, sidecar, place, expected, expected)
    try:
        check_meta(sample.meta, spec, round_of(sidecar.shard))
        for name, tensor in sample.tensors.items():
            if not np.isfinite(tensor.values if tensor.mu is None else tensor.mu).all():
                raise ShardError(f"{name} holds NaN or Inf")
    except ShardError as error:
        raise damaged(directory / sidecar.shard, f"entry {sample.key}: {error}") from None


def check_headers(path: Path, sidecar: Sidecar) -> None:
    """Raise ShardError unless the tar is a row of the sidecar's members, each a plain file, then zeros.

    No header is believed: each is looked for where the member before it must end.
    """
    with open(path, "rb") as stream:
        position = 0
        for place, key in enumerate(sidecar.keys):
            for name, (offset, length, _, _) in sidecar.locate(place).items():
                if offset != position + BLOCK:
                    raise ShardError(f"member {key}.{name} does not follow the one before it")
                stream.seek(position)
                check_header(stream.read(BLOCK), f"{key}.{name}", length)
                position = offset + -(-length // BLOCK) * BLOCK
        stream.seek(position)
        if stream.read().strip(b"\0"):
            raise ShardError("something follows its last member")


def check_header(header: bytes, name: str, length: int) -> None:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise ShardError(f"member {name} has no valid header ({error})") from None
    if not info.isreg() or info.name != name or info.size != length:
        raise ShardError(f"the header of member {name} is that of {info.name!r}, {info.size} bytes")


def first_bad_member(directory: Path, sidecar: Sidecar, spec: dict[str, Any]) -> str:
    """Where a shard's damage shows first, as the end of a sentence: nothing when it is between the members."""
    for place in range(sidecar.count):
        try:
            check_entry(directory, sidecar, place, spec)
        except ShardError:
            return f", and entry {sidecar.keys[place]} is the first that is bad"
    return ""


def round_of_key(key: str) -> int | None:
    _, _, number = key.partition("-r")
    return int(number) if number else None


def remove_shard(directory: Path, shard: str) -> None:
    """Delete a shard; the sidecar first, so that at no moment it marks a shard that is gone."""
    (directory / sidecar_name(shard)).unlink(missing_ok=True)
    (directory / shard).unlink(missing_ok=True)

"""What is wrong with a shard set: which shards are intact, which are damaged, and which are still to be written."""

from __future__ import annotations

import errno
import functools
import hashlib
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from shards.expected import check_meta, expected_tensors
from shards.manifest import STAGE_COMMANDS, Manifest, read_file
from shards.reader import (
    ForeignShardError,
    Sidecar,
    check_order,
    damaged,
    placed_sidecar,
    read_entry,
    read_sidecar,
)
from shards.schema import BLOCK, MANIFEST, ShardError, round_of, sidecar_name
from shards.store import Store, read_chunks

SHARD_FILE = re.compile(r"(?:r\d{4,}-)?s\d{5,}\.(?:tar|json)")


# Errors of a file that its owner closed to this user.
CLOSED = (errno.EACCES, errno.EPERM)
Result = TypeVar("Result")


class UnreadableError(Exception):
    """Something cannot be read now, or reads differently each time, which is no damage. The message names the file."""


@dataclass(frozen=True)
class Problem:
    """One line that names a file, what is wrong, and the remedy.

    `shard` is the shard that it is about, which may be deleted if it is `damaged`.
    """

    message: str
    shard: str | None = None
    damaged: bool = False

    @staticmethod
    def of(error: Exception, shard: str | None = None) -> Problem:
        damaged = shard is not None and isinstance(error, ShardError)
        return Problem(" ".join(str(error).split()), shard, damaged)


@dataclass(frozen=True)
class Size:
    """The size of a shard, in entries and bytes."""

    entries: int
    bytes: int


@dataclass
class Survey:
    """The shards with a sound sidecar, in the plan's order; the shards not written yet; and the problems."""

    sizes: dict[str, Size] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def damaged_shards(self) -> list[str]:
        return list(dict.fromkeys(problem.shard for problem in self.problems if problem.shard and problem.damaged))

    def intact(self) -> list[Size]:
        """The sizes of the shards of which nothing bad is known."""
        bad = {problem.shard for problem in self.problems}
        return [size for shard, size in self.sizes.items() if shard not in bad]


def examine(path: str, check: Callable[[], Result]) -> Result:
    """What `check` returns about a file. Raises ShardError only if two readings say the same of it, else
    UnreadableError.

    The second reading opens the file again, but the system may answer it from memory.
    """
    found: list[str] = []
    while True:
        try:
            result = check()
        except OSError as error:
            raise unreadable(path, error) from None
        except ShardError as error:
            if str(error) in found:
                raise
            found.append(str(error))
            if len(found) == 1:
                continue
        else:
            if not found:
                return result
        raise UnreadableError(
            f"{path} was read twice with different results, so a disk, a network or memory may be failing. Nothing is "
            "deleted for that. Check the machine, and run `distill-sd verify` again."
        )


def unreadable(path: str, error: OSError) -> UnreadableError:
    """The error for a file that cannot be read now, and the remedy."""
    remedy = "Give this user the permission to read it" if error.errno in CLOSED else "Check the disk or the network"
    what = f"{error.filename or path} cannot be read: {error.strerror or error}"
    return UnreadableError(f"{what}. {remedy}, and run `distill-sd verify` again.")


def survey(store: Store, manifest: Manifest) -> Survey:
    """What can be said without reading the shards: sidecars, sizes, and the numbering, which has no gaps."""
    found = Survey()
    rerun = f"rerun the same `distill-sd {STAGE_COMMANDS[manifest.spec['stage']]}`"
    planned, existing = list(manifest.plan), set(store.list())
    marked = [place for place, shard in enumerate(planned) if sidecar_name(shard.name) in existing]
    last, marks, foreign = marked[-1] if marked else -1, set(marked), 0
    before = None
    for place, shard in enumerate(planned):
        path = f"{store}/{shard.name}"
        try:
            if place in marks:
                sidecar = examine(path, functools.partial(placed_sidecar, store, shard, manifest))
                found.sizes[shard.name] = Size(sidecar.count, sidecar.bytes)
                found.problems += order_problem(store, before, sidecar)
                before = sidecar if sidecar.keys else before
            elif shard.name in existing:
                what = f"{path} has no sidecar {sidecar_name(shard.name)}, so it counts as unfinished"
                found.problems.append(Problem(f"{what}. To write it again, and only it, {rerun}."))
            elif place < last:
                what = f"{path} is missing although later shards exist"
                found.problems.append(Problem(f"{what}. If no job is still writing it, {rerun}."))
            else:
                found.unfinished.append(shard.name)
        except (ShardError, UnreadableError) as error:
            foreign += isinstance(error, ForeignShardError)
            found.problems.append(Problem.of(error, shard.name))
    if foreign and foreign == len(marked):
        # All shards agree against the manifest: then it is the manifest that is foreign.
        what = f"{store}/{MANIFEST} does not match any shard in this directory"
        kept = [problem for problem in found.problems if not problem.shard]
        found.problems = [*kept, Problem(f"{what}. Restore the manifest that the shards were written with.")]
    found.problems += stray_files(store, manifest) + changed_files(store, manifest)
    return found


def order_problem(store: Store, before: Sidecar | None, after: Sidecar) -> list[Problem]:
    """The problem of two shards that hold the same entries, if they do. Nobody knows which of them is wrong."""
    try:
        check_order(store, before, after)
    except ShardError as error:
        return [Problem.of(error)]
    return []


def stray_files(store: Store, manifest: Manifest) -> list[Problem]:
    """Files named like shards that are not in the plan."""
    planned = set(manifest.plan.names())
    planned |= {sidecar_name(shard) for shard in planned}
    return [
        Problem(
            f"{store}/{name} is not in the plan of {MANIFEST}. "
            "Restore the manifest that it was written with, or delete the file."
        )
        for name in store.list()
        if SHARD_FILE.fullmatch(name) and name not in planned
    ]


def changed_files(store: Store, manifest: Manifest) -> list[Problem]:
    """Files next to the shards that differ from what the manifest states, but for those in folders.

    The lists of checksums in folders are for whoever knows what the folders hold.
    """
    problems = []
    for name in (name for name in manifest.files if "/" not in name):
        try:
            examine(f"{store}/{name}", functools.partial(read_file, store, manifest, name))
        except (ShardError, UnreadableError) as error:
            problems.append(Problem.of(error))
    return problems


def check_contents(store: Store, manifest: Manifest, found: Survey, advance: Callable[[int], Any]) -> None:
    """Read every shard of `found` to its last byte and add the problems to it, one line per shard.

    `advance` is called with the bytes of each shard that is done.
    """
    last_key = ""
    for shard, size in found.sizes.items():
        check = functools.partial(check_shard, store, shard, manifest, last_key)
        try:
            last_key = examine(f"{store}/{shard}", check)
        except (ShardError, UnreadableError) as error:
            found.problems.append(Problem.of(error, shard))
        advance(size.bytes)


def check_shard(store: Store, shard: str, manifest: Manifest, last_key: str) -> str:
    """Raise ShardError unless the tar has its sha256, exactly its members, and each is as the spec says.

    Keys rise through a round, so they are unique if each is greater than `last_key`, the last of the shard before.
    Returns the last key of this one.
    """
    path, round_index, spec = f"{store}/{shard}", round_of(shard), manifest.spec
    sidecar = read_sidecar(store, shard, manifest.spec_sha256)
    digest = hashlib.sha256()
    for chunk in read_chunks(store, sidecar.shard):
        digest.update(chunk)
    if digest.hexdigest() != sidecar.sha256:
        # The digits tell one wrong reading from another.
        found = f"it does not have its sha256 but {digest.hexdigest()[:16]}..."
        raise damaged(path, found + first_bad_entry(store, sidecar, spec))
    try:
        for key in sidecar.keys:
            if round_of_key(last_key) == round_index and key <= last_key:
                raise ShardError(f"key {key} does not come after {last_key}, so keys may repeat")
            last_key = key
        expected = expected_tensors(spec)
        members = sorted(["json", *(name + tensor.ending for name, tensor in expected.items())])
        if sidecar.keys and sidecar.members != members:
            raise ShardError(f"its entries hold {', '.join(sidecar.members)}, not {', '.join(members)}")
        check_headers(store, sidecar)
    except ShardError as error:
        raise damaged(path, str(error)) from None
    for place in range(sidecar.count):
        check_entry(store, sidecar, place, spec)
    return last_key


def check_entry(store: Store, sidecar: Sidecar, place: int, spec: dict[str, Any]) -> None:
    """Raise ShardError unless every member of an entry decodes to finite values of its shape and dtype."""
    expected = expected_tensors(spec)
    entry = read_entry(store, sidecar, place, expected, expected)
    try:
        check_meta(entry.meta, spec, round_of(sidecar.shard))
        for name, tensor in entry.tensors.items():
            if not np.isfinite(tensor.values if tensor.mu is None else tensor.mu).all():
                raise ShardError(f"{name} holds NaN or Inf")
    except ShardError as error:
        raise damaged(f"{store}/{sidecar.shard}", f"entry {entry.key}: {error}") from None


def check_headers(store: Store, sidecar: Sidecar) -> None:
    """Raise ShardError unless the tar is exactly the sidecar's members in order, each a plain file, then zeros.

    No header is trusted: each is looked for where the member before it must end.
    """
    position, headers = 0, []
    for place, key in enumerate(sidecar.keys):
        for name, (offset, length, _, _) in sidecar.locate(place).items():
            if offset != position + BLOCK:
                raise ShardError(f"member {key}.{name} does not follow the one before it")
            headers.append((position, f"{key}.{name}", length))
            position = offset + -(-length // BLOCK) * BLOCK
    blocks = store.read_ranges(sidecar.shard, [(start, BLOCK) for start, _, _ in headers])
    for block, (_, name, length) in zip(blocks, headers, strict=True):
        check_header(block, name, length)
    (rest,) = store.read_ranges(sidecar.shard, [(position, max(0, sidecar.bytes - position))])
    if rest.strip(b"\0"):
        raise ShardError("there is data after its last member")


def check_header(header: bytes, name: str, length: int) -> None:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise ShardError(f"member {name} has an invalid header ({error})") from None
    if not info.isreg() or info.name != name or info.size != length:
        raise ShardError(f"the header of member {name} describes {info.name!r}, {info.size} bytes")


def first_bad_entry(store: Store, sidecar: Sidecar, spec: dict[str, Any]) -> str:
    """Where a shard's damage shows first, as the end of a sentence. Empty if it lies between the members."""
    for place in range(sidecar.count):
        try:
            check_entry(store, sidecar, place, spec)
        except ShardError:
            return f", and entry {sidecar.keys[place]} is the first bad one"
    return ""


def round_of_key(key: str) -> int | None:
    _, _, number = key.partition("-r")
    return int(number) if number else None


def remove_shard(store: Store, shard: str) -> None:
    """Delete a shard: the sidecar first, so that it never marks a shard that is gone."""
    store.delete(sidecar_name(shard))
    store.delete(shard)

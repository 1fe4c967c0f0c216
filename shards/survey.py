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

from shards.cache import RESTORE, describes, foreign_images, images_manifest
from shards.expected import check_meta, expected_tensors
from shards.kept import forget
from shards.location import is_url
from shards.manifest import Manifest, read_file
from shards.plan import PlannedShard
from shards.reader import check_members, check_order, member_names, placed_head, read_entry
from shards.schema import BLOCK, IMAGES, MANIFEST, ShardError, image_of, round_of
from shards.sidecar import ForeignShardError, Head, OtherCalibrationError, Sidecar, damaged, read_sidecar
from shards.store import Store, at_once, copied, read_chunks

SHARD_FILE = re.compile(r"(?:r\d{4,}-)?s\d{5,}\.(?:tar|json|index)")


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
        damaged = shard is not None and isinstance(error, ShardError) and not isinstance(error, OtherCalibrationError)
        return Problem(" ".join(str(error).split()), shard, damaged)


@dataclass(frozen=True)
class Size:
    """The size of a shard, in entries and bytes."""

    entries: int
    bytes: int


@dataclass
class Survey:
    """What is known of a set: the shards with a sound sidecar, in the plan's order; those not written yet, or of a
    rolling cache those that are not there; and the problems."""

    store: Store
    manifest: Manifest
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
    first = _attempt(path, check)
    if not isinstance(first, ShardError):
        return first
    second = _attempt(path, check)
    if isinstance(second, ShardError) and str(second) == str(first):
        raise second
    raise UnreadableError(
        f"{path} was read twice with different results, so a disk, a network or memory may be failing. Nothing is "
        "deleted for that. Check the machine, and run `distill-sd verify` again."
    )


def _attempt(path: str, check: Callable[[], Result]) -> Result | ShardError:
    try:
        return check()
    except ShardError as error:
        return error
    except OSError as error:
        if is_url(path) and error.errno == errno.EIO:
            # All that can be tried was tried. Each other file would take as long.
            raise
        raise unreadable(path, error) from None


def unreadable(path: str, error: OSError) -> UnreadableError:
    """The error for a file that cannot be read now, and the remedy."""
    remedy = "Give this user the permission to read it" if error.errno in CLOSED else "Check the disk or the network"
    what = f"{error.filename or path} cannot be read: {error.strerror or error}"
    return UnreadableError(f"{what}. {remedy}, and run `distill-sd verify` again.")


def survey(store: Store, manifest: Manifest) -> Survey:
    """What can be said without reading the tars: sidecars, sizes, and the numbering, which has no gaps."""
    found = Survey(store, manifest)
    rerun = f"rerun the same `distill-sd {manifest.command}`"
    planned, existing = list(manifest.plan), set(store.list())
    marked = [place for place, shard in enumerate(planned) if manifest.sidecar_name(shard.name) in existing]
    last, marks, foreign = marked[-1] if marked else -1, set(marked), 0
    looked_at = at_once(store, lambda place: outcome_of(store, planned[place], manifest), marked)
    before = None
    for place, shard in enumerate(planned):
        path = f"{store}/{shard.name}"
        try:
            if place in marks:
                head = next(looked_at)
                if isinstance(head, Exception):
                    raise head
                found.sizes[shard.name] = Size(head.count, head.bytes)
                found.problems += order_problem(store, before, head, manifest)
                before = head if head.count else before
            elif manifest.window is not None:
                # It is not written yet, or deleted, or on its way to one of them.
                found.unfinished.append(shard.name)
            elif shard.name in existing:
                what = f"{path} has no sidecar {manifest.sidecar_name(shard.name)}, so it counts as unfinished"
                found.problems.append(Problem(f"{what}. To write it again, and only it, {rerun}."))
            elif place < last:
                what = f"{path} is missing although later shards exist"
                found.problems.append(Problem(f"{what}. If no job is still writing it, {rerun}."))
            else:
                found.unfinished.append(shard.name)
        except (ShardError, UnreadableError) as error:
            if has_gone(store, shard.name, manifest):
                found.unfinished.append(shard.name)
                continue
            foreign += isinstance(error, ForeignShardError)
            found.problems.append(Problem.of(error, shard.name))
    if foreign and foreign == len(marked):
        # All shards agree against the manifest: then it is the manifest that is foreign.
        what = f"{store}/{MANIFEST} does not match any shard in this directory"
        kept = [problem for problem in found.problems if not problem.shard]
        found.problems = [*kept, Problem(f"{what}. Restore the manifest that the shards were written with.")]
    found.problems += stray_files(store, manifest) + changed_files(store, manifest)
    return found


def has_gone(store: Store, shard: str, manifest: Manifest) -> bool:
    """Whether a shard of a rolling cache was deleted meanwhile, as those are that all readers have passed."""
    return manifest.window is not None and not store.exists(manifest.sidecar_name(shard))


def outcome_of(store: Store, shard: PlannedShard, manifest: Manifest) -> Head | ShardError | UnreadableError:
    """The head of a shard's sidecar, or what is wrong with it."""
    try:
        return examine(f"{store}/{shard.name}", functools.partial(check_sidecar, store, shard, manifest))
    except (ShardError, UnreadableError) as error:
        return error


def check_sidecar(store: Store, shard: PlannedShard, manifest: Manifest) -> Head:
    """The head of a shard's sidecar, if it is sound and in its place, and so is its table; else ShardError."""
    head = placed_head(store, shard, manifest)
    check_members(store, head, member_names(expected_tensors(manifest)), manifest)
    sidecar = read_sidecar(store, shard.name, manifest)
    path = f"{store}/{manifest.sidecar_name(shard.name)}"
    if (np.diff(sidecar.images) <= 0).any():
        raise damaged(path, "the keys of its entries do not rise, so they may repeat", manifest)
    if not manifest.is_cache and (sidecar.image_crc32 != sidecar.crc32_of_tensors()).any():
        raise damaged(path, "an image_crc32 is not that of its image's tensors", manifest)
    return head


def order_problem(store: Store, before: Head | None, after: Head, manifest: Manifest) -> list[Problem]:
    """The problem of two shards that hold the same entries, if they do. Nobody knows which of them is wrong."""
    try:
        check_order(store, before, after, manifest)
    except ShardError as error:
        return [Problem.of(error)]
    return []


def stray_files(store: Store, manifest: Manifest) -> list[Problem]:
    """Files named like shards that are not in the plan."""
    planned = set(manifest.plan.names())
    planned |= {manifest.sidecar_name(shard) for shard in planned}
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


def survey_images(store: Store, manifest: Manifest, targets: Survey) -> Survey:
    """What can be said of the images of a cache. Shards of `targets` whose entries were made from other images become
    problems of `targets`."""
    folder = store.folder(IMAGES)
    try:
        stated = examine(f"{folder}/{MANIFEST}", functools.partial(images_manifest, store))
    except (ShardError, UnreadableError) as error:
        targets.problems.append(Problem.of(error))
        return Survey(folder, manifest)
    images = survey(folder, stated)
    if not describes(manifest, stated):
        images.problems.append(Problem(foreign_images(store)))
    elif not images.problems and not images.unfinished:
        if sum(size.entries for size in images.sizes.values()) != manifest.spec["entries"]:
            images.problems.append(Problem(foreign_images(store)))
        targets.problems += other_images(targets, images)
    return images


def other_images(targets: Survey, images: Survey) -> list[Problem]:
    """The shards of a cache that were made from other images than those next to it. Nobody knows which is wrong."""
    try:
        tables = list(at_once(images.store, lambda shard: own_columns(images, shard), images.sizes))
    except (ShardError, UnreadableError) as error:
        return [Problem.of(error)]
    rows = np.concatenate(tables) if tables else np.empty((0, 2), np.int64)

    def problem_of(shard: PlannedShard) -> list[Problem]:
        try:
            made = own_columns(targets, shard.name)
        except (ShardError, UnreadableError) as error:
            return [] if has_gone(targets.store, shard.name, targets.manifest) else [Problem.of(error, shard.name)]
        theirs = rows[shard.indices.start : shard.indices.stop]
        if len(made) == len(theirs) and not (made != theirs).any():
            return []
        what = "entries of it were not made from the images next to it"
        return [Problem(f"{targets.store}/{shard.name}: {what}. {RESTORE}", shard.name)]

    sound = [shard for shard in targets.manifest.plan if shard.name in targets.sizes]
    return [problem for problems in at_once(targets.store, problem_of, sound) for problem in problems]


def own_columns(found: Survey, shard: str) -> np.ndarray:
    """(entries, 2): the image and the image_crc32 of each entry of a shard."""
    read = functools.partial(read_sidecar, found.store, shard, found.manifest)
    return examine(f"{found.store}/{shard}", read).table[:, :2]


def check_contents(found: Survey, advance: Callable[[int], Any]) -> None:
    """Read every shard of `found` to its last byte and add the problems to it, one line per shard.

    `advance` is called with the bytes of each shard that is done.
    """
    store, manifest = found.store, found.manifest
    for shard, size in found.sizes.items():
        try:
            examine(f"{store}/{shard}", functools.partial(check_copied_shard, store, shard, manifest))
        except (ShardError, UnreadableError) as error:
            if not has_gone(store, shard, manifest):
                found.problems.append(Problem.of(error, shard))
        advance(size.bytes)


def check_copied_shard(store: Store, shard: str, manifest: Manifest) -> None:
    """As `check_shard`. Where reads wait for an answer, every byte is read once, from end to end."""
    with copied(store, [shard, manifest.sidecar_name(shard)]) as near:
        check_shard(near, shard, manifest)


def check_shard(store: Store, shard: str, manifest: Manifest) -> None:
    """Raise ShardError unless the tar has its sha256, exactly its members, and each is as the spec says."""
    path = f"{store}/{shard}"
    sidecar = read_sidecar(store, shard, manifest)
    digest = hashlib.sha256()
    for chunk in read_chunks(store, shard):
        digest.update(chunk)
    if digest.hexdigest() != sidecar.head.sha256:
        # The digits tell one wrong reading from another.
        found = f"it does not have its sha256 but {digest.hexdigest()[:16]}..."
        raise damaged(path, found + first_bad_entry(store, sidecar, manifest), manifest)
    try:
        check_headers(store, sidecar)
    except ShardError as error:
        raise damaged(path, str(error), manifest) from None
    for place in range(sidecar.count):
        check_entry(store, sidecar, place, manifest)


def check_entry(store: Store, sidecar: Sidecar, place: int, manifest: Manifest) -> None:
    """Raise ShardError unless every member of an entry decodes to finite values of its shape and dtype."""
    row = sidecar.row(place)
    image = image_of(row.key)
    try:
        expected = expected_tensors(manifest, manifest.bucket_of(image))
    except ShardError as error:
        raise damaged(f"{store}/{sidecar.shard}", str(error), manifest) from None
    entry = read_entry(store, sidecar.shard, row, expected, manifest, expected)
    try:
        check_meta(entry.meta, manifest, round_of(sidecar.shard), image)
        for name, tensor in entry.tensors.items():
            if not np.isfinite(tensor.values if tensor.mu is None else tensor.mu).all():
                raise ShardError(f"{name} holds NaN or Inf")
    except ShardError as error:
        raise damaged(f"{store}/{sidecar.shard}", f"entry {entry.key}: {error}", manifest) from None


def check_headers(store: Store, sidecar: Sidecar) -> None:
    """Raise ShardError unless the tar is exactly the sidecar's members in order, each a plain file, then zeros.

    No header is trusted: each is looked for where the member before it must end.
    """
    position, headers = 0, []
    for place in range(sidecar.count):
        row = sidecar.row(place)
        for name, (offset, length, _, _) in row.members.items():
            if offset != position + BLOCK:
                raise ShardError(f"member {row.key}.{name} does not follow the one before it")
            headers.append((position, f"{row.key}.{name}", length))
            position = offset + -(-length // BLOCK) * BLOCK
    blocks = store.read_ranges(sidecar.shard, [(start, BLOCK) for start, _, _ in headers])
    for block, (_, name, length) in zip(blocks, headers, strict=True):
        check_header(block, name, length)
    (rest,) = store.read_ranges(sidecar.shard, [(position, max(0, sidecar.head.bytes - position))])
    if rest.strip(b"\0"):
        raise ShardError("there is data after its last member")


def check_header(header: bytes, name: str, length: int) -> None:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise ShardError(f"member {name} has an invalid header ({error})") from None
    if not info.isreg() or info.name != name or info.size != length:
        raise ShardError(f"the header of member {name} describes {info.name!r}, {info.size} bytes")


def first_bad_entry(store: Store, sidecar: Sidecar, manifest: Manifest) -> str:
    """Where a shard's damage shows first, as the end of a sentence. Empty if it lies between the members."""
    for place in range(sidecar.count):
        try:
            check_entry(store, sidecar, place, manifest)
        except ShardError:
            return f", and entry {sidecar.row(place).key} is the first bad one"
    return ""


def remove_shard(store: Store, shard: str, manifest: Manifest) -> None:
    """Delete a shard and what is kept of it: the sidecar first, so that it never marks a shard that is gone."""
    store.delete(manifest.sidecar_name(shard))
    store.delete(shard)
    forget(store, shard, manifest)

"""What latents remember of their inputs, to notice an image that was replaced and to show a caption that changed.

Next to each shard lies a small file with the sizes, times of modification and checksums of its images, and with the
names of those images that the spec's hash counts without a caption. An image is read again to compare its checksum only
if it, or the file that holds it, was modified since. Latents without these files are used as they are.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

from tqdm import tqdm

from pipeline.data.records import Record, inputs_sha256
from pipeline.system.echo import plural, printable
from pipeline.system.errors import UserError
from shards.manifest import Manifest
from shards.plan import PlannedShard
from shards.reader import read_entry
from shards.sidecar import read_head, read_sidecar
from shards.store import Store

# The parts of a spec that follow from the inputs.
OF_INPUTS = ("inputs_sha256", "entries")
# How the reasons begin that an image was skipped for without looking at it. Its caption then counts as empty.
WITHOUT_CAPTION = re.compile(r"there is no caption|the caption |no caption file |the \.\w+ |the sample ")


class Remembered(NamedTuple):
    """The images of one shard: which of them count without a caption, and in the shard's order their sizes in bytes,
    times of modification in ns, and CRC-32s. Earlier versions kept neither times nor CRCs."""

    sizes: list[int | None]
    without_caption: list[str]
    modified: list[int | None]
    crc32: list[int | None]

    def unchanged(self, place: int, record: Record) -> bool:
        """Whether the image at `place` is that of the record, by its size and time alone, as far as they are known."""
        times = (record.modified, self.modified[place])
        return record.size == self.sizes[place] and (None in times or times[0] == times[1])


class Changed(NamedTuple):
    """An entry of a finished shard that differs from the record in its place, which may be missing."""

    entry: int
    source_id: str
    caption: str
    record: Record | None


def remember(
    store: Store,
    manifest: Manifest,
    shard: PlannedShard,
    records: list[Record],
    crcs: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Write what the latents have to remember of a shard's records: before the shard is written, and again once the
    CRC-32s of its images are known, by source_id. Those of unchanged images are kept."""
    known = _remembered(store, shard)
    without = {*_without_caption(store, manifest, shard), *(record.source_id for record in records if record.problem)}
    kept = [known.crc32[i] if known and known.unchanged(i, record) else None for i, record in enumerate(records)]
    content = {
        "sizes": [record.size for record in records],
        "without_caption": sorted(without),
        "modified": [record.modified for record in records],
        "crc32": [crcs.get(record.source_id, crc) for record, crc in zip(records, kept, strict=True)],
    }
    with store.write(_file_name(shard)) as stream:
        stream.write(json.dumps(content).encode())


def count_unchanged(store: Store, shard: PlannedShard, records: list[Record], skipped: Iterable[dict[str, str]]) -> int:
    """How many of a shard's records, from the first one on, are as they were when they were remembered.

    One that was `skipped` then is not, if its image or caption may have been fixed. Call this before `remember`.
    """
    remembered = _remembered(store, shard)
    if remembered is None:
        return 0
    reasons = {item["source_id"]: item["reason"] for item in skipped}
    for place, record in enumerate(records):
        reason = reasons.get(record.source_id)
        may_be_fixed = reason is not None and (remembered.sizes[place] is None or WITHOUT_CAPTION.match(reason))
        if not remembered.unchanged(place, record) or (may_be_fixed and record.problem is None):
            return place
    return len(records)


def settled_spec(
    store: Store, manifest: Manifest, spec: dict[str, Any], records: list[Record], read: Callable[[Record], bytes]
) -> dict[str, Any]:
    """`spec`, made of `records`, as it is to be compared with that of existing latents. `read` gives an encoded image.

    A caption that was missing when they were made and is there now still counts as missing. Raises UserError if an
    image was replaced after its shard was written, and if nothing but images or captions differs from the latents.
    """
    if any(manifest.spec.get(name) != value for name, value in _as_json(spec).items() if name not in OF_INPUTS):
        return spec
    unfinished = set(manifest.plan.unfinished(store))
    finished = [shard for shard in manifest.plan if shard not in unfinished]
    if spec["inputs_sha256"] != manifest.spec["inputs_sha256"]:
        without = {name for shard in manifest.plan for name in _without_caption(store, manifest, shard)}
        stated = inputs_sha256([replace(r, caption="") if r.source_id in without else r for r in records])
        same = stated == manifest.spec["inputs_sha256"]
        changes = _changes(store, manifest, finished, records, without if same else None)
        _refuse_changes(store, changes, same, manifest.spec["entries"], len(records))
        spec = {**spec, "inputs_sha256": stated}
    _refuse_replaced(store, manifest, finished, records, read)
    return spec


def renew_times(store: Store, manifest: Manifest, records: list[Record]) -> None:
    """Remember the times of images that were modified but are the same, as `settled_spec` has found, so that they are
    not read again."""
    unfinished = set(manifest.plan.unfinished(store))
    for shard in manifest.plan:
        remembered = _remembered(store, shard) if shard not in unfinished else None
        here = [records[index] for index in shard.indices]
        if remembered and not all(remembered.unchanged(place, record) for place, record in enumerate(here)):
            crcs = zip(here, remembered.crc32, strict=True)
            remember(store, manifest, shard, here, {record.source_id: crc for record, crc in crcs if crc is not None})


def _as_json(spec: dict[str, Any]) -> dict[str, Any]:
    """The spec as a manifest has it, where a tuple is a list."""
    return json.loads(json.dumps(spec))


def _file_name(shard: PlannedShard) -> str:
    return f"inputs-{shard.name.removesuffix('.tar')}.json"


def _remembered(store: Store, shard: PlannedShard) -> Remembered | None:
    name = _file_name(shard)
    if not store.exists(name):
        return None
    try:
        content = json.loads(store.read(name))
        sizes, without = list(content["sizes"]), list(content["without_caption"])
        later = [list(content.get(key, [None] * len(sizes))) for key in ("modified", "crc32")]
        remembered = Remembered(sizes, without, *later)
        for of_images in (sizes, *later):
            if len(of_images) != len(shard.indices):
                raise ValueError(f"{len(of_images)} values for {len(shard.indices)} images")
        return remembered
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{store}/{name} is damaged ({error!r}). Delete it and rerun the same command.") from None


def _without_caption(store: Store, manifest: Manifest, shard: PlannedShard) -> list[str]:
    """The images of a shard that the spec counts without a caption, as far as that is known."""
    remembered = _remembered(store, shard)
    if remembered is not None:
        return remembered.without_caption
    return [name for name, reason in _skipped(store, manifest, shard).items() if WITHOUT_CAPTION.match(reason)]


def _skipped(store: Store, manifest: Manifest, shard: PlannedShard) -> dict[str, str]:
    """The images that a finished shard lacks, with the reasons. Empty for an unfinished shard."""
    if not store.exists(manifest.sidecar_name(shard.name)):
        return {}
    skipped = read_head(store, shard.name, manifest).skipped
    return {item["source_id"]: item["reason"] for item in skipped}


def _changes(
    store: Store, manifest: Manifest, shards: list[PlannedShard], records: list[Record], among: set[str] | None
) -> Iterator[Changed]:
    """The entries of finished shards that differ from the records; only those with names `among`, if that is given."""
    for shard in shards:
        here = {record.source_id for record in records[shard.indices.start : shard.indices.stop]}
        if among is not None and not here & among:
            continue
        sidecar = read_sidecar(store, shard.name, manifest)
        for place, key in enumerate(sidecar.keys):
            meta = read_entry(store, shard.name, sidecar.row(place), [], manifest, {}).meta
            record = records[int(key)] if int(key) < len(records) else None
            known = (meta["source_id"], meta["caption"])
            now = record and (record.source_id, record.caption)
            if known != now and (among is None or meta["source_id"] in among):
                yield Changed(int(key), *known, record)


def _refuse_changes(store: Store, changes: Iterator[Changed], same: bool, entries: int, records: int) -> None:
    """Raise UserError with the first change and their number; without one, unless the inputs are the `same`."""
    first = next(changes, None)
    if first is None:
        if same:
            return
        what = "the captions or names of images that its finished shards do not hold are others now"
    elif first.record is None or first.record.source_id != first.source_id:
        now = first.record.source_id if first.record else "none"
        what = f"entry {first.entry} was the image {first.source_id} and is now {now}"
    else:
        count = 1 + sum(change.record is not None and change.record.source_id == change.source_id for change in changes)
        now = repr(first.record.caption) if not first.record.problem else f"cannot be used ({first.record.problem})"
        what = (
            f"{plural(count, 'caption')} changed. The first is that of {first.source_id}: "
            f"{_short(repr(first.caption))} -> {_short(now)}"
        )
    if entries != records:
        what = f"{what} ({entries} entries -> {records})"
    remedy = "Restore the inputs, or choose another output directory."
    raise UserError(printable(f"{store} was made from other inputs: {what}. {remedy}"))


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"


def _refuse_replaced(
    store: Store,
    manifest: Manifest,
    finished: list[PlannedShard],
    records: list[Record],
    read: Callable[[Record], bytes],
) -> None:
    """Raise UserError if images are others than when their finished shards were written."""
    progress = tqdm(finished, unit="shard", desc="compare images", delay=2)
    replaced = [(shard, *change) for shard in progress for change in _replaced(store, manifest, shard, records, read)]
    if not replaced:
        return
    shard, record, size = replaced[0]
    names = list(dict.fromkeys(shard.name for shard, _, _ in replaced))
    count = f"{plural(len(replaced), 'image')} in {plural(len(names), 'shard')}"
    now = "has other contents" if record.size == size else f"has {record.size}"
    raise UserError(
        printable(
            f"the image {record.source_id} was replaced after {store}/{shard.name} was written: it had {size} bytes "
            f"and {now} now. That is so for {count}. To encode them again, "
            f"delete {manifest.files_of(names)} in {store}, and rerun the same command. The other shards are kept."
        )
    )


def _replaced(
    store: Store, manifest: Manifest, shard: PlannedShard, records: list[Record], read: Callable[[Record], bytes]
) -> list[tuple[Record, int]]:
    """The records of a finished shard whose images are others now, with the sizes that they had."""
    remembered = _remembered(store, shard)
    if remembered is None:
        return []
    others = []
    for place, index in enumerate(shard.indices):
        record, size, crc = records[index], remembered.sizes[place], remembered.crc32[place]
        if record.size is None or size is None or remembered.unchanged(place, record):
            continue
        if record.size != size or (crc is not None and _differs(record, crc, read)):
            others.append((record, size))
    skipped = _skipped(store, manifest, shard) if others else {}
    return [(record, size) for record, size in others if record.source_id not in skipped]


def _differs(record: Record, crc: int, read: Callable[[Record], bytes]) -> bool:
    """Whether an image has another CRC-32. Of one that cannot be read that is not known."""
    try:
        return zlib.crc32(read(record)) != crc
    except OSError:
        return False

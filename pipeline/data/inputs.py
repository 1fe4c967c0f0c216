"""What latents remember of their inputs, to notice an image that was replaced and to show a caption that changed.

Next to each shard lies a small file with the sizes of its images in bytes, and with the names of those images that the
spec's hash counts without a caption. Latents without these files are used as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

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
    """The images of one shard: their sizes in the shard's order, and which of them count without a caption."""

    sizes: list[int | None]
    without_caption: list[str]


class Changed(NamedTuple):
    """An entry of a finished shard that differs from the record in its place, which may be missing."""

    entry: int
    source_id: str
    caption: str
    record: Record | None


def remember(store: Store, manifest: Manifest, shard: PlannedShard, records: list[Record]) -> None:
    """Write what the latents have to remember of a shard's records. Call this before the shard is written."""
    without = {*_without_caption(store, manifest, shard), *(record.source_id for record in records if record.problem)}
    with store.write(_file_name(shard)) as stream:
        content = {"sizes": [record.size for record in records], "without_caption": sorted(without)}
        stream.write(json.dumps(content).encode())


def count_unchanged(store: Store, shard: PlannedShard, records: list[Record], skipped: Iterable[dict[str, str]]) -> int:
    """How many of a shard's records, from the first one on, are as they were when they were remembered.

    One that was `skipped` then is not, if its image or caption may have been fixed. Call this before `remember`.
    """
    remembered = _remembered(store, shard)
    if remembered is None:
        return 0
    reasons = {item["source_id"]: item["reason"] for item in skipped}
    for place, (record, size) in enumerate(zip(records, remembered.sizes, strict=True)):
        reason = reasons.get(record.source_id)
        may_be_fixed = reason is not None and (size is None or WITHOUT_CAPTION.match(reason))
        if record.size != size or (may_be_fixed and record.problem is None):
            return place
    return len(records)


def settled_spec(store: Store, manifest: Manifest, spec: dict[str, Any], records: list[Record]) -> dict[str, Any]:
    """`spec`, made of `records`, as it is to be compared with that of existing latents.

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
    _refuse_replaced(store, manifest, finished, records)
    return spec


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
        remembered = Remembered(list(content["sizes"]), list(content["without_caption"]))
        if len(remembered.sizes) != len(shard.indices):
            raise ValueError(f"{len(remembered.sizes)} sizes for {len(shard.indices)} images")
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


def _refuse_replaced(store: Store, manifest: Manifest, finished: list[PlannedShard], records: list[Record]) -> None:
    """Raise UserError if images have other sizes than when their finished shards were written."""
    replaced = [(shard, *change) for shard in finished for change in _replaced(store, manifest, shard, records)]
    if not replaced:
        return
    shard, record, size = replaced[0]
    names = list(dict.fromkeys(shard.name for shard, _, _ in replaced))
    count = f"{plural(len(replaced), 'image')} in {plural(len(names), 'shard')}"
    raise UserError(
        printable(
            f"the image {record.source_id} was replaced after {store}/{shard.name} was written: it had {size} bytes "
            f"and has {record.size} now. That is so for {count}. To encode them again, "
            f"delete {manifest.files_of(names)} in {store}, and rerun the same command. The other shards are kept."
        )
    )


def _replaced(store: Store, manifest: Manifest, shard: PlannedShard, records: list[Record]) -> list[tuple[Record, int]]:
    """The records of a finished shard whose images have another size now, with the size that they had."""
    remembered = _remembered(store, shard)
    if remembered is None:
        return []
    pairs = zip((records[index] for index in shard.indices), remembered.sizes, strict=True)
    others = [(record, size) for record, size in pairs if None not in (record.size, size) and record.size != size]
    skipped = _skipped(store, manifest, shard) if others else {}
    return [(record, size) for record, size in others if size is not None and record.source_id not in skipped]

"""What a rolling cache holds now, in words: its rounds, and the trainings that read them."""

from __future__ import annotations

from collections import Counter

from pipeline.system.echo import one_line, plural
from shards.manifest import Manifest
from shards.readers import Reader, read_readers
from shards.schema import round_of
from shards.store import Store


def rolling_lines(store: Store, manifest: Manifest, there: set[str]) -> list[str]:
    """The rounds of a rolling cache of which shards are `there`, and its readers, a line each."""
    shards = Counter(round_of(name) for name in there)
    held = [
        str(number) if count == manifest.plan.in_round else f"{number} in part"
        for number, count in sorted(shards.items(), key=lambda item: item[0] or 0)
    ]
    return [
        f"rounds: {manifest.rounds}, with a window of {manifest.window}",
        f"rounds there: {', '.join(held) or 'none'}",
        *([reader_line(reader) for reader in read_readers(store)] or ["readers: none yet"]),
    ]


def reader_line(reader: Reader) -> str:
    """How far a reader has come, and when it last said so."""
    passed = f"all of its {plural(reader.end, 'round')}" if reader.is_done else f"{reader.next} of {reader.end} rounds"
    return f"reader {reader.name}: has passed {passed}, last heard of at {one_line(reader.seen)}"

"""The readers of a rolling cache: how far each training has come, in a file of its own next to the shards.

`teacher-cache --window W` writes the rounds that come next for the slowest reader, W at most, and deletes those that
all have passed. Both follow from the readers' files alone, so either side may die and begin again at any moment.

readers/NAME.json   written by the training when it begins, and after each of its checkpoints
deleting.json       the rounds that are about to be deleted; there only meanwhile

No reader opens a round that is about to go: the writer announces what it deletes and then looks at the readers again,
and a reader tells what it needs and then looks for an announcement. Whoever comes second sees the other.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from shards.schema import ShardError, json_bytes, round_of
from shards.store import LocalStore, Store, write_json

READERS, DELETING = "readers", "deleting.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SIDECAR = re.compile(r"r\d{4,}-s\d{5,}\.index")


@dataclass(frozen=True)
class Reader:
    """A training that takes a cache round after round.

    `next` is the oldest round that it needs if it is resumed from its newest checkpoint, and `end` the first one that
    it does not need any more. Both are counted on through several passes over `rounds`. `training` tells it from
    others of its name, and `seen` is when it last said so, in UTC.
    """

    name: str
    training: str
    next: int
    end: int
    rounds: int
    seen: str = ""

    @property
    def is_done(self) -> bool:
        return self.next >= self.end

    def ahead(self, window: int) -> range:
        """The rounds that it needs next, counted on."""
        return range(self.next, min(self.next + window, self.end))


def file_of(name: str) -> str:
    return f"{name}.json"


def read_readers(store: Store) -> list[Reader]:
    """All readers of a cache, by name. Raises ShardError for a file that is not one of a reader."""
    found = (read_reader(store, name) for name in reader_names(store))
    return [reader for reader in found if reader is not None]


def reader_names(store: Store) -> list[str]:
    """The names of a cache's readers, also of those whose files are damaged."""
    names = [name.removesuffix(".json") for name in store.folder(READERS).list() if name.endswith(".json")]
    return [name for name in names if NAME.fullmatch(name)]


def read_reader(store: Store, name: str) -> Reader | None:
    """The reader of that name; None if there is none. Raises ShardError if its file is damaged."""
    folder = store.folder(READERS)
    try:
        reader = Reader(**json.loads(folder.read(file_of(name))))
        counts = reader.next, reader.end, reader.rounds
        if reader.name != name or any(type(count) is not int for count in counts) or min(counts) < 0 or not counts[2]:
            raise ValueError(f"it states {reader}")
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError) as error:
        raise ShardError(
            f"{folder}/{file_of(name)} is damaged ({error!r:.200}). Drop this reader (`distill-sd drop-reader`) and "
            "rerun its training, which says again how far it has come."
        ) from None
    return reader


def write_reader(store: Store, reader: Reader, *, new: bool = False) -> None:
    """Write the file of a reader, with the time. A `new` one replaces nothing; else FileExistsError is raised."""
    folder = store.folder(READERS)
    if isinstance(folder, LocalStore):
        folder.directory.mkdir(exist_ok=True)
    stated = {**asdict(reader), "seen": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    with folder.write(file_of(reader.name), new=new) as stream:
        stream.write(json_bytes(stated))


def drop_reader(store: Store, name: str) -> None:
    store.folder(READERS).delete(file_of(name))


def wanted_rounds(readers: Sequence[Reader], window: int, rounds: int) -> list[int]:
    """The rounds that must be there now, the most urgent first: the next `window` of the slowest reader, and before
    there is any reader the first ones. None once all readers are done."""
    if not readers:
        return list(range(min(window, rounds)))
    active = [reader for reader in readers if not reader.is_done]
    end = min((reader.next for reader in active), default=0) + window
    ahead = sorted({(r, r % reader.rounds) for reader in active for r in reader.ahead(window) if r < end})
    return list(dict.fromkeys(number for _, number in ahead))


def kept_rounds(readers: Sequence[Reader], window: int) -> set[int] | None:
    """The rounds that some reader needs next, which are not deleted. None, for all, if no reader needs any."""
    active = [reader for reader in readers if not reader.is_done]
    return {r % reader.rounds for reader in active for r in reader.ahead(window)} if active else None


def rounds_there(store: Store, in_round: int) -> set[int]:
    """The rounds of so many shards that are complete and not about to be deleted."""
    # In this order: what is deleted between the two looks is missing in the second.
    going = announced(store)
    finished = Counter(round_of(name) for name in store.list() if SIDECAR.fullmatch(name))
    return {number for number, shards in finished.items() if number is not None and shards == in_round} - going


def announced(store: Store) -> set[int]:
    """The rounds that are about to be deleted."""
    try:
        return set(json.loads(store.read(DELETING))["rounds"])
    except FileNotFoundError:
        return set()


def announce(store: Store, rounds: Any) -> None:
    write_json(store, DELETING, {"rounds": sorted(rounds)})

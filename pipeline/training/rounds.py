"""A training on a rolling cache: a reader by name, which waits for the rounds that it needs and tells which it needs
still.

What it tells is always about its newest checkpoint, so a training that is killed at any moment finds its rounds there.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from accelerate import Accelerator

from pipeline.settings.distill import DistillSettings
from pipeline.system.echo import say
from pipeline.system.errors import UserError
from pipeline.system.json_files import read_json
from pipeline.training.interrupts import Interrupts
from pipeline.training.loader import collated_batches, order_of
from pipeline.training.output import checkpointed_step
from pipeline.training.peers import Peers
from shards.dataset import Batch, RoundBatches
from shards.files import write_json
from shards.manifest import read_manifest
from shards.readers import NAME, Reader, read_reader, rounds_there, write_reader
from shards.rolling import RollingSet
from shards.schema import ShardError
from shards.store import Store

# In --out: the name of the training among the readers, and what tells it from others of that name.
READER = "reader.json"
READER_REMEDY = "Restore it from a backup, or delete it, drop the reader and rerun the same command."
# Seconds between two looks at what is there, and of waiting without a word.
POLL, SILENCE = 5.0, 10.0


@dataclass
class RollingRounds:
    """The rounds of a rolling cache as one training sees them. `order` has the training's global batches.

    Rounds are counted on through several passes. Every process has one of these; the main one writes the reader's file.
    """

    store: Store
    reader: Reader
    order: RoundBatches
    in_round: int
    is_main: bool
    window: int
    there: set[int] = field(default_factory=set)

    def ready(self, rounds: range) -> bool:
        """Whether these rounds are there, and stay until the reader says that it has passed them."""
        if not self.there.issuperset(rounds):
            # Another run of the writer may have another one.
            self.window = read_manifest(self.store, "cache").window or 0
            found = rounds_there(self.store, self.in_round)
            self.there = {r for r in self.reader.ahead(self.window) if r % self.reader.rounds in found}
        return self.there.issuperset(rounds)

    def wait_for_first(self) -> None:
        """Wait for the oldest round that the training needs, and with it all else that it needs of the cache."""
        wait = Wait(self)
        while not self.reader.is_done and not self.ready(range(self.reader.next, self.reader.next + 1)):
            wait.a_while()

    def stopped_waiting(self, position: int, peers: Peers, interrupts: Interrupts) -> bool:
        """Wait, in all processes, for the rounds of the step that begins at `position`. Returns whether one of them was
        told to stop before they came. Raises UserError if they cannot come, since the window has become too small."""
        wait, needed = Wait(self), self.order.rounds_of_step(position)
        while peers.any(not self.ready(needed)):
            if needed.stop > self.reader.next + self.window:
                raise too_small(self.store, self.window, needed.stop - self.reader.next, self.order.in_step)
            if peers.any(interrupts.requested):
                return True
            wait.a_while()
        return False

    def has_passed_one(self, position: int) -> bool:
        """Whether the training, at `position`, needs no more the oldest round that its reader holds."""
        return self.order.oldest_round(position) > self.reader.next

    def saved(self, position: int, *, is_last: bool) -> None:
        """Tell, after a checkpoint at `position`, which rounds the training still needs."""
        oldest = self.reader.end if is_last else self.order.oldest_round(position)
        self.reader = replace(self.reader, next=oldest)
        if self.is_main:
            self.check_membership()
            write_reader(self.store, self.reader)

    def check_membership(self) -> None:
        """Raise UserError if the reader was dropped."""
        found = read_reader(self.store, self.reader.name)
        if found is None or found.training != self.reader.training:
            raise UserError(
                f"the reader {self.reader.name!r} of {self.store} was dropped, so its rounds are no longer kept. Rerun "
                "the same command to go on from the last checkpoint: it is a reader again then, and `teacher-cache` "
                "writes again what it needs."
            )


@dataclass
class Wait:
    """One wait for rounds, of which the main process says after some seconds what is waited for."""

    rolling: RollingRounds
    began: float = field(default_factory=time.monotonic)
    told: bool = False

    def a_while(self) -> None:
        """Sleep until the next look. Raises UserError if the reader was dropped."""
        rolling = self.rolling
        rolling.check_membership()
        if rolling.is_main and not self.told and time.monotonic() - self.began >= SILENCE:
            number = next((r for r in range(rolling.reader.next, rolling.reader.end) if r not in rolling.there), 0)
            say(
                f"waiting for round {number % rolling.reader.rounds} of {rolling.store}, which `distill-sd "
                "teacher-cache` writes. It must be running, here or elsewhere.",
                err=True,
            )
            self.told = True
        time.sleep(POLL)


def rolling_rounds(settings: DistillSettings, entries: RollingSet, accelerator: Accelerator) -> RollingRounds:
    """The rounds of `entries` that a training needs from its newest checkpoint on. Nothing is written.

    Raises UserError if the cache's window is too small for its steps.
    """
    order = order_of(settings, entries, accelerator, 0)
    assert isinstance(order, RoundBatches)
    steps, done = settings.max_train_steps or 0, checkpointed_step(settings.out)
    at_once, end = order.reach(steps)
    window = entries.manifest.window or 0
    if at_once > window:
        raise too_small(entries.store, window, at_once, order.in_step)
    oldest = end if done >= steps else order.oldest_round(done * order.in_step)
    reader = Reader("", "", oldest, end, entries.rounds)
    in_round, is_main = entries.manifest.plan.in_round, accelerator.is_main_process
    return RollingRounds(entries.store, reader, order, in_round, is_main, window)


def too_small(store: Store, window: int, at_once: int, in_step: int) -> UserError:
    """The error for a window that holds fewer rounds than the steps of a training need at once."""
    return UserError(
        f"{store} has a window of {window}, but steps of {in_step} entries take from {at_once} rounds at once. Rerun "
        f"its `teacher-cache` with --window {at_once}, which --rounds must exceed, or train with smaller batches."
    )


def register(settings: DistillSettings, rolling: RollingRounds) -> None:
    """Make the training in --out, which is claimed, a reader of its cache, or say how far the one that it is has come.

    Raises UserError if the name is another training's.
    """
    path, store = settings.out / READER, rolling.store
    own = read_json(path, READER_REMEDY) if path.is_file() else {}
    name = settings.reader or own.get("name") or default_name(settings)
    if own.get("name", name) != name:
        raise UserError(
            f"--reader {name}: the training in {settings.out} is the reader {own['name']!r} of its cache. Leave "
            "--reader out to go on with it."
        )
    training = own.get("training") or uuid.uuid4().hex
    write_json(path, {"name": name, "training": training})
    reader = replace(rolling.reader, name=name, training=training)
    try:
        write_reader(store, reader, new=True)
    except FileExistsError:
        found = read_reader(store, name)
        if found is not None and found.training != training:
            if not own:
                path.unlink()
            raise UserError(
                f"{store} has a reader {name!r}, another training, last heard of at {found.seen}. Pass another "
                "--reader, or drop that one if it is gone for good: "
                f"distill-sd drop-reader --cache {settings.cache} --name {name}"
            ) from None
        write_reader(store, reader)


def adopt(settings: DistillSettings, rolling: RollingRounds) -> None:
    """Take up, in every process, the name under which the main one has registered the training."""
    own: dict[str, Any] = read_json(settings.out / READER, READER_REMEDY)
    rolling.reader = replace(rolling.reader, name=own["name"], training=own["training"])


def default_name(settings: DistillSettings) -> str:
    """The name of --out, as far as a reader can have it."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", settings.out.resolve().name).lstrip("._-")[:64]
    return name if NAME.fullmatch(name) else "student"


def rolling_batches(
    settings: DistillSettings, dataset: Any, accelerator: Accelerator, position: int, rolling: RollingRounds
) -> Generator[Batch, None, None]:
    """As `loader.batches`, of a rolling cache. What is read ahead ends where a round is not there yet, and begins again
    when the next batch is asked for; the rounds of that one must be there by then."""
    while True:
        begun = position
        ahead = here(order_of(settings, dataset, accelerator, position), rolling)
        for batch in collated_batches(settings, dataset, accelerator, position, ahead):
            position += len(batch.keys) * accelerator.num_processes
            yield batch.to(accelerator.device)
        if position == begun:
            rolling.check_membership()
            raise ShardError(f"{rolling.store} lacks a round that was there before. Rerun the same command.")


def here(order: Any, rolling: RollingRounds) -> Iterator[list[int]]:
    """The next batches, as indices, as far as their rounds are there."""
    for batch, place in zip(order, order.places(), strict=False):
        if not rolling.ready(order.rounds_of_batch(*place)):
            return
        yield batch

"""Entries as training batches: a map-style dataset, the order of an epoch, and collation.

Loader workers read, check and decompress. Features stay quantised until the training step, which decodes them to
float32 on the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from shards import device_codec
from shards.buckets import STEPS, buckets_of_steps, of_bucket, steps_before
from shards.cache import Cache
from shards.codec import EXACT_DTYPES
from shards.reader import StoredEntry
from shards.schema import (
    INPUT_NOISE,
    LATENTS,
    NOISE,
    TEACHER_PRED,
    ShardError,
    conditioning_shapes,
    image_of,
    tap_member,
)
from shards.store import Store, at_once


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a batch with `function` applied to every tensor in it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, Feature | Batch):
        moved = {f.name: _map_tensors(getattr(value, f.name), function) for f in fields(value)}
        return type(value)(**moved)
    return value


@dataclass(frozen=True)
class Feature:
    """One tap of a batch, as stored.

    `values` (B, C, h, w) are floats if exact. If quantised they are integers, with `quant_step` (B,) float32 and the
    dither's `offsets`, and with `mu` (B, C) unless they were rotated. With `stride` s > 1 they are one position per
    s x s cell of the full map, at row and column `rows`, `columns` of each cell. `offsets`, `rows` and `columns` have
    B items and stay on the host.
    """

    values: Tensor
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    stride: int
    mu: Tensor | None = None
    quant_step: Tensor | None = None
    offsets: tuple[int, ...] | None = None

    def decode(self, calibration: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, C, h, w) float32, on the device of the values. One that was rotated takes its `calibration`, mu (C,) and
        rotation (C, C)."""
        if self.quant_step is None or self.offsets is None:
            return self.values.float()
        if self.mu is not None:
            return device_codec.dequantise(self.values, self.mu, self.quant_step, self.offsets)
        if calibration is None:
            raise ValueError("this tap was rotated: pass its calibration, as in `CacheDataset.calibrations`")
        return device_codec.dequantise_rotated(self.values, *calibration, self.quant_step, self.offsets)


@dataclass(frozen=True)
class Batch:
    """B entries, their tensors as stored: latents, noise, teacher_pred (B, C, H, W), timesteps (B,) int64.

    `conditioning` holds the U-Net's other inputs by name, such as prompt_embeds (B, L, D); `features` the taps by the
    teacher's tap name. `input_noise` is the noise that was added to the latents, if that is not `noise` (see
    `draws.perturbed`).
    """

    keys: tuple[str, ...]
    timesteps: Tensor
    latents: Tensor
    noise: Tensor
    conditioning: dict[str, Tensor]
    teacher_pred: Tensor | None
    features: dict[str, Feature]
    input_noise: Tensor | None = None

    @property
    def added_noise(self) -> Tensor:
        return self.noise if self.input_noise is None else self.input_noise

    def to(self, device: torch.device) -> Batch:
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return _map_tensors(self, lambda tensor: tensor.pin_memory())


class CacheDataset(Dataset):
    """The entries of a cache, of which only the named taps are read, and teacher_pred unless `with_teacher_pred` is
    False.

    `rounds` N uses the first N rounds only; later ones may still be unfinished. Of a `rolling` cache, entries can be
    read while their round is there.
    """

    def __init__(
        self,
        cache: Store,
        taps: Sequence[str],
        with_teacher_pred: bool = True,
        rounds: int | None = None,
        *,
        rolling: bool = False,
    ) -> None:
        self.cache = Cache(cache, rounds, rolling=rolling)
        self.spec = self.cache.manifest.spec
        known = self.spec["taps"]
        absent = [tap for tap in taps if tap not in known]
        if absent:
            raise ShardError(
                f"{cache} has no features of {', '.join(absent)}. "
                "Make a cache with `distill-sd teacher-cache --students` and every level it must serve."
            )
        if not len(self.cache):
            raise ShardError(f"{cache} has no entries: `encode` skipped every image. See skipped.jsonl in its output.")
        self.taps = tuple(taps)
        optional = {TEACHER_PRED: with_teacher_pred, INPUT_NOISE: self.spec.get("input_perturbation")}
        self.conditioning = list(conditioning_shapes(self.spec))
        stored = [LATENTS, NOISE, *self.conditioning]
        self.tensors = [*stored, *(name for name, wanted in optional.items() if wanted)]

    def __len__(self) -> int:
        return len(self.cache)

    @property
    def rounds(self) -> int:
        return self.cache.manifest.rounds or 1

    def counts(self) -> list[int]:
        """The entries of each bucket, in all rounds; of a cache without buckets all of them. Batches are of one."""
        return self.cache.targets.counts()

    def bucket_of(self, entry: StoredEntry) -> int:
        return self.cache.manifest.bucket_of(image_of(entry.key))

    def __getitem__(self, index: int) -> StoredEntry:
        return self.cache.read(index, [*self.tensors, *map(tap_member, self.taps)])

    def __getitems__(self, indices: Sequence[int]) -> list[StoredEntry]:
        """Several entries, as torch's loader asks for those of a batch: read at once where reads wait."""
        return list(at_once(self.cache.store, self.__getitem__, indices))

    @property
    def in_flight(self) -> int:
        """How many reads are worth having at once, as of a store."""
        return self.cache.store.in_flight

    def collate(self, entries: list[StoredEntry]) -> Batch:
        stacked = stack_tensors(entries, self.tensors)
        return Batch(
            keys=tuple(entry.key for entry in entries),
            timesteps=torch.tensor([entry.meta["timestep"] for entry in entries]),
            latents=stacked[LATENTS],
            noise=stacked[NOISE],
            conditioning={name: stacked[name] for name in self.conditioning},
            teacher_pred=stacked.get(TEACHER_PRED),
            features={tap: self._collate_tap(entries, tap) for tap in self.taps},
            input_noise=stacked.get(INPUT_NOISE),
        )

    def calibrations(self, device: torch.device | str = "cpu") -> dict[str, tuple[Tensor, Tensor]]:
        """mu (C,) and rotation (C, C) float32 of each tap, for `Feature.decode`; empty where taps are not rotated."""
        found = self.cache.calibrations()
        return device_codec.on_device({tap: found[tap] for tap in self.taps if tap in found}, device)

    def _collate_tap(self, entries: list[StoredEntry], tap: str) -> Feature:
        member = tap_member(tap)
        records = [entry.meta["taps"][tap] for entry in entries]
        stored = [entry.tensors[member] for entry in entries]
        means = [tensor.mu for tensor in stored if tensor.mu is not None]
        quantised = self.spec["codec"]["name"] not in EXACT_DTYPES
        return Feature(
            # An entry whose q needed more byte planes widens its batch: stacking promotes the dtype.
            values=torch.from_numpy(np.stack([tensor.values for tensor in stored])),
            rows=tuple(record["row"] for record in records),
            columns=tuple(record["column"] for record in records),
            stride=of_bucket(self.spec, self.bucket_of(entries[0]))["taps"][tap]["stride"],
            mu=torch.from_numpy(np.stack(means)) if means else None,
            quant_step=torch.tensor([record["step"] for record in records]) if quantised else None,
            offsets=tuple(record["dither"] for record in records) if quantised else None,
        )


def stack_tensors(entries: list[StoredEntry], names: Sequence[str]) -> dict[str, Tensor]:
    """The entries' exact tensors, stacked: (B, ...) by name, in the dtype they are stored in."""
    return {name: torch.from_numpy(np.stack([entry.tensors[name].values for entry in entries])) for name in names}


class EpochBatches:
    """An endless stream of index lists for one process, exact from any position.

    All epochs form one line of positions: epoch e is a permutation of the entries drawn from (seed, e). A global batch
    is the next `batch_size * world_size` positions, of which process `rank` takes its own run. So every entry comes
    once per epoch, no batch is partial, and the order of entries depends neither on the number of processes nor on the
    number of loader workers.

    Where `entries` are those of each bucket, each bucket has a line of its own, and all batches of a step, of which
    each process takes `accumulate`, come from the same one (see `buckets_of_steps`). `entries` may hold several
    `rounds`, in each of which the buckets follow one another.
    """

    def __init__(
        self,
        entries: int | Sequence[int],
        batch_size: int,
        seed: int,
        *,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        rounds: int = 1,
    ) -> None:
        self.entries = [entries] if isinstance(entries, int) else list(entries)
        self.batch_size, self.seed, self.rounds = batch_size, seed, rounds
        self.start, self.rank, self.together = start, rank, batch_size * world_size
        self.in_step = self.together * accumulate

    def __iter__(self) -> Iterator[list[int]]:
        drawn: dict[int, tuple[int, np.ndarray]] = {}
        for bucket, position in self.places():
            batch = []
            for p in range(position, position + self.batch_size):
                stretch, place = divmod(p, self._stretch(bucket))
                if drawn.get(bucket, (None,))[0] != stretch:
                    drawn[bucket] = stretch, self._permutation(bucket, stretch)
                batch.append(self._index(bucket, stretch, int(drawn[bucket][1][place])))
            yield batch

    def places(self) -> Iterator[tuple[int, int]]:
        """The bucket of each batch, and the position in that bucket's line at which the batch begins, endlessly."""
        step = self.start // self.in_step
        done, bucket = steps_before(self.entries, self.seed, step), self._bucket(step)
        for taken in itertools.count(self.start, self.together):
            if taken // self.in_step > step:
                done[bucket] += 1
                step += 1
                bucket = self._bucket(step)
            yield bucket, done[bucket] * self.in_step + taken % self.in_step + self.rank * self.batch_size

    def visit(self, bucket: int, position: int) -> int:
        """How often the entry at a position of a bucket's line came before."""
        return position // self.entries[bucket]

    def _bucket(self, step: int) -> int:
        return int(buckets_of_steps(self.entries, self.seed, step, 1)[0])

    def _stretch(self, bucket: int) -> int:
        """The length of the stretches of a bucket's line that are permutations."""
        return self.entries[bucket]

    def _index(self, bucket: int, stretch: int, entry: int) -> int:
        """The index in the set of an entry of a stretch. Those of a bucket are numbered round after round."""
        return self._in_round(bucket, *divmod(entry, self.entries[bucket] // self.rounds))

    def _in_round(self, bucket: int, number: int, place: int) -> int:
        return (number * sum(self.entries) + sum(self.entries[:bucket])) // self.rounds + place

    def _permutation(self, bucket: int, stretch: int) -> np.ndarray:
        key = np.array([self.seed, stretch + (bucket << 48)], np.uint64)
        return np.random.Generator(np.random.Philox(key=key)).permutation(self._stretch(bucket))


class RoundBatches(EpochBatches):
    """As EpochBatches, but one round after another, each in an order of its own that is drawn from (seed, round). After
    the last one the first follows again, in another order; so rounds are counted on.

    Where there are buckets, each bucket's line goes through the rounds, and they are at most a few steps apart.
    """

    def oldest_round(self, position: int) -> int:
        """The oldest round of which entries are left to be taken from position `position` of all on."""
        done = steps_before(self.entries, self.seed, position // self.in_step)
        lines = [bucket for bucket, entries in enumerate(self.entries) if entries]
        return min(done[bucket] * self.in_step // self._stretch(bucket) for bucket in lines)

    def rounds_of_step(self, position: int) -> range:
        """The rounds that the step takes from which begins at `position` of all."""
        step = position // self.in_step
        bucket = self._bucket(step)
        first = steps_before(self.entries, self.seed, step)[bucket] * self.in_step
        return self._rounds(bucket, first, first + self.in_step)

    def rounds_of_batch(self, bucket: int, position: int) -> range:
        """The rounds that a batch of this process takes from; see `places`."""
        return self._rounds(bucket, position, position + self.batch_size)

    def reach(self, steps: int) -> tuple[int, int]:
        """How many rounds must be there at once to train so many steps from the beginning, and the first round that
        they do not take from."""
        lines = {bucket: 0 for bucket, entries in enumerate(self.entries) if entries}
        at_once, end = 1, 0
        for start in range(0, steps, STEPS):
            for bucket in buckets_of_steps(self.entries, self.seed, start, min(STEPS, steps - start)).tolist():
                oldest = min(taken // self._stretch(other) for other, taken in lines.items())
                taken = self._rounds(bucket, lines[bucket], lines[bucket] + self.in_step)
                at_once, end = max(at_once, taken.stop - oldest), max(end, taken.stop)
                lines[bucket] += self.in_step
        return at_once, end

    def _rounds(self, bucket: int, first: int, stop: int) -> range:
        in_round = self._stretch(bucket)
        return range(first // in_round, (stop - 1) // in_round + 1)

    def _stretch(self, bucket: int) -> int:
        return self.entries[bucket] // self.rounds

    def _index(self, bucket: int, stretch: int, entry: int) -> int:
        return self._in_round(bucket, stretch % self.rounds, entry)

"""Entries as training batches: a map-style dataset, the order of an epoch, and the collating.

Loader workers read, check and decompress; what they hand over is still quantised, and becomes float32
on the device, in the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from shards import device_codec
from shards.reader import ShardSet, StoredEntry
from shards.schema import INPUT_NOISE, LATENTS, NOISE, PROMPT_EMBEDS, TEACHER_PRED, ShardError, tap_member


def _map_tensors(value: Any, function) -> Any:
    """A copy of a batch in which `function` was applied to every tensor, one level of dict deep or more."""
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

    `values` (B, C, h, w): floats when exact, integers when quantised, then with `mu` (B, C) and `step`
    (B,) float32 and the dither `offsets`. With `stride` s > 1 it holds one position of each s x s cell
    of the full map: row and column `rows`, `columns`. These three lists (B,) stay on the host.
    """

    values: Tensor
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    stride: int
    mu: Tensor | None = None
    step: Tensor | None = None
    offsets: tuple[int, ...] | None = None

    def decode(self) -> Tensor:
        """(B, C, h, w) float32, on the device that the values are on."""
        if self.mu is None:
            return self.values.float()
        return device_codec.dequantise(self.values, self.mu, self.step, self.offsets)


@dataclass(frozen=True)
class Batch:
    """B entries. Tensors as stored: latents, noise, teacher_pred (B, C, H, W), prompt_embeds (B, L, D).

    `timesteps` (B,) int64. `features` by the teacher's tap name. `input_noise` is what was added to the latents where
    that is not the noise (see `draws.perturbed`).
    """

    keys: tuple[str, ...]
    timesteps: Tensor
    latents: Tensor
    noise: Tensor
    prompt_embeds: Tensor
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
    """The entries of a cache, with only the taps named. `with_teacher_pred` False leaves that unread.

    `rounds` N takes the first N rounds alone, which may be all that is finished.
    """

    def __init__(
        self, cache: Path, taps: Sequence[str], with_teacher_pred: bool = True, rounds: int | None = None
    ) -> None:
        self.shards = ShardSet(cache, "cache", rounds)
        known = self.shards.manifest.spec["taps"]
        absent = [tap for tap in taps if tap not in known]
        if absent:
            raise ShardError(
                f"{cache} holds no features of {', '.join(absent)}: "
                "make a cache with `distill-sd teacher-cache --students` naming every level that it shall serve"
            )
        if not len(self.shards):
            raise ShardError(f"{cache} holds no entries: every image was skipped when its latents were encoded")
        self.taps = tuple(taps)
        optional = {TEACHER_PRED: with_teacher_pred, INPUT_NOISE: self.shards.manifest.spec.get("input_perturbation")}
        self.tensors = [LATENTS, NOISE, PROMPT_EMBEDS, *(name for name, wanted in optional.items() if wanted)]

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> StoredEntry:
        return self.shards.read(index, [*self.tensors, *map(tap_member, self.taps)])

    def collate(self, samples: list[StoredEntry]) -> Batch:
        def stack(name: str) -> Tensor | None:
            if name not in self.tensors:
                return None
            return torch.from_numpy(np.stack([sample.tensors[name].values for sample in samples]))

        return Batch(
            keys=tuple(sample.key for sample in samples),
            timesteps=torch.tensor([sample.meta["timestep"] for sample in samples]),
            latents=stack(LATENTS),
            noise=stack(NOISE),
            prompt_embeds=stack(PROMPT_EMBEDS),
            teacher_pred=stack(TEACHER_PRED),
            features={tap: self._collate_tap(samples, tap) for tap in self.taps},
            input_noise=stack(INPUT_NOISE),
        )

    def _collate_tap(self, samples: list[StoredEntry], tap: str) -> Feature:
        member = tap_member(tap)
        records = [sample.meta["taps"][tap] for sample in samples]
        stored = [sample.tensors[member] for sample in samples]
        quantised = stored[0].mu is not None
        return Feature(
            # Entries whose q needed more byte planes widen their batch: stacking promotes.
            values=torch.from_numpy(np.stack([tensor.values for tensor in stored])),
            rows=tuple(record["row"] for record in records),
            columns=tuple(record["column"] for record in records),
            stride=self.shards.manifest.spec["taps"][tap]["stride"],
            mu=torch.from_numpy(np.stack([tensor.mu for tensor in stored])) if quantised else None,
            step=torch.tensor([record["step"] for record in records]) if quantised else None,
            offsets=tuple(record["dither"] for record in records) if quantised else None,
        )


class EpochBatches:
    """An endless stream of index lists for one process, exact from any position.

    All epochs form one line of positions: epoch e is a permutation of the entries drawn from
    (seed, e). A global batch is the next `batch_size * world_size` positions, of which process `rank`
    takes its run; so every entry comes once an epoch, no batch is partial, and the order of entries
    depends neither on the number of processes nor on that of loader workers.
    """

    def __init__(
        self, entries: int, batch_size: int, seed: int, *, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.entries, self.batch_size, self.seed = entries, batch_size, seed
        self.start, self.rank, self.world_size = start, rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        position = self.start + self.rank * self.batch_size
        order, drawn = self._permutation(position // self.entries), position // self.entries
        while True:
            batch = []
            for p in range(position, position + self.batch_size):
                epoch, place = divmod(p, self.entries)
                if epoch != drawn:
                    order, drawn = self._permutation(epoch), epoch
                batch.append(int(order[place]))
            yield batch
            position += self.batch_size * self.world_size

    def _permutation(self, epoch: int) -> np.ndarray:
        key = np.array([self.seed, epoch], np.uint64)
        return np.random.Generator(np.random.Philox(key=key)).permutation(self.entries)

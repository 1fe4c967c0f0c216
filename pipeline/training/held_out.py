"""The error of a student in training on images that it is not trained on.

    held_out/task     mean square error of its prediction against the noise schedule's target
    held_out/output   the same against the teacher's prediction, where a cache has stored it

Noise and timesteps are the same at every step and cover the schedule evenly, so the errors of a run can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor

from pipeline.cache.latents import other_part
from pipeline.core import draws
from pipeline.core.diffusion import add_noise
from pipeline.models.families import Family, denoise
from pipeline.models.hashing import stated_once
from pipeline.settings.training import TrainingSettings
from pipeline.system.errors import UserError
from pipeline.training.objective import Objective
from shards.buckets import batched_alike
from shards.dataset import Batch, CacheDataset, stack_tensors
from shards.location import Location
from shards.manifest import read_manifest
from shards.reader import ShardSet
from shards.schema import LATENTS, conditioning_shapes, image_of
from shards.store import at_once, open_store

# As many entries say within a few per cent where a student stands, and take the time of some steps.
ENTRIES, BATCH = 64, 8
FLAG = "--validation-latents"


class HeldOut:
    """Entries of a directory of latents or of a cache, evenly spread over it, as batches on the CPU."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return sum(len(batch.keys) for batch in self.batches)

    @torch.no_grad()
    def errors(
        self,
        student: UNet2DConditionModel,
        family: Family,
        alphas_cumprod: Tensor,
        prediction_type: str,
        accelerator: Accelerator,
    ) -> dict[str, float]:
        """The mean errors over all entries, by name. The student is in evaluation mode."""
        sums: dict[str, float] = {}
        for batch in (batch.to(accelerator.device) for batch in self.batches):
            noisy = add_noise(batch.latents, batch.added_noise, batch.timesteps, alphas_cumprod)
            with accelerator.autocast():
                prediction = denoise(student, noisy, batch.timesteps, batch.conditioning, family)
            for name, term in Objective().losses(batch, prediction, {}, alphas_cumprod, prediction_type).items():
                sums[name] = sums.get(name, 0.0) + float(term) * len(batch.keys)
        return {f"held_out/{name}": value / len(self) for name, value in sums.items()}


def held_out_of(settings: TrainingSettings, trained_on: dict[str, Any], train_timesteps: int) -> HeldOut | None:
    """The entries of --validation-latents, if it is given. `trained_on` is the spec of the training's own entries.

    Latents get noise and timesteps in [0, `train_timesteps`) from the settings' seed. Raises UserError for entries of
    other encoders or of another teacher, and for those that are trained on; ShardError for a directory that is neither
    finished latents nor a finished cache.
    """
    directory = settings.validation_latents
    if directory is None:
        return None
    stage = read_manifest(open_store(directory)).spec["stage"]
    if stage == "cache":
        dataset = CacheDataset(open_store(directory), ())
        check(directory, dataset.spec, trained_on)
        entries = sorted(dataset.__getitems__(spread(len(dataset))), key=dataset.bucket_of)
        return HeldOut([dataset.collate(batch) for _, batch in batched_alike(entries, BATCH, dataset.bucket_of)])
    shards = ShardSet(open_store(directory), stage)
    check(directory, shards.manifest.spec, trained_on)
    return HeldOut(list(batches_of_latents(shards, train_timesteps, settings.seed)))


def check(directory: Location, spec: dict[str, Any], trained_on: dict[str, Any]) -> None:
    """Raise UserError unless entries of `spec` can be compared with those of `trained_on` and are others."""
    latents, others = (stated.get("latents", stated) for stated in (spec, trained_on))
    if latents == others:
        raise UserError(f"{FLAG} {directory} holds the images that are trained on. Encode images that are held out.")
    other = other_part(others, latents)
    if other:
        raise UserError(
            f"{FLAG} {directory} was encoded with another {other[0]} than the training data{other[1]}. "
            "Encode it with the same pipeline."
        )
    for name in ("teacher_sha256", "teacher_config", "noise_scheduler", "prediction_type"):
        if name not in spec or name not in trained_on:
            continue
        stated = [each[name] for each in (spec, trained_on)]
        if name == "teacher_config":
            stated = [stated_once(config) for config in stated]
        if stated[0] != stated[1]:
            raise UserError(
                f"{FLAG} {directory} was made with another {name.removesuffix('_sha256').replace('_', ' ')} than the "
                "cache. Make it with the same teacher and options."
            )


def spread(count: int) -> list[int]:
    """Up to ENTRIES indices, evenly spread over `count` entries."""
    return [int(i) for i in np.linspace(0, count - 1, min(ENTRIES, count))]


def batches_of_latents(shards: ShardSet, train_timesteps: int, seed: int) -> Iterator[Batch]:
    """The images with noise of their own. Each has a timestep in a part of the schedule of its own."""
    chosen, conditioning = spread(len(shards)), list(conditioning_shapes(shards.manifest.spec))
    if not chosen:
        raise UserError(f"{FLAG} {shards.store} holds no images: all were skipped. See its skipped.jsonl.")
    first = 0
    found = at_once(shards.store, lambda index: shards.read(index, [LATENTS, *conditioning]), chosen)
    for _, entries in batched_alike(found, BATCH, lambda entry: shards.manifest.bucket_of(image_of(entry.key))):
        ids = [entry.meta["source_id"] for entry in entries]
        shape = entries[0].tensors[LATENTS].values.shape
        places = [draws.generator(seed, name, 0, "held-out").random() for name in ids]
        timesteps = [int((first + i + p) / len(chosen) * train_timesteps) for i, p in enumerate(places)]
        tensors = stack_tensors(entries, [LATENTS, *conditioning])
        yield Batch(
            keys=tuple(entry.key for entry in entries),
            timesteps=torch.tensor(timesteps),
            latents=tensors[LATENTS],
            noise=torch.from_numpy(np.stack([draws.noise(seed, name, 0, shape, 0.0) for name in ids])),
            conditioning={name: tensors[name] for name in conditioning},
            teacher_pred=None,
            features={},
        )
        first += len(entries)

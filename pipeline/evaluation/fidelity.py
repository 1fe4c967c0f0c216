"""How close a student is to its teacher on images that the student was not trained on: errors of the output and taps.

latents, conditioning, noise, timestep -> teacher, student -> mean square errors for each part of the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from tqdm import tqdm

from pipeline.core import draws
from pipeline.core.diffusion import add_noise
from pipeline.core.taps import Taps
from pipeline.models.families import Family, denoise
from pipeline.models.hashing import shapes_of
from pipeline.models.levels import LEVELS
from pipeline.models.students import meta_student
from pipeline.system.errors import UserError
from shards.buckets import batched_alike
from shards.dataset import stack_tensors
from shards.reader import ShardSet
from shards.schema import LATENTS, conditioning_shapes
from shards.store import at_once

OUTPUT = "output"
# The "level" of a student with all of the teacher's layers, such as the teacher itself: it is compared block by block.
SAME = "the teacher's own"

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class HeldOut:
    """N encoded images: source ids, N latents (C, H, W) float32, which may differ in size, and conditioning (N, ...)
    float32 by name."""

    source_ids: list[str]
    latents: Sequence[Tensor]
    conditioning: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.source_ids)


def read_held_out(shards: ShardSet, count: int) -> HeldOut:
    """Up to `count` images, evenly spread over the set."""
    chosen = np.linspace(0, len(shards) - 1, min(count, len(shards))).astype(int)
    conditioning = list(conditioning_shapes(shards.manifest.spec))
    entries = list(at_once(shards.store, lambda index: shards.read(int(index), (LATENTS, *conditioning)), chosen))
    latents = [torch.from_numpy(entry.tensors[LATENTS].values).float() for entry in entries]
    ids = [entry.meta["source_id"] for entry in entries]
    return HeldOut(ids, latents, {name: t.float() for name, t in stack_tensors(entries, conditioning).items()})


def levels_of(student: UNet2DConditionModel, teacher: UNet2DConditionModel, family: Family) -> list[str]:
    """The family's levels whose layers match the student's, given this teacher; [SAME] if they are the teacher's."""
    config, shapes = dict(teacher.config), shapes_of(student)
    if shapes == shapes_of(teacher):
        return [SAME]
    return [level for level in family.levels if shapes == shapes_of(meta_student(config, level))]


def pairs_of(level: str, family: Family) -> Pairs:
    """(student module, teacher module) pairs of a level."""
    return tuple((block, block) for block in family.blocks) if level == SAME else LEVELS[level].taps


def bin_edges(bins: int, train_timesteps: int) -> list[int]:
    """The edges of `bins` equal parts of [0, train_timesteps): bins + 1 numbers."""
    return [train_timesteps * i // bins for i in range(bins + 1)]


@torch.inference_mode()
def fidelity(
    held_out: HeldOut,
    teacher: UNet2DConditionModel,
    student: UNet2DConditionModel,
    pairs: Pairs,
    family: Family,
    alphas_cumprod: Tensor,
    bins: int,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """Errors in each part of the schedule and over all of it. Every image gets one timestep in every part.

    `alphas_cumprod` is (T,) float32. An error is {"mse": mean square of student - teacher, "relative": mse divided by
    the teacher's mean square}. The output's error is under "output", a tap's in "taps" under the student's module.

    Raises UserError if an output or a tap is not finite.
    """
    taps = Taps(teacher, dict.fromkeys(name for _, name in pairs)), Taps(student, [name for name, _ in pairs])
    edges = bin_edges(bins, len(alphas_cumprod))
    sums = []
    with tqdm(total=bins * len(held_out), unit="entry", desc="fidelity") as progress:
        for part in range(bins):
            total = np.zeros((1 + len(pairs), 2))
            for shape, chosen in batched_alike(range(len(held_out)), batch_size, lambda i: held_out.latents[i].shape):
                ids = [held_out.source_ids[i] for i in chosen]
                latents = torch.stack([held_out.latents[i] for i in chosen])
                conditioning = {name: tensor[chosen] for name, tensor in held_out.conditioning.items()}
                noise, timesteps = draw_noise(ids, shape, part, edges, seed)
                noisy = add_noise(latents, noise, timesteps, alphas_cumprod.cpu())
                inputs = noisy, timesteps, conditioning, family
                total += mean_squares(predict(teacher, taps[0], *inputs), predict(student, taps[1], *inputs), pairs)
                progress.update(len(ids))
            sums.append(total / len(held_out))
    for unet_taps in taps:
        unet_taps.remove()
    if not np.isfinite(sums).all():
        raise UserError(
            "the outputs of the student or the teacher contain NaN or Inf in this precision. Use --dtype fp32."
        )
    parts = [
        {"first": low, "last": high - 1, **named_errors(total, pairs)}
        for total, low, high in zip(sums, edges, edges[1:], strict=False)
    ]
    return {"entries": len(held_out), "bins": parts, "all": named_errors(np.mean(sums, axis=0), pairs)}


def draw_noise(ids: list[str], shape: tuple[int, ...], part: int, edges: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Noise (B, C, H, W) and timesteps (B,) in a part of the schedule. They depend on the image, not on the batch."""
    noise = [draws.noise(seed, name, part, tuple(shape), 0.0) for name in ids]
    timesteps = [draws.generator(seed, name, part, "held-out").integers(edges[part], edges[part + 1]) for name in ids]
    return torch.from_numpy(np.stack(noise)), torch.tensor(np.array(timesteps))


def predict(
    unet: UNet2DConditionModel,
    taps: Taps,
    noisy: Tensor,
    timesteps: Tensor,
    conditioning: dict[str, Tensor],
    family: Family,
) -> dict[str, Tensor]:
    """A U-Net's output and its taps, by name."""
    with taps.recording(noisy) as features:
        prediction = denoise(unet, noisy, timesteps, conditioning, family)
    return {OUTPUT: prediction, **features}


def mean_squares(teacher: dict[str, Tensor], student: dict[str, Tensor], pairs: Pairs) -> np.ndarray:
    """(1 + pairs, 2) float64, the output first, then the taps.

    A row holds the mean squares of the error and of the teacher, each summed over the batch.
    """
    rows = []
    for student_name, teacher_name in ((OUTPUT, OUTPUT), *pairs):
        expected = teacher[teacher_name].float()
        error = student[student_name].float() - expected
        rows.append((summed_mean_square(error), summed_mean_square(expected)))
    return np.array(rows)


def summed_mean_square(values: Tensor) -> float:
    """The mean square per entry of (B, C, H, W), summed over the batch."""
    return values.square().flatten(1).mean(dim=1).cpu().double().sum().item()


def named_errors(squares: np.ndarray, pairs: Pairs) -> dict[str, Any]:
    """The errors in (1 + pairs, 2) mean squares, under "output" and in "taps" under the student's modules."""
    output, *taps = [{"mse": float(error), "relative": float(error / power)} for error, power in squares]
    return {OUTPUT: output, "taps": {name: error for (name, _), error in zip(pairs, taps, strict=True)}}

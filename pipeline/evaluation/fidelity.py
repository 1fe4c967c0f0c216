"""How near a student is to its teacher on pictures that neither was trained on: errors of the output and the taps.

latents, prompt_embeds, noise, timestep -> teacher, student -> mean square errors, for each part of the schedule.
"""

from __future__ import annotations

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
from pipeline.models.families.sd import DOWN, LEVELS, UP, student_config
from pipeline.models.hashing import shapes_of
from pipeline.system.errors import UserError
from shards.reader import ShardSet
from shards.schema import LATENTS, PROMPT_EMBEDS

OUTPUT = "output"
# A student with all of the teacher's layers, such as the teacher itself, is compared block by block.
SAME = "the teacher's own"
SAME_TAPS = tuple((name, name) for name in (*DOWN, "mid_block", *UP))

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class HeldOut:
    """N encoded pictures: source ids, latents (N, C, H, W) float32, prompt_embeds (N, L, D) float32."""

    source_ids: list[str]
    latents: Tensor
    prompt_embeds: Tensor

    def __len__(self) -> int:
        return len(self.source_ids)


def read_held_out(shards: ShardSet, count: int) -> HeldOut:
    """Up to `count` pictures, evenly spread over all."""
    chosen = np.linspace(0, len(shards) - 1, min(count, len(shards))).astype(int)
    samples = [shards.read(int(index), (LATENTS, PROMPT_EMBEDS)) for index in chosen]

    def stacked(name: str) -> Tensor:
        return torch.from_numpy(np.stack([sample.tensors[name].values for sample in samples])).float()

    return HeldOut([sample.meta["source_id"] for sample in samples], stacked(LATENTS), stacked(PROMPT_EMBEDS))


def levels_of(student: UNet2DConditionModel, teacher: UNet2DConditionModel) -> list[str]:
    """The levels whose student of this teacher has the student's layers; SAME if they are the teacher's own."""
    config, shapes = dict(teacher.config), shapes_of(student)
    if shapes == shapes_of(teacher):
        return [SAME]
    return [level for level in LEVELS if _fits(shapes, config, level)]


def _fits(shapes: dict[str, torch.Size], teacher_config: dict[str, Any], level: str) -> bool:
    with torch.device("meta"):
        return shapes == shapes_of(UNet2DConditionModel.from_config(student_config(teacher_config, level)))


def pairs_of(level: str) -> Pairs:
    """(student module, teacher module) of a level."""
    return SAME_TAPS if level == SAME else LEVELS[level].taps


def bin_edges(bins: int, train_timesteps: int) -> list[int]:
    """The ends of `bins` equal parts of [0, train_timesteps): bins + 1 numbers."""
    return [train_timesteps * i // bins for i in range(bins + 1)]


@torch.inference_mode()
def fidelity(
    held_out: HeldOut,
    teacher: UNet2DConditionModel,
    student: UNet2DConditionModel,
    pairs: Pairs,
    alphas_cumprod: Tensor,
    bins: int,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """Errors in each part of the schedule, and over all of it: every picture has one timestep in every part.

    `alphas_cumprod` (T,) float32. An error is {"mse": mean square of student - teacher, "relative": that as a
    share of the teacher's mean square}; it stands under "output", and in "taps" under the student's module.
    """
    taps = Taps(teacher, dict.fromkeys(name for _, name in pairs)), Taps(student, [name for name, _ in pairs])
    edges = bin_edges(bins, len(alphas_cumprod))
    sums = []
    with tqdm(total=bins * len(held_out), unit="entry", desc="fidelity") as progress:
        for part in range(bins):
            total = np.zeros((1 + len(pairs), 2))
            for first in range(0, len(held_out), batch_size):
                chosen = slice(first, first + batch_size)
                ids = held_out.source_ids[chosen]
                latents, prompt_embeds = held_out.latents[chosen], held_out.prompt_embeds[chosen]
                noise, timesteps = draw_noise(ids, latents.shape[1:], part, edges, seed)
                noisy = add_noise(latents, noise, timesteps, alphas_cumprod.cpu())
                asked = noisy, timesteps, prompt_embeds
                total += squares(ask(teacher, taps[0], *asked), ask(student, taps[1], *asked), pairs)
                progress.update(len(ids))
            sums.append(total / len(held_out))
    for each in taps:
        each.remove()
    if not np.isfinite(sums).all():
        raise UserError("the student's or the teacher's outputs hold NaN or Inf in this precision: use --dtype fp32")
    parts = [
        {"first": low, "last": high - 1, **errors(total, pairs)}
        for total, low, high in zip(sums, edges, edges[1:], strict=False)
    ]
    return {"entries": len(held_out), "bins": parts, "all": errors(np.mean(sums, axis=0), pairs)}


def draw_noise(ids: list[str], shape: tuple[int, ...], part: int, edges: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Each picture's noise (B, C, H, W) and timestep (B,) in a part of the schedule, its own whatever the batch."""
    noise = [draws.noise(seed, name, part, tuple(shape), 0.0) for name in ids]
    drawn = [draws.generator(seed, name, part, "held-out").integers(edges[part], edges[part + 1]) for name in ids]
    return torch.from_numpy(np.stack(noise)), torch.tensor(np.array(drawn))


def ask(
    unet: UNet2DConditionModel, taps: Taps, noisy: Tensor, timesteps: Tensor, prompt_embeds: Tensor
) -> dict[str, Tensor]:
    """A U-Net's output and its taps, by name."""
    like = {"device": unet.device, "dtype": unet.dtype}
    with taps.recording() as features:
        prediction = unet(
            noisy.to(**like), timesteps.to(unet.device), encoder_hidden_states=prompt_embeds.to(**like)
        ).sample
    return {OUTPUT: prediction, **features}


def squares(teacher: dict[str, Tensor], student: dict[str, Tensor], pairs: Pairs) -> np.ndarray:
    """(1 + pairs, 2) float64: mean square of the error and of the teacher, summed over the batch; the output first."""
    return np.array(
        [
            (mean_square(student[mine].float() - teacher[its].float()), mean_square(teacher[its].float()))
            for mine, its in ((OUTPUT, OUTPUT), *pairs)
        ]
    )


def mean_square(values: Tensor) -> float:
    """The mean square of each entry of (B, C, H, W), summed over the batch."""
    return values.square().flatten(1).mean(dim=1).double().sum().item()


def errors(total: np.ndarray, pairs: Pairs) -> dict[str, Any]:
    """Named errors of the rows of `squares`."""
    named = [{"mse": float(error), "relative": float(error / power)} for error, power in total]
    return {OUTPUT: named[0], "taps": {mine: error for (mine, _), error in zip(pairs, named[1:], strict=True)}}

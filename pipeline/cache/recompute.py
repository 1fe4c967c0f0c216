"""The teacher asked again: what it says now of stored entries, against what is stored and what the codec promises."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from pipeline.core.diffusion import add_noise
from pipeline.core.taps import Taps, sample_tokens
from shards.codec import dequantise
from shards.reader import StoredEntry, StoredTensor
from shards.schema import LATENTS, PROMPT_EMBEDS, TEACHER_PRED, added_noise, tap_member

# Two runs of one network differ by rounding, with the batch and the device: up to this share of a tensor's peak.
# In fp32 that leaves room for the TF32 that GPUs convolve in.
ARITHMETIC = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2}


@dataclass(frozen=True)
class Deviation:
    """How far a stored tensor is from what the teacher says now, over some entries.

    `largest` and `mean` are absolute errors. Where the error comes nearest to what is allowed, `promise` is
    the codec's bound, `bound` that with the allowance for rounding, and `share` the error as a share of
    `bound`: above 1 it is broken.
    """

    name: str
    largest: float
    mean: float
    promise: float
    bound: float
    share: float


def deviations(
    samples: Iterable[StoredEntry], spec: dict[str, Any], unet: UNet2DConditionModel, alphas_cumprod: Tensor
) -> list[Deviation]:
    """One for teacher_pred and one for each tap. `alphas_cumprod` (T,) float32, on the U-Net's device."""
    taps = Taps(unet, spec["taps"])
    found: dict[str, list[Deviation]] = {}
    for sample in samples:
        for name, now in recompute_entry(sample, spec, unet, taps, alphas_cumprod).items():
            found.setdefault(name, []).append(deviation(name, sample, now, ARITHMETIC[spec["dtype"]]))
    taps.remove()
    return [_worst(each) for each in found.values()]


@torch.inference_mode()
def recompute_entry(
    sample: StoredEntry, spec: dict[str, Any], unet: UNet2DConditionModel, taps: Taps, alphas_cumprod: Tensor
) -> dict[str, np.ndarray]:
    """What the teacher says of one entry, (C, H, W) float32 by tensor name: taps at the positions that were kept."""
    latents, noise, prompt_embeds = (
        torch.tensor(sample.tensors[name].values, device=unet.device)[None]
        for name in (LATENTS, added_noise(spec), PROMPT_EMBEDS)
    )
    timesteps = torch.tensor([sample.meta["timestep"]], device=unet.device)
    noisy = add_noise(latents, noise, timesteps, alphas_cumprod)
    with taps.recording() as features:
        prediction = unet(noisy.to(unet.dtype), timesteps, encoder_hidden_states=prompt_embeds.to(unet.dtype)).sample
    now = {TEACHER_PRED: prediction}
    for tap, tap_spec in spec["taps"].items():
        record = sample.meta["taps"][tap]
        now[tap_member(tap)] = sample_tokens(features[tap], [record["row"]], [record["column"]], tap_spec["stride"])
    return {name: tensor[0].float().cpu().numpy() for name, tensor in now.items()}


def deviation(name: str, sample: StoredEntry, now: np.ndarray, arithmetic: float) -> Deviation:
    """A stored tensor against what the teacher says `now`: the codec's bound, and an allowance for its arithmetic."""
    stored, promise = decoded(name, sample, sample.tensors[name])
    error = np.abs(stored - now)
    bound = promise + arithmetic * np.abs(now).max() + np.finfo(np.float32).tiny
    shares = np.nan_to_num(error / bound, nan=np.inf)
    nearest = np.unravel_index(shares.argmax(), shares.shape)
    limits = float(promise[nearest]), float(bound[nearest])
    return Deviation(name, float(error.max()), float(error.mean()), *limits, float(shares[nearest]))


def decoded(name: str, sample: StoredEntry, tensor: StoredTensor) -> tuple[np.ndarray, np.ndarray]:
    """The stored values, float32, and how far each may be from what was encoded.

    That is half a step of the quantiser, or half the distance to the next number of the exact type.
    """
    if tensor.mu is None:
        spacing = np.spacing(np.abs(tensor.values)).astype(np.float32)
        return tensor.values.astype(np.float32), spacing / 2
    record = sample.meta["taps"][name.removeprefix(tap_member(""))]
    values = dequantise(tensor.values, tensor.mu, record["step"], record["dither"])
    return values, np.full(values.shape, record["step"] / 2, np.float32)


def _worst(each: list[Deviation]) -> Deviation:
    nearest = max(each, key=lambda d: d.share)
    mean = sum(d.mean for d in each) / len(each)
    return replace(nearest, largest=max(d.largest for d in each), mean=mean)


HEAD = ("tensor", "largest error", "mean error", "codec allows", "with rounding", "error of that")


def table(rows: list[Deviation]) -> list[str]:
    """Lines of a table, one tensor a line."""
    cells = [
        (
            r.name,
            f"{r.largest:.3g}",
            f"{r.mean:.3g}",
            f"{r.promise:.3g}",
            f"{r.bound:.3g}",
            f"{r.share:.1%}{'' if r.share <= 1 else ' BROKEN'}",
        )
        for r in rows
    ]
    widths = [max(map(len, column)) for column in zip(HEAD, *cells, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in (HEAD, *cells)
    ]

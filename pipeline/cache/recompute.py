"""Running the teacher again on stored entries: its output against the stored values and what the codec promises."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from pipeline.core.diffusion import add_noise
from pipeline.core.taps import Taps, sample_tokens
from pipeline.models.families import denoise, family_of_spec
from shards.buckets import of_bucket
from shards.calibration import Calibration
from shards.codec import dequantise
from shards.dataset import stack_tensors
from shards.manifest import Manifest
from shards.reader import StoredEntry, StoredTensor
from shards.rotated_codec import dequantise_rotated, rotated
from shards.schema import LATENTS, TEACHER_PRED, added_noise, conditioning_shapes, image_of, tap_member

# Two runs of one network differ by rounding, with the batch and the device: by up to this share of a tensor's peak.
# For fp32 that leaves room for the TF32 in which GPUs compute convolutions.
ARITHMETIC = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2}


@dataclass(frozen=True)
class Deviation:
    """How far a stored tensor is from the teacher's output, over some entries.

    `largest` and `mean` are absolute errors. `share` is the largest error in relation to what is allowed there: the
    codec's bound and an allowance for rounding. Above 1, more than that was changed.
    """

    name: str
    largest: float
    mean: float
    share: float


def deviations(
    entries: Iterable[StoredEntry],
    manifest: Manifest,
    calibrations: Mapping[str, Calibration],
    unet: UNet2DConditionModel,
    alphas_cumprod: Tensor,
) -> list[Deviation]:
    """One for teacher_pred and one per tap; of one that is rotated, after the rotation, where the bounds hold.

    `alphas_cumprod` (T,) float32, on the U-Net's device.
    """
    taps = Taps(unet, manifest.spec["taps"])
    found: dict[str, list[Deviation]] = {}
    for entry in entries:
        for name, output in recompute_entry(entry, manifest, unet, taps, alphas_cumprod).items():
            calibration = calibrations.get(name.removeprefix(tap_member("")))
            allowed = ARITHMETIC[manifest.spec["dtype"]] * float(np.abs(output).max())
            output = output if calibration is None else rotated(output, calibration)
            found.setdefault(name, []).append(deviation(name, entry, output, allowed))
    taps.remove()
    return [_worst(of_tensor) for of_tensor in found.values()]


@torch.inference_mode()
def recompute_entry(
    entry: StoredEntry, manifest: Manifest, unet: UNet2DConditionModel, taps: Taps, alphas_cumprod: Tensor
) -> dict[str, np.ndarray]:
    """The teacher's output for one entry, (C, H, W) float32 by tensor name; taps at the positions that were kept."""
    spec = of_bucket(manifest.spec, manifest.bucket_of(image_of(entry.key)))
    conditioning = list(conditioning_shapes(spec))
    inputs = stack_tensors([entry], [LATENTS, added_noise(spec), *conditioning])
    latents, noise = inputs[LATENTS].to(unet.device), inputs[added_noise(spec)].to(unet.device)
    timesteps = torch.tensor([entry.meta["timestep"]], device=unet.device)
    noisy = add_noise(latents, noise, timesteps, alphas_cumprod)
    with taps.recording(noisy) as features:
        family = family_of_spec(spec)
        prediction = denoise(unet, noisy, timesteps, {name: inputs[name] for name in conditioning}, family)
    outputs = {TEACHER_PRED: prediction}
    for tap, tap_spec in spec["taps"].items():
        record = entry.meta["taps"][tap]
        kept = sample_tokens(features[tap], [record["row"]], [record["column"]], tap_spec["stride"])
        outputs[tap_member(tap)] = kept
    return {name: tensor[0].float().cpu().numpy() for name, tensor in outputs.items()}


def deviation(name: str, entry: StoredEntry, output: np.ndarray, allowed: float) -> Deviation:
    """A stored tensor against the teacher's `output`, within the codec's bound and what is `allowed` for arithmetic."""
    stored, promise = decode_with_bound(name, entry, entry.tensors[name])
    error = np.abs(stored - output)
    bound = promise + allowed + np.finfo(np.float32).tiny
    shares = np.nan_to_num(error / bound, nan=np.inf)
    return Deviation(name, float(error.max()), float(error.mean()), float(shares.max()))


def decode_with_bound(name: str, entry: StoredEntry, tensor: StoredTensor) -> tuple[np.ndarray, np.ndarray]:
    """The stored values, float32, and how far each may be from the value that was encoded.

    That is half a quantiser step, or half the distance to the next number of the exact dtype.
    """
    if tensor.values.dtype.kind == "f":
        spacing = np.spacing(np.abs(tensor.values)).astype(np.float32)
        return tensor.values.astype(np.float32), spacing / 2
    record = entry.meta["taps"][name.removeprefix(tap_member(""))]
    step, offset = record["step"], record["dither"]
    if tensor.mu is None:
        values = dequantise_rotated(tensor.values, step, offset)
    else:
        values = dequantise(tensor.values, tensor.mu, step, offset)
    return values, np.full(values.shape, record["step"] / 2, np.float32)


def _worst(of_tensor: list[Deviation]) -> Deviation:
    return Deviation(
        of_tensor[0].name,
        largest=max(deviation.largest for deviation in of_tensor),
        mean=sum(deviation.mean for deviation in of_tensor) / len(of_tensor),
        share=max(deviation.share for deviation in of_tensor),
    )


HEAD = ("tensor", "mean error", "largest error", "of its limit")
LEGEND = (
    "The errors are between the stored values and what the teacher gives now.",
    "Each value has a limit: what the codec may change, and what two machines may differ by. The last column is the",
    "error that comes closest to its limit, as a share of it. Up to 100 % the tensor is as it should be.",
)


def table(rows: list[Deviation]) -> list[str]:
    """The lines of a table, one tensor per line, and what its columns mean."""
    cells = [
        (row.name, f"{row.mean:.3g}", f"{row.largest:.3g}", f"{row.share:.0%}{'' if row.share <= 1 else ' TOO LARGE'}")
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(HEAD, *cells, strict=True)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in (HEAD, *cells)
    ]
    return [*lines, *LEGEND]

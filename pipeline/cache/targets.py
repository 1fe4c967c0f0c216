"""The teacher's targets for a batch of images, as entries of a cache.

latents, conditioning -> noise, timestep -> teacher U-Net -> teacher_pred, taps -> entries.
Latents and noise are rounded as they are stored before the teacher runs, so a student starts from the same noisy
latents. (A teacher in half precision then rounds its input once more.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from pipeline.core import draws
from pipeline.core.diffusion import add_noise
from pipeline.core.taps import Taps, sample_tokens
from pipeline.models.families import Family, denoise
from pipeline.system.errors import UserError
from shards import device_codec
from shards.codec import EXACT_DTYPES, decode_npy
from shards.expected import offsets
from shards.packing import pack
from shards.reader import StoredEntry
from shards.schema import (
    INPUT_NOISE,
    LATENTS,
    NOISE,
    TEACHER_PRED,
    added_noise,
    conditioning_shapes,
    entry_key,
    tap_member,
)
from shards.writer import EntryBuilder


@dataclass(frozen=True)
class Teacher:
    """What a forward pass needs.

    `alphas_cumprod` (T,) float32. `unconditional` holds, without B and in fp16, the conditioning tensors that an empty
    prompt changes; `calibrations` the mu (C,) and rotation (C, C) of each tap that is quantised, on the U-Net's device.
    """

    unet: UNet2DConditionModel
    family: Family
    taps: Taps
    alphas_cumprod: Tensor
    unconditional: Mapping[str, np.ndarray]
    calibrations: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Image:
    """An image as `encode` stored it, and the `image_crc32` of its row."""

    entry: StoredEntry
    crc32: int


@dataclass(frozen=True)
class BatchTargets:
    """The entries of a batch, and the quantised taps that still have to be compressed into them.

    `quantised` holds (entry, tensor name, q (C, H, W) integers).
    """

    entries: list[EntryBuilder]
    quantised: list[tuple[EntryBuilder, str, np.ndarray]]


@torch.inference_mode()
def run_teacher(images: list[Image], round_index: int, spec: dict[str, Any], teacher: Teacher) -> BatchTargets:
    """One forward pass of the teacher: B images at one timestep each."""
    entries, prediction, features = ask_teacher(images, round_index, spec, teacher)
    exact = EXACT_DTYPES.get(spec["codec"]["name"], np.dtype(np.float16))
    add_exact(entries, TEACHER_PRED, prediction, exact)
    targets = BatchTargets(entries, [])
    for tap in spec["taps"]:
        add_feature(targets, tap, features[tap], spec, teacher)
    return targets


def ask_teacher(
    images: list[Image], round_index: int, spec: dict[str, Any], teacher: Teacher
) -> tuple[list[EntryBuilder], Tensor, dict[str, Tensor]]:
    """Entries without targets, the teacher's prediction, and of each tap (B, C, h, w) the positions that are kept."""
    entries = [new_entry(image, round_index, spec, teacher) for image in images]
    added = torch.from_numpy(np.stack([decode_npy(entry.members[f"{added_noise(spec)}.npy"]) for entry in entries]))
    latents = torch.from_numpy(np.stack([image.entry.tensors[LATENTS].values for image in images]))
    conditioning = {
        name: torch.from_numpy(np.stack([given(name, *pair, teacher) for pair in zip(images, entries, strict=True)]))
        for name in conditioning_shapes(spec)
    }
    device = teacher.unet.device
    timesteps = torch.tensor([entry.meta["timestep"] for entry in entries], device=device)
    noisy = add_noise(latents.to(device), added.to(device), timesteps, teacher.alphas_cumprod)
    with teacher.taps.recording(noisy) as features:
        prediction = denoise(teacher.unet, noisy, timesteps, conditioning, teacher.family)
    return entries, prediction, {tap: kept_positions(entries, tap, features[tap], spec) for tap in spec["taps"]}


def new_entry(image: Image, round_index: int, spec: dict[str, Any], teacher: Teacher) -> EntryBuilder:
    """An entry before the teacher has run: its random draws."""
    seed, source_id = spec["seed"], image.entry.meta["source_id"]
    shape, train_timesteps = image.entry.tensors[LATENTS].values.shape, len(teacher.alphas_cumprod)
    meta = {
        "round": round_index,
        "timestep": draws.timestep(seed, source_id, round_index, spec["strata"], train_timesteps),
        "unconditional": draws.is_unconditional(seed, source_id, round_index, spec["uncond_fraction"]),
        "taps": {},
    }
    entry = EntryBuilder(entry_key(image.entry.key, round_index), meta, source_id, image.crc32)
    noise = draws.noise(seed, source_id, round_index, shape, spec["noise_offset"])
    entry.add_array(NOISE, noise.astype(np.float16))
    if spec["input_perturbation"]:
        added = draws.perturbed(seed, source_id, round_index, noise, spec["input_perturbation"])
        entry.add_array(INPUT_NOISE, added.astype(np.float16))
    return entry


def given(name: str, image: Image, entry: EntryBuilder, teacher: Teacher) -> np.ndarray:
    """A conditioning tensor of an entry: the image's own, or that of the empty prompt."""
    replaced = teacher.unconditional if entry.meta["unconditional"] else {}
    return replaced.get(name, image.entry.tensors[name].values)


def add_exact(entries: list[EntryBuilder], name: str, values: Tensor, dtype: np.dtype) -> None:
    """Add (B, ...) `values` to the entries, unquantised."""
    check_finite(entries, name, values)
    with np.errstate(over="ignore"):
        stored = values.float().cpu().numpy().astype(dtype)
    for entry, array in zip(entries, stored, strict=True):
        if not np.isfinite(array).all():
            codecs = "fp32" if name == TEACHER_PRED else "dither or fp32"
            raise UserError(f"{name} of entry {entry.key} does not fit in fp16. Run with --codec {codecs}.")
        entry.add_array(name, array)


def draw_keys(entries: list[EntryBuilder], tap: str, spec: dict[str, Any]) -> list[tuple[int, str, int, str]]:
    """What an entry's draws for a tap depend on."""
    return [(spec["seed"], entry.source_id, entry.meta["round"], tap) for entry in entries]


def kept_positions(entries: list[EntryBuilder], tap: str, features: Tensor, spec: dict[str, Any]) -> Tensor:
    """The positions of (B, C, H, W) `features` that are kept, and where they lie in the entries' records."""
    stride = spec["taps"][tap]["stride"]
    bounds = [offsets(side, stride) for side in features.shape[2:]]
    places = [draws.token_offset(*key, *bounds) for key in draw_keys(entries, tap, spec)]
    for entry, (row, column) in zip(entries, places, strict=True):
        entry.meta["taps"][tap] = {"row": row, "column": column}
    rows, columns = zip(*places, strict=True)
    kept = sample_tokens(features, rows, columns, stride)
    check_finite(entries, tap_member(tap), kept)
    return kept


def add_feature(targets: BatchTargets, tap: str, kept: Tensor, spec: dict[str, Any], teacher: Teacher) -> None:
    """Quantise the `kept` positions (B, C, h, w), and add them to the entries with what decoding needs."""
    entries = targets.entries
    if spec["codec"]["name"] in EXACT_DTYPES:
        add_exact(entries, tap_member(tap), kept, EXACT_DTYPES[spec["codec"]["name"]])
        return
    dithers = [draws.dither_offset(*key) for key in draw_keys(entries, tap, spec)]
    calibration = teacher.calibrations[tap]
    quantised, quant_step = device_codec.quantise_rotated(kept, *calibration, spec["codec"]["snr_db"], dithers)
    q = quantised.cpu().numpy()
    for i, (entry, step, offset) in enumerate(zip(entries, quant_step.tolist(), dithers, strict=True)):
        entry.meta["taps"][tap] |= {"step": step, "dither": offset}
        targets.quantised.append((entry, tap_member(tap), q[i]))


def check_finite(entries: list[EntryBuilder], name: str, values: Tensor) -> None:
    finite = torch.isfinite(values).flatten(1).all(dim=1).tolist()
    if not all(finite):
        entry = entries[finite.index(False)]
        raise UserError(
            f"the teacher computed NaN or Inf in {name} of entry {entry.key} ({entry.source_id}, "
            f"timestep {entry.meta['timestep']}). Run with --dtype fp32 or bf16, or check the teacher's weights."
        )


def compress_targets(targets: BatchTargets) -> list[EntryBuilder]:
    """The finished entries of a batch. This is work for the CPU alone."""
    for entry, name, q in targets.quantised:
        entry.add_compressed(name, *pack(q))
    return targets.entries

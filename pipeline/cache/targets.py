"""What the teacher says of a batch of pictures, as entries of a cache.

latents, prompt_embeds -> noise, timestep -> teacher U-Net -> teacher_pred, taps -> entries.
What is stored rounded is rounded before the teacher runs, so a student sees exactly what the teacher saw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from pipeline.core import draws
from pipeline.core.diffusion import add_noise
from pipeline.core.taps import Taps, sample_tokens
from pipeline.system.errors import UserError
from shards import device_codec
from shards.codec import EXACT_DTYPES, decode_npy, pack_quantised
from shards.reader import StoredEntry
from shards.schema import INPUT_NOISE, LATENTS, NOISE, PROMPT_EMBEDS, TEACHER_PRED, added_noise, entry_key, tap_member
from shards.writer import EntryBuilder


@dataclass(frozen=True)
class Teacher:
    """What one forward pass needs. `alphas_cumprod` (T,) float32; `empty_prompt` (L, D) fp16."""

    unet: UNet2DConditionModel
    taps: Taps
    alphas_cumprod: Tensor
    empty_prompt: np.ndarray


@dataclass(frozen=True)
class BatchTargets:
    """What the teacher said of a batch: its entries, and what is still to be compressed into them.

    `quantised` holds (entry, tensor name, q (C, H, W) integers, mu (C,) float32).
    """

    entries: list[EntryBuilder]
    quantised: list[tuple[EntryBuilder, str, np.ndarray, np.ndarray]]


@torch.inference_mode()
def run_teacher(samples: list[StoredEntry], round_index: int, spec: dict[str, Any], teacher: Teacher) -> BatchTargets:
    """One forward pass of the teacher: B images at one timestep each."""
    entries = [new_entry(sample, round_index, spec, teacher) for sample in samples]
    added = added_noise(spec)
    inputs = {
        name: torch.from_numpy(np.stack([decode_npy(entry.members[f"{name}.npy"]) for entry in entries]))
        for name in (LATENTS, added, PROMPT_EMBEDS)
    }
    device, dtype = teacher.unet.device, teacher.unet.dtype
    timesteps = torch.tensor([entry.meta["timestep"] for entry in entries], device=device)
    noisy = add_noise(inputs[LATENTS].to(device), inputs[added].to(device), timesteps, teacher.alphas_cumprod)
    with teacher.taps.recording() as features:
        prediction = teacher.unet(
            noisy.to(dtype), timesteps, encoder_hidden_states=inputs[PROMPT_EMBEDS].to(device, dtype)
        ).sample

    exact = EXACT_DTYPES.get(spec["codec"]["name"], np.dtype(np.float16))
    add_exact(entries, TEACHER_PRED, prediction, exact)
    answer = BatchTargets(entries, [])
    for tap, tap_spec in spec["taps"].items():
        add_feature(answer, tap, features[tap], tap_spec["stride"], spec)
    return answer


def new_entry(sample: StoredEntry, round_index: int, spec: dict[str, Any], teacher: Teacher) -> EntryBuilder:
    """What an entry holds before the teacher has seen it: its draws, its latents and its prompt."""
    seed, source_id = spec["seed"], sample.meta["source_id"]
    latents = sample.tensors[LATENTS].values
    unconditional = draws.is_unconditional(seed, source_id, round_index, spec["uncond_fraction"])
    train_timesteps = len(teacher.alphas_cumprod)
    meta = {
        **sample.meta,
        "round": round_index,
        "timestep": draws.timestep(seed, source_id, round_index, spec["strata"], train_timesteps),
        "unconditional": unconditional,
        "taps": {},
    }
    entry = EntryBuilder(entry_key(sample.key, round_index), meta)
    entry.add_array(LATENTS, latents)
    noise = draws.noise(seed, source_id, round_index, latents.shape, spec["noise_offset"])
    entry.add_array(NOISE, noise.astype(np.float16))
    if spec["input_perturbation"]:
        added = draws.perturbed(seed, source_id, round_index, noise, spec["input_perturbation"])
        entry.add_array(INPUT_NOISE, added.astype(np.float16))
    entry.add_array(PROMPT_EMBEDS, teacher.empty_prompt if unconditional else sample.tensors[PROMPT_EMBEDS].values)
    return entry


def add_exact(entries: list[EntryBuilder], name: str, values: Tensor, dtype: np.dtype) -> None:
    """Add (B, ...) `values` to the entries, unquantised."""
    check_finite(entries, name, values)
    with np.errstate(over="ignore"):
        stored = values.float().cpu().numpy().astype(dtype)
    for entry, array in zip(entries, stored, strict=True):
        if not np.isfinite(array).all():
            codecs = "fp32" if name == TEACHER_PRED else "dither or fp32"
            raise UserError(f"{name} of entry {entry.key} does not fit fp16: run with --codec {codecs}")
        entry.add_array(name, array)


def add_feature(answer: BatchTargets, tap: str, features: Tensor, stride: int, spec: dict[str, Any]) -> None:
    """Sample (B, C, H, W) `features`, quantise them, and add them with what decoding needs to the entries."""
    entries = answer.entries
    draw = [(spec["seed"], entry.meta["source_id"], entry.meta["round"], tap) for entry in entries]
    rows, columns = zip(*(draws.token_offset(*d, stride) for d in draw), strict=True)
    kept = sample_tokens(features, rows, columns, stride)
    records: list[dict[str, Any]] = [{"row": r, "column": c} for r, c in zip(rows, columns, strict=True)]
    if spec["codec"]["name"] in EXACT_DTYPES:
        add_exact(entries, tap_member(tap), kept, EXACT_DTYPES[spec["codec"]["name"]])
    else:
        check_finite(entries, tap_member(tap), kept)
        offsets = [draws.dither_offset(*d) for d in draw]
        q, mu, step = device_codec.quantise(kept, spec["codec"]["snr_db"], offsets)
        q, mu = q.cpu().numpy(), mu.cpu().numpy()
        for i, (entry, record, s, offset) in enumerate(zip(entries, records, step.tolist(), offsets, strict=True)):
            record.update(step=s, dither=offset)
            answer.quantised.append((entry, tap_member(tap), q[i], mu[i]))
    for entry, record in zip(entries, records, strict=True):
        entry.meta["taps"][tap] = record


def check_finite(entries: list[EntryBuilder], name: str, values: Tensor) -> None:
    fine = torch.isfinite(values).flatten(1).all(dim=1).tolist()
    if not all(fine):
        entry = entries[fine.index(False)]
        raise UserError(
            f"the teacher gave NaN or Inf in {name} of entry {entry.key} ({entry.meta['source_id']}, "
            f"timestep {entry.meta['timestep']}): run with --dtype fp32 or bf16, or check the teacher's weights"
        )


def compress_targets(answer: BatchTargets) -> list[EntryBuilder]:
    """The entries of a batch with what was still to be compressed: work for the CPU alone."""
    for entry, name, q, mu in answer.quantised:
        entry.add_compressed(name, *pack_quantised(q, mu))
    return answer.entries

"""A short trial of the teacher on this machine, so that a plan can say how long the rounds will take."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from pipeline.models import TeacherShapes, computes_beside
from pipeline.taps import Taps, sample_tokens, token_stride
from shards import device_codec
from shards.codec import EXACT_DTYPES, encode_npy, pack_quantised

SECONDS, BATCHES = 10.0, 3


@dataclass(frozen=True)
class Trial:
    """Seconds an entry: on the device (forward pass, taps, quantising), and on the CPU (compressing)."""

    device: float
    compressing: float
    beside: bool

    def seconds(self, entries: int) -> float:
        """How long so many entries take: where the device leaves the CPU free, the slower of the two decides."""
        each = max(self.device, self.compressing) if self.beside else self.device + self.compressing
        return entries * each


@torch.inference_mode()
def try_teacher(
    unet: UNet2DConditionModel, shapes: TeacherShapes, batch_size: int, codec: str, snr_db: float, stride: int,
    token_min: int,
) -> Trial:  # fmt: skip
    """Run the teacher on random latents: after one batch to warm up, at least BATCHES and SECONDS of them."""
    device, dtype = unet.device, unet.dtype
    draw = torch.Generator().manual_seed(0)
    noisy = torch.randn(batch_size, *shapes.latents, generator=draw).to(device, dtype)
    prompt_embeds = torch.randn(batch_size, *shapes.prompt_embeds, generator=draw).to(device, dtype)
    timesteps = torch.full((batch_size,), 500, device=device)
    strides = {name: token_stride(*shape[1:], stride, token_min) for name, shape in shapes.taps.items()}
    exact = EXACT_DTYPES.get(codec)
    nowhere = [0] * batch_size
    taps = Taps(unet, shapes.taps)
    on_device, compressing, batches = 0.0, 0.0, -1
    while batches < BATCHES or on_device + compressing < SECONDS:
        started = time.perf_counter()
        with taps.recording() as features:
            unet(noisy, timesteps, encoder_hidden_states=prompt_embeds)
        kept = [sample_tokens(features[name], nowhere, nowhere, strides[name]) for name in shapes.taps]
        stored = kept if exact else [t for x in kept for t in device_codec.quantise(x, snr_db, nowhere)[:2]]
        arrays = [tensor.float().cpu().numpy() if exact else tensor.cpu().numpy() for tensor in stored]
        computed = time.perf_counter()
        if exact:
            encode_exact(arrays, exact)
        else:
            encode_quantised(arrays)
        batches += 1
        if batches:
            on_device += computed - started
            compressing += time.perf_counter() - computed
    taps.remove()
    entries = batches * batch_size
    return Trial(on_device / entries, compressing / entries, computes_beside(device))


def encode_exact(arrays: list[np.ndarray], dtype: np.dtype) -> None:
    for array in arrays:
        for values in array.astype(dtype):
            encode_npy(values)


def encode_quantised(arrays: list[np.ndarray]) -> None:
    """`arrays` are q (B, C, H, W) and mu (B, C) of each tap, in turn."""
    for q, mu in zip(arrays[::2], arrays[1::2], strict=True):
        for i in range(len(q)):
            pack_quantised(q[i], mu[i])

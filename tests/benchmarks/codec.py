"""The feature codec: bits, distance to the rate-distortion bound, speed, and what it does to a student's gradient.

Two kinds of features: Gaussian ones, of an SD-1.x tap's shape, and the demo teacher's taps on scenes. For each codec:

    bits          of a value as stored, mu included
    over bound    bits above 1/2 log2(signal / error): what a Gaussian source needs at that error
    MB/s          of fp32 features in, quantised and packed with zstd; and back; numpy, one core
    gradient      norm of the change of the student's gradient, as a share of its norm, from exact targets

Run it on a quiet machine:

    OMP_NUM_THREADS=1 python tests/benchmarks/codec.py --work work/codec
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import click
import diffusers
import numpy as np
import torch
import zstandard
from diffusers import UNet2DConditionModel

from pipeline.core.diffusion import add_noise, target
from pipeline.core.losses import distillation_losses, total_loss
from pipeline.core.taps import Taps, sample_tokens
from pipeline.models.levels import LEVELS
from shards.codec import decode_npy, dequantise, encode_npy, pack_quantised, quantise, unpack_quantised
from shards.dataset import Batch, CacheDataset
from shards.store import open_store

DECIBELS = (30.0, 20.0, 15.0, 10.0, 5.0, 0.0)
STRIDES = (1, 2, 4)
PAIRS = LEVELS["sd_small"].taps
ENTRIES = 64
OUTPUT_WEIGHT, FEATURE_WEIGHT = 0.5, 0.5

Codec = tuple[Callable[[np.ndarray], bytes], Callable[[bytes], np.ndarray]]


def exact(dtype: type) -> Codec:
    return lambda x: encode_npy(x.astype(dtype)), lambda data: decode_npy(data).astype(np.float32)


def dithered(snr_db: float, offset: int = 4711) -> Codec:
    """What a shard keeps beside the member, the step and the uncompressed size, travels as a header of 12 bytes."""

    def encode(x: np.ndarray) -> bytes:
        q, mu, step = quantise(x, snr_db, offset)
        data, raw_bytes = pack_quantised(q, mu)
        return np.float32(step).tobytes() + raw_bytes.to_bytes(8, "little") + data

    def decode(data: bytes) -> np.ndarray:
        step = np.frombuffer(data[:4], np.float32)[0]
        q, mu = unpack_quantised(data[12:], int.from_bytes(data[4:12], "little"))
        return dequantise(q, mu, step, offset)

    return encode, decode


CODECS: dict[str, Codec] = {
    "fp32": exact(np.float32),
    "fp16": exact(np.float16),
    **{f"dither {snr_db:g} dB": dithered(snr_db) for snr_db in DECIBELS},
}


def measure(codec: Codec, features: list[np.ndarray]) -> dict[str, float]:
    """Over a list of (C, H, W) float32 features: bits a value, signal-to-noise in dB, MB/s both ways."""
    encode, decode = codec
    started = time.perf_counter()
    stored = [encode(x) for x in features]
    encoded = time.perf_counter()
    back = [decode(data) for data in stored]
    decoded = time.perf_counter()
    values, megabytes = sum(x.size for x in features), sum(x.nbytes for x in features) / 1e6
    # Taps differ in scale, so each counts by its own power.
    ratios = [error_ratio(x, y) for x, y in zip(features, back, strict=True)]
    return {
        "bits": 8 * sum(map(len, stored)) / values,
        "snr": -10 * math.log10(max(np.mean(ratios), 1e-300)),
        "encode": megabytes / (encoded - started),
        "decode": megabytes / (decoded - encoded),
    }


def error_ratio(x: np.ndarray, y: np.ndarray) -> float:
    """Mean square error as a share of the variance about each channel's mean."""
    centred = x.astype(np.float64) - x.mean(axis=(1, 2), keepdims=True, dtype=np.float64)
    return float(np.square(x.astype(np.float64) - y).mean() / np.square(centred).mean())


def rows(features: list[np.ndarray]) -> list[str]:
    lines = [
        "| codec | bits | ratio to fp16 | signal to noise, dB | over bound, bits | encode, MB/s | decode, MB/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, codec in CODECS.items():
        measure(codec, features[:1])
        m = measure(codec, features)
        bound = m["snr"] / 20 / math.log10(2)
        over = f"{m['bits'] - bound:.2f}" if name.startswith("dither") else ""
        snr = f"{m['snr']:.1f}" if m["snr"] < 300 else "exact"
        cells = [f"{m['bits']:.2f}", f"{16 / m['bits']:.1f}", snr, over, f"{m['encode']:.0f}", f"{m['decode']:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def exact_cache(work: Path) -> Path:
    """A cache of the demo teacher's taps as they are, one timestep of each of ENTRIES scenes."""
    variables = {"WORK": work, "SCENES": ENTRIES, "ROUNDS": 1, "SAMPLES": 0, "CODEC": "fp32", "STRIDE": 1}
    subprocess.run(["make", "teacher-cache", *(f"{k}={v}" for k, v in variables.items())], check=True)
    return work / "cache"


def gradient(
    student: UNet2DConditionModel, batch: Batch, alphas: torch.Tensor, features: dict[str, torch.Tensor], stride: int
) -> torch.Tensor:
    """The gradient of the distillation loss, all parameters in one vector, when the taps hold `features`."""
    draw = np.random.default_rng(5)
    count = len(batch.keys)
    noisy = add_noise(batch.latents, batch.noise, batch.timesteps, alphas)
    taps = Taps(student, [name for name, _ in PAIRS])
    with taps.recording() as own:
        predicted = student(
            noisy, batch.timesteps, encoder_hidden_states=batch.conditioning["prompt_embeds"].float()
        ).sample
    taps.remove()
    sampled, wanted = {}, {}
    for student_tap, teacher_tap in PAIRS:
        # Small maps are kept whole, as the default `--token-min` of the demo does.
        s = stride if own[student_tap].shape[2] >= 16 else 1
        place = draw.integers(0, s, (2, count)).tolist()
        sampled[student_tap] = sample_tokens(own[student_tap], *place, s)
        wanted[teacher_tap] = sample_tokens(features[teacher_tap], *place, s)
    aim = target(batch.latents, batch.noise, batch.timesteps, alphas, "epsilon")
    terms = distillation_losses(predicted, aim, batch.teacher_pred, sampled, wanted, PAIRS)
    student.zero_grad()
    total_loss(terms, OUTPUT_WEIGHT, FEATURE_WEIGHT).backward()
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def through(codec: Codec, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    encode, decode = codec
    return {
        name: torch.from_numpy(np.stack([decode(encode(entry)) for entry in values.numpy()]))
        for name, values in features.items()
    }


def gradient_rows(student: UNet2DConditionModel, batch: Batch, alphas: torch.Tensor) -> list[str]:
    plain = {name: feature.decode() for name, feature in batch.features.items()}
    reference = gradient(student, batch, alphas, plain, 1)
    lines = ["| codec | " + " | ".join(f"stride {s}" for s in STRIDES) + " |", "|---|" + "---|" * len(STRIDES)]
    for name, codec in CODECS.items():
        features = through(codec, plain)
        changed = [gradient(student, batch, alphas, features, s) - reference for s in STRIDES]
        changes = [change.norm() / reference.norm() for change in changed]
        lines.append(f"| {name} | " + " | ".join(f"{100 * change:.2f} %" for change in changes) + " |")
    return lines


@click.command()
@click.option("--work", type=Path, required=True, help="Directory for a small exact cache of the demo.")
def main(work: Path) -> None:
    dataset = CacheDataset(open_store(exact_cache(work)), [teacher for _, teacher in PAIRS])
    batch = dataset.collate([dataset[i] for i in range(len(dataset))])
    taps = [entry for feature in batch.features.values() for entry in feature.decode().numpy()[:8]]
    gaussian = list(np.random.default_rng(0).standard_normal((4, 320, 64, 64), np.float32))
    student = UNet2DConditionModel.from_pretrained(work / "cache" / "students" / "sd_small")
    noise_scheduler = diffusers.DDPMScheduler.from_config(dataset.shards.manifest.spec["noise_scheduler"])

    print(
        f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads; Python {platform.python_version()}, "
        f"numpy {np.__version__}, zstandard {zstandard.__version__}"
    )
    for title, features in (("Gaussian, 320 x 64 x 64", gaussian), ("Taps of the demo teacher", taps)):
        print(f"\n{title}:\n\n" + "\n".join(rows(features)))
    print(f"\nChange of the gradient of an untrained sd_small, a batch of {len(batch.keys)}:\n")
    print("\n".join(gradient_rows(student, batch, noise_scheduler.alphas_cumprod)))


if __name__ == "__main__":
    main()

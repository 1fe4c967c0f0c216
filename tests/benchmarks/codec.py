"""The feature codec step by step: bits, distance to the rate-distortion bound, speed, and a student's gradient.

    dither             the codec without a calibration: every entry stores its channels' means
    calibrated means   the means are the calibration's and are not stored, nor are the headers of arrays
    rotation           the channels are rotated into the calibration's principal directions
    packing            quiet channels are packed several values a byte before zstd

Features are Gaussian, of an SD-1.x tap's shape and of one's 64 sampled positions with channels of falling variance, and
the taps of teachers on the demo's scenes. They are calibrated on other entries than those which are coded. Of each
step:

    bits        of a value as stored
    over bound  bits above what Gaussian vectors of the calibrated covariance need at the requested error: reverse
                water-filling over the variances after rotation (Cover & Thomas, Elements of Information Theory,
                10.3.3), which is 1/2 log2(signal / error) where all channels are alike
    own dB      signal to noise about each entry's own means, whatever the codec takes for the signal
    MB/s        of fp32 features. encode: quantise and pack; decode: unpack and dequantise; unpack: alone, as a loader's
                worker does (all numpy, one core, processor time). step: dequantise in torch on --device, as a training
                step does. The fastest of three turns
    gradient    norm of the change of a student's gradient, as a share of its norm, from exact taps; root mean square
                of three draws of the dither

About the calibrated means the signal has more power than about an entry's own, so the same decibels are a larger error.
Hence the table at equal error: each entry's decibels are raised until its error is that of `dither`.

Run it on a quiet machine. A teacher is `demo` or a pipeline that `distill-sd demo-teacher` trained:

    OMP_NUM_THREADS=1 python tests/benchmarks/codec.py --work work/codec --teacher demo --teacher work/second
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import diffusers
import numpy as np
import torch
import zstandard
from diffusers import UNet2DConditionModel
from machine import machine
from torch import Tensor

from pipeline.core.diffusion import add_noise, target
from pipeline.core.losses import distillation_losses, total_loss
from pipeline.core.taps import Taps
from pipeline.models.levels import LEVELS
from shards import codec, device_codec, rotated_codec
from shards.calibration import Calibration, calibrate
from shards.dataset import Batch, CacheDataset
from shards.packing import Planes, pack, unpack
from shards.store import open_store

DITHER, MEANS, ROTATION, PACKING = STEPS = ("dither", "+ calibrated means", "+ rotation", "+ packing")
DECIBELS = (20.0, 10.0, 5.0, 0.0)
PREDICTION_DECIBELS = (30.0, 20.0)
PAIRS = LEVELS["sd_small"].taps
SCENES, CODED = 512, 64
"""Entries of a cache, and how many of them are coded; the others calibrate."""
MULTIPLES = (0.5, 1, 2, 4, 8, 16, 32)
"""Vectors to calibrate on, as multiples of the channels."""
FALLING = (np.arange(1, 641) ** -0.6).astype(np.float32)
"""Standard deviations of the channels."""
OUTPUT_WEIGHT, FEATURE_WEIGHT = 0.5, 0.5
KEEP_ALL = ("--tokens", "0")
TURNS, DRAWS = 3, 3
PERIOD = 12345701
"""Entry i of a tap takes its dither from a multiple of PERIOD on. With one offset for all, the errors of quiet values
would be equal in all entries, and would not average out in a batch."""


@dataclass(frozen=True)
class Source:
    """Of each tap: features to code and others to calibrate on, both (B, C, h, w) float32."""

    coded: dict[str, np.ndarray]
    others: dict[str, np.ndarray]


@dataclass(frozen=True)
class Stored:
    """A coded feature (C, h, w): the member, and what a shard keeps beside it."""

    data: bytes
    raw_bytes: int
    quant_step: float
    offset: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Quantised:
    """What a loader hands to the training step: q (C, h, w), and mu (C,) where it is the entry's own."""

    q: np.ndarray
    mu: np.ndarray | None
    quant_step: float
    offset: int


def encode(step: str, x: np.ndarray, known: Calibration, snr_db: float, offset: int) -> Stored:
    if step == DITHER:
        q, mu, quant_step = codec.quantise(x, snr_db, offset)
        return Stored(*codec.pack_quantised(q, mu), float(quant_step), offset, x.shape)
    if step == MEANS:
        q, quant_step = codec.quantise_centred(x - known.mu[:, None, None], snr_db, offset)
    else:
        q, quant_step = rotated_codec.quantise(x, known, snr_db, offset)
    if step == PACKING:
        return Stored(*pack(q), float(quant_step), offset, x.shape)
    width = codec.smallest_integer_dtype(int(q.min()), int(q.max())).itemsize
    raw = Planes(width).pack(q)
    return Stored(codec.compress([raw]), len(raw), float(quant_step), offset, x.shape)


def encode_all(
    step: str, values: np.ndarray, known: Calibration, snr_db: Sequence[float], draw: int = 0
) -> list[Stored]:
    """A tap of B entries, each at its own signal-to-noise ratio."""
    offsets = [PERIOD * (draw * len(values) + i) % codec.DITHER_TABLE_SIZE for i in range(len(values))]
    return [encode(step, *each) for each in zip(values, [known] * len(values), snr_db, offsets, strict=True)]


def unpacked(step: str, stored: Stored) -> Quantised:
    if step == DITHER:
        return Quantised(*codec.unpack_quantised(stored.data, stored.raw_bytes), stored.quant_step, stored.offset)
    if step == PACKING:
        return Quantised(unpack(stored.data, stored.raw_bytes, stored.shape), None, stored.quant_step, stored.offset)
    count = math.prod(stored.shape)
    q = Planes(stored.raw_bytes // count).unpack(codec.decompress(stored.data, stored.raw_bytes), count)
    return Quantised(q.reshape(stored.shape), None, stored.quant_step, stored.offset)


def dequantised(step: str, item: Quantised, known: Calibration) -> np.ndarray:
    if step in (DITHER, MEANS):
        mu = known.mu if item.mu is None else item.mu
        return codec.dequantise(item.q, mu, item.quant_step, item.offset)
    return rotated_codec.dequantise(item.q, known, item.quant_step, item.offset)


def dequantised_on_device(step: str, items: list[Quantised], known: Calibration, device: str) -> Tensor:
    """(B, C, h, w), from one tap of B entries on the host."""
    q = torch.from_numpy(np.stack([item.q for item in items])).to(device)
    quant_steps = torch.tensor([item.quant_step for item in items], device=device)
    mu = torch.from_numpy(known.mu).to(device)
    offsets = [item.offset for item in items]
    if step == DITHER:
        own = torch.from_numpy(np.stack([item.mu for item in items])).to(device)
        return device_codec.dequantise(q, own, quant_steps, offsets)
    if step == MEANS:
        return device_codec.dequantise(q, mu.expand(len(items), -1), quant_steps, offsets)
    return device_codec.dequantise_rotated(q, mu, torch.from_numpy(known.rotation).to(device), quant_steps, offsets)


def vectors(values: np.ndarray) -> np.ndarray:
    """(B, C, h, w) -> (B*h*w, C)."""
    return np.moveaxis(values, 1, -1).reshape(-1, values.shape[1])


def bound(variances: np.ndarray, snr_db: float) -> float:
    """Bits a value that independent Gaussians of these variances need for that mean square error, all together."""
    wanted = 10.0 ** (-snr_db / 10.0) * variances.mean()
    low, high = 0.0, float(variances.max())
    for _ in range(100):
        level = (low + high) / 2
        low, high = (level, high) if np.minimum(variances, level).mean() < wanted else (low, level)
    return float(0.5 * np.log2(np.maximum(variances / high, 1)).mean())


def error_ratio(x: np.ndarray, y: np.ndarray) -> float:
    """Mean square error as a share of the variance about each channel's mean. Taps differ in scale."""
    centred = x.astype(np.float64) - x.mean(axis=(1, 2), keepdims=True, dtype=np.float64)
    return float(np.square(x.astype(np.float64) - y).mean() / np.square(centred).mean())


def timed(function: Callable[..., Any], *arguments: Any, clock: Callable[[], float] = time.thread_time) -> Any:
    """What it returns, and the seconds of the fastest turn: of the thread's processor time, or of another clock."""
    fastest = math.inf
    for _ in range(TURNS):
        started = clock()
        result = function(*arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        fastest = min(fastest, clock() - started)
    return result, fastest


def step_row(step: str, source: Source, known: dict[str, Calibration], snr_db: float, device: str) -> list[str]:
    size, least, ratios = 0, 0.0, []
    seconds = dict.fromkeys(("encode", "decode", "unpack", "step"), 0.0)
    for tap, values in source.coded.items():
        parts = code_tap(step, values, known[tap], snr_db, device)
        for name, took in parts.seconds.items():
            seconds[name] += took
        size += parts.size
        least += values.size * bound(variances(vectors(source.others[tap]), known[tap]), snr_db)
        ratios += [error_ratio(x, y) for x, y in zip(values, parts.back, strict=True)]
    count = sum(values.size for values in source.coded.values())
    own = -10 * math.log10(np.mean(ratios))
    speeds = [f"{4 * count / 1e6 / took:.0f}" for took in seconds.values()]
    over = (8 * size - least) / count
    return [f"{step}, {snr_db:g} dB", f"{8 * size / count:.2f}", f"{over:.2f}", f"{own:.1f}", *speeds]


@dataclass(frozen=True)
class Coded:
    """A tap of B entries after coding: bytes in all, features as they came back, and seconds by what was done."""

    size: int
    back: list[np.ndarray]
    seconds: dict[str, float]


def code_tap(step: str, values: np.ndarray, known: Calibration, snr_db: float, device: str) -> Coded:
    stored, encoding = timed(encode_all, step, values, known, [snr_db] * len(values))
    items, unpacking = timed(lambda: [unpacked(step, item) for item in stored])
    back, dequantising = timed(lambda: [dequantised(step, item, known) for item in items])
    _, on_device = timed(dequantised_on_device, step, items, known, device, clock=time.perf_counter)
    seconds = {"encode": encoding, "decode": unpacking + dequantising, "unpack": unpacking, "step": on_device}
    return Coded(sum(len(item.data) for item in stored), back, seconds)


def variances(calibrated_on: np.ndarray, known: Calibration) -> np.ndarray:
    """(C,) those of the vectors (N, C) in the calibration's directions."""
    return np.square((calibrated_on - known.mu) @ known.rotation.T).mean(axis=0, dtype=np.float64)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in [head, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def calibrations(source: Source, choose: Callable[[np.ndarray], np.ndarray]) -> dict[str, Calibration]:
    """Of each tap, on those of its vectors (N, C) that are chosen."""
    return {tap: calibrate(choose(vectors(values))) for tap, values in source.others.items()}


def steps_table(source: Source, known: dict[str, Calibration], device: str) -> str:
    head = ["step", "bits", "over bound", "own dB", "encode, MB/s", "decode, MB/s", "unpack, MB/s", "step, MB/s"]
    return table(head, [step_row(step, source, known, snr_db, device) for snr_db in DECIBELS for step in STEPS])


def bits(stored: list[Stored]) -> float:
    return 8 * sum(len(item.data) for item in stored) / sum(math.prod(item.shape) for item in stored)


def packed_bits(source: Source, known: dict[str, Calibration]) -> str:
    stored = [
        item for tap, xs in source.coded.items() for item in encode_all(PACKING, xs, known[tap], [10.0] * len(xs))
    ]
    return f"{bits(stored):.3f}"


def sizes_table(source: Source) -> str:
    """Bits at 10 dB by the number of vectors: all of the first entries, or drawn from all entries."""
    rows = []
    for multiple in MULTIPLES:
        known = [calibrations(source, lambda v: chosen(v, multiple)) for chosen in (first, drawn)]  # noqa: B023
        rows.append([f"{multiple:g} C", *(packed_bits(source, each) for each in known)])
    least = min(vectors(values).shape[0] / values.shape[1] for values in source.others.values())
    everything = packed_bits(source, calibrations(source, lambda v: v))
    return table(
        ["vectors", "of the first entries", "of all entries"],
        [*rows, [f"all, {least:.0f} C and more", everything, everything]],
    )


def first(rows: np.ndarray, multiple: float) -> np.ndarray:
    return rows[: math.ceil(multiple * rows.shape[1])]


def drawn(rows: np.ndarray, multiple: float) -> np.ndarray:
    return first(rows[np.random.default_rng(0).permutation(len(rows))], multiple)


def predictions_table(predictions: np.ndarray) -> str:
    """(B, 4, h, w) the teacher's predictions, as the dither codec would store them."""
    unused = calibrate(vectors(predictions))
    rows = []
    for snr_db in PREDICTION_DECIBELS:
        stored = encode_all(DITHER, predictions, unused, [snr_db] * len(predictions))
        rows.append([f"{snr_db:g} dB", f"{bits(stored):.2f}"])
    return table(["teacher_pred", "bits"], rows)


def run(command: str, *options: object) -> None:
    subprocess.run([sys.executable, "-m", "pipeline.cli", command, *map(str, options)], check=True)


def exact_cache(work: Path, teacher: str) -> Path:
    """A cache of the teacher's taps as they are, one timestep of each of SCENES scenes."""
    scenes, latents, cache = work / "scenes", work / "latents", work / "cache"
    if not scenes.exists():
        run("demo-scenes", "--out", scenes, "--count", SCENES)
    run("encode", "--teacher", teacher, "--data", scenes, "--out", latents, "--resolution", 64)
    options = ("--rounds", 1, "--codec", "fp32", *KEEP_ALL, "--samples", 0, "--uncond-fraction", 0.1)
    run("teacher-cache", "--teacher", teacher, "--latents", latents, "--out", cache, *options)
    return cache


def gradient(student: UNet2DConditionModel, batch: Batch, alphas: Tensor, features: dict[str, Tensor]) -> Tensor:
    """The gradient of the distillation loss, all parameters in one vector, when the teacher's taps are `features`."""
    noisy = add_noise(batch.latents, batch.noise, batch.timesteps, alphas)
    taps = Taps(student, [name for name, _ in PAIRS])
    with taps.recording() as own:
        predicted = student(
            noisy, batch.timesteps, encoder_hidden_states=batch.conditioning["prompt_embeds"].float()
        ).sample
    taps.remove()
    aim = target(batch.latents, batch.noise, batch.timesteps, alphas, "epsilon")
    terms = distillation_losses(predicted, aim, batch.teacher_pred, own, features, PAIRS)
    student.zero_grad()
    total_loss(terms, OUTPUT_WEIGHT, FEATURE_WEIGHT).backward()
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def equal_error(values: np.ndarray, known: Calibration, snr_db: float) -> list[float]:
    """The decibels about the calibrated means at which each entry's error is that of `snr_db` about its own."""
    own = np.square(values - values.mean(axis=(2, 3), keepdims=True)).mean(axis=(1, 2, 3))
    calibrated = np.square(values - known.mu[:, None, None]).mean(axis=(1, 2, 3))
    return (snr_db + 10 * np.log10(calibrated / own)).tolist()


def equal_errors_table(
    student: UNet2DConditionModel, batch: Batch, alphas: Tensor, source: Source, known: dict[str, Calibration]
) -> str:
    exact = {tap: torch.from_numpy(values) for tap, values in source.coded.items()}
    reference = gradient(student, batch, alphas, exact)
    rows = []
    for snr_db in DECIBELS:
        plain = {tap: [snr_db] * len(values) for tap, values in exact.items()}
        raised = {tap: equal_error(values, known[tap], snr_db) for tap, values in source.coded.items()}
        for step, decibels in ((DITHER, plain), (PACKING, plain), (PACKING, raised)):
            name = f"{step}, {snr_db:g} dB" if decibels is plain else f"{step}, the error of dither at {snr_db:g} dB"
            changes = []
            for draw in range(DRAWS):
                stored = {tap: encode_all(step, x, known[tap], decibels[tap], draw) for tap, x in source.coded.items()}
                features = {tap: restored(step, items, known[tap]) for tap, items in stored.items()}
                changed = gradient(student, batch, alphas, features) - reference
                changes.append(float(changed.norm() / reference.norm()))
            size = bits([item for items in stored.values() for item in items])
            rows.append([name, f"{size:.2f}", f"{100 * math.sqrt(np.square(changes).mean()):.2f} %"])
    return table(["step", "bits", "gradient"], rows)


def restored(step: str, stored: list[Stored], known: Calibration) -> Tensor:
    """(B, C, h, w)."""
    return torch.from_numpy(np.stack([dequantised(step, unpacked(step, item), known) for item in stored]))


def report_gaussian(device: str) -> None:
    draw = np.random.default_rng(0)
    alike = draw.standard_normal((6, 320, 64, 64), np.float32)
    falling = draw.standard_normal((176, 640, 8, 8), np.float32) * FALLING[:, None, None]
    predictions = alike[:, :256].reshape(-1, 4, 64, 64)
    for title, values, coded in (("320 x 64 x 64", alike, 4), ("640 x 8 x 8, falling variances", falling, 16)):
        source = Source({"gaussian": values[:coded]}, {"gaussian": values[coded:]})
        known = calibrations(source, lambda v: v)
        print(f"\nGaussian, {title}:\n\n" + steps_table(source, known, device), flush=True)
    print("\nGaussian, 4 x 64 x 64, the shape of SD-1.x's predictions:\n\n" + predictions_table(predictions))


def report_teacher(work: Path, teacher: str, device: str) -> None:
    cache = exact_cache(work, teacher)
    dataset = CacheDataset(open_store(cache), [tap for _, tap in PAIRS])
    batches = [dataset.collate([dataset[i] for i in part]) for part in (range(CODED), range(CODED, SCENES))]
    source = Source(*({tap: f.decode().numpy() for tap, f in batch.features.items()} for batch in batches))
    known = calibrations(source, lambda v: v)
    student = UNet2DConditionModel.from_pretrained(cache / "students" / "sd_small")
    alphas = diffusers.DDPMScheduler.from_config(dataset.spec["noise_scheduler"]).alphas_cumprod

    print(f"\nTaps of {teacher}:\n\n" + steps_table(source, known, device))
    print("\nBits at 10 dB by the vectors to calibrate on:\n\n" + sizes_table(source))
    print("\nIts predictions:\n\n" + predictions_table(batches[0].teacher_pred.float().numpy()))
    print(f"\nAt equal error, and the gradient of an untrained sd_small, a batch of {CODED}:\n")
    print(equal_errors_table(student, batches[0], alphas, source, known), flush=True)


@click.command()
@click.option("--work", type=Path, required=True, help="Directory for small exact caches of the demo.")
@click.option("--teacher", "teachers", multiple=True, default=["demo"], help="`demo`, or a pipeline like it.")
@click.option("--device", default="cpu", help="Where torch decodes.")
def main(work: Path, teachers: tuple[str, ...], device: str) -> None:
    print(f"{machine(device)}, numpy {np.__version__}, zstandard {zstandard.__version__}")
    report_gaussian(device)
    for place, teacher in enumerate(teachers):
        report_teacher(work / str(place), teacher, device)


if __name__ == "__main__":
    main()

"""How close stage one comes to its networks' own speed: each stage's throughput against the bare forward passes.

For encode the bare work is the VAE's encoder and the text encoder on the same batches, for teacher-cache the U-Net
with its taps caught; both run in this process, right after the stage, from tensors that are ready in memory. A stage is
timed from its second forward pass to its last shard: neither loading weights nor the first pass, which warms
up, counts. Run it on a quiet machine:

    python tests/benchmarks/stage_one.py --work work/stage-one --arch demo --workers 1 --workers 2 --workers 4
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import click
import torch
from accelerate.state import AcceleratorState, PartialState
from machine import machine
from sd15_road import random_checkpoint, random_images

from pipeline.cache import latents_writer, targets_writer
from pipeline.cache.latents import open_latents
from pipeline.commands import encode, teacher_cache
from pipeline.demo.scenes import write_folder
from pipeline.encode import EncodeSettings
from pipeline.models.bundled import teacher_folder
from pipeline.models.encoders import encode_images, latents_shape
from pipeline.models.families import Shapes, denoise, random_conditioning
from pipeline.models.families.sd import SD
from pipeline.teacher_cache import TeacherCacheSettings
from shards.schema import conditioning_shapes

RESOLUTIONS = {"demo": 64, "sd15": 512}
# The command of each stage's settings, and what it calls once a batch.
STAGES = {
    EncodeSettings: (encode, latents_writer, "encode_batch"),
    TeacherCacheSettings: (teacher_cache, targets_writer, "run_teacher"),
}


@dataclass
class Clock:
    """When the second forward pass began and the last shard was written; the arguments of each pass from there on."""

    passes: int = 0
    started: float = 0.0
    ended: float = 0.0
    calls: list[tuple] = field(default_factory=list)

    def forward(self, function: Callable) -> Callable:
        def timed(*arguments):
            self.passes += 1
            if self.passes == 2:
                synchronise()
                self.started = time.perf_counter()
            if self.passes > 1:
                self.calls.append(arguments)
            return function(*arguments)

        return timed

    def write(self, function: Callable) -> Callable:
        def timed(*arguments):
            function(*arguments)
            self.ended = time.perf_counter()

        return timed

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    @property
    def entries(self) -> int:
        return sum(len(batch) for batch, *_ in self.calls)


def run_stage(settings) -> Clock:
    """Run a stage in this process with its forward passes and its writing on the clock."""
    stage, writer, forward = STAGES[type(settings)]
    clock = Clock()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(writer, forward, clock.forward(getattr(writer, forward))))
        stack.enter_context(mock.patch.object(writer, "write_shard", clock.write(writer.write_shard)))
        stage.run(settings)
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    return clock


@torch.inference_mode()
def bare_encode(clock: Clock, settings: EncodeSettings) -> float:
    """Seconds of the networks alone on the stage's batches."""
    base = clock.calls[0][2]
    shape = latents_shape(base.vae, settings.resolution)
    batches = [
        (torch.stack([torch.from_numpy(item.pixels) for item in batch]), [item.record.caption for item in batch])
        for batch, *_ in clock.calls
    ]
    started = time.perf_counter()
    for pixels, captions in batches:
        encode_images(base.vae, pixels, torch.zeros(len(captions), *shape))
        SD.encode_prompts(base, captions)
    synchronise()
    return time.perf_counter() - started


@torch.inference_mode()
def bare_teacher(clock: Clock, latents_shape: tuple[int, ...], conditioning: Shapes) -> float:
    teacher = clock.calls[0][3]
    device, dtype = teacher.unet.device, teacher.unet.dtype
    started = time.perf_counter()
    for samples, *_ in clock.calls:
        count = len(samples)
        noisy = torch.zeros(count, *latents_shape, device=device, dtype=dtype)
        inputs = {name: tensor.to(device, dtype) for name, tensor in random_conditioning(conditioning, count).items()}
        with teacher.taps.recording():
            denoise(teacher.unet, noisy, torch.zeros(count, device=device), inputs, teacher.family)
    synchronise()
    return time.perf_counter() - started


def synchronise() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@click.command()
@click.option("--work", type=Path, required=True, help="Directory for what the stages write; emptied first.")
@click.option("--arch", type=click.Choice(list(RESOLUTIONS)), default="demo", show_default=True)
@click.option("--images", default=512, show_default=True, help="Images, and so entries of the cache.")
@click.option("--batch-size", default=16, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto or cpu.")
@click.option("--compile/--no-compile", "compiled", default=False, show_default=True, help="In both of each pair.")
@click.option("--workers", multiple=True, default=(4,), show_default=True, help="Threads that decode images.")
@click.option("--repeats", default=3, show_default=True, help="Times that each stage and its bare passes are run.")
def main(
    work: Path,
    arch: str,
    images: int,
    batch_size: int,
    device: str,
    compiled: bool,
    workers: tuple[int, ...],
    repeats: int,
) -> None:
    shutil.rmtree(work, ignore_errors=True)
    if arch == "demo":
        teacher, _ = teacher_folder(), write_folder(work / "images", images)
    else:
        teacher, _ = work / "teacher", random_images(work / "images", images)
        random_checkpoint(teacher)
    common = {"teacher": str(teacher), "batch_size": batch_size, "device": device, "compile": compiled}
    rows = []
    for repeat in range(repeats):
        cache = work / f"cache-{repeat}"
        for count in workers:
            latents = work / f"latents-{repeat}-{count}"
            settings = EncodeSettings(
                data=str(work / "images"), out=latents, resolution=RESOLUTIONS[arch], workers=count, **common
            )
            clock = run_stage(settings)
            rows.append((f"encode, {count} workers", clock.entries, clock.seconds, bare_encode(clock, settings)))
        asked = TeacherCacheSettings(latents=latents, out=cache, rounds=1, samples=0, **common)
        spec = open_latents(latents).manifest.spec
        clock = run_stage(asked)
        bare = bare_teacher(clock, spec["latents_shape"], conditioning_shapes(spec))
        rows.append(("teacher-cache", clock.entries, clock.seconds, bare))
        shutil.rmtree(cache)

    more = ", compiled" if compiled else ""
    print(f"{machine(device)}; {arch}, {images} images in batches of {batch_size}{more}\n")
    print("| stage | entries a second | bare forward, entries a second | ratio |")
    print("|---|---|---|---|")
    for stage, entries, seconds, bare in sorted(rows):
        print(f"| {stage} | {entries / seconds:.3g} | {entries / bare:.3g} | {bare / seconds:.2f} |")


if __name__ == "__main__":
    main()

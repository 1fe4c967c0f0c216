"""The three stages at the full SD-1.x architecture, with random weights: bytes, memory and seconds.

Makes a checkpoint of Stable Diffusion 1.x's shape (so that no download is needed), a few images of
noise, and runs the stages' own commands as child processes, whose peak memory the system reports.
Prints two markdown tables. Run it on a quiet machine:

    python tests/benchmarks/sd15_road.py --work /tmp/sd15 --images 2
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from machine import run_stage, stage_table
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pipeline.cache import sizes
from pipeline.commands.plan import cost_of
from pipeline.models.shapes import teacher_shapes
from pipeline.models.students import teacher_taps
from pipeline.settings.plan import PlanSettings
from shards.manifest import read_manifest
from shards.schema import TAP_PREFIX
from shards.sidecar import read_sidecar
from shards.store import open_store

CASES = {
    "fp16, all tokens": {"codec": "fp16", "tokens": 0},
    "20 dB, all tokens": {"snr_db": 20.0, "tokens": 0},
    "0 dB, 64 tokens": {"snr_db": 0.0, "tokens": 64},
    "5 dB, 64 tokens": {"snr_db": 5.0, "tokens": 64},
    "10 dB, 64 tokens": {"snr_db": 10.0, "tokens": 64},
}
# An image's own bytes are shared by so many entries.
ROUNDS = 8
# The last cache is the one that stage two trains from.
TRAIN_STEPS = 3
SD15_UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


def random_checkpoint(folder: Path) -> None:
    """A pipeline of SD-1.x's architecture: 860M U-Net, 84M VAE, 123M text encoder, float32."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SD15_UNET)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: number for number, token in enumerate(vocabulary)},
        merges=[],
        unk_token="<|endoftext|>",
        model_max_length=77,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    ).save_pretrained(folder)


def random_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for i in range(count):
        coarse = draw.integers(0, 256, (16, 20, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((640, 512), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "text": f"picture number {i}"} for i in range(count)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclass(frozen=True)
class Bytes:
    """Of an entry: in its taps, on disk without its image, and of an image on disk."""

    taps: float
    entry: float
    image: float

    @property
    def shared(self) -> float:
        """An entry with its share of the image."""
        return self.entry + self.image / ROUNDS


def written_bytes(cache: Path) -> Bytes:
    """Means over the last round, from which no calibration was learned."""
    manifest = read_manifest(open_store(cache), "cache")
    shards = [shard for shard in manifest.plan if shard.round == manifest.rounds - 1]
    sidecars = [read_sidecar(open_store(cache), shard.name, manifest) for shard in shards]
    entries = sum(sidecar.count for sidecar in sidecars)
    taps = sum(
        int(sidecar.places[:, number, 1].sum())
        for sidecar in sidecars
        for number, name in enumerate(sidecar.head.members)
        if name.startswith(TAP_PREFIX)
    )
    files = [cache / name for shard in shards for name in (shard.name, manifest.sidecar_name(shard.name))]
    images = [*(cache / "images").glob("s*.tar"), *(cache / "images").glob("s*.index")]
    return Bytes(taps / entries, bytes_of(files) / entries, bytes_of(images) / manifest.spec["entries"])


def bytes_of(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def planned_bytes(teacher: Path, options: dict[str, float | str]) -> float:
    """What `plan` says of an entry with its share of the image."""
    shapes = teacher_shapes(teacher, 512, teacher_taps(("sd_small",)))
    cost = cost_of(PlanSettings(teacher=str(teacher), images=1, **options), shapes)
    return sizes.stored_bytes(cost.entry) + cost.latents / ROUNDS


@click.command()
@click.option("--work", type=Path, required=True, help="Directory for some 25 GB of files; made if needed.")
@click.option("--images", default=8, show_default=True, help="Images.")
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)), help="Only these; all by default.")
@click.option("--device", default="auto", show_default=True, help="auto or cpu.")
def main(work: Path, images: int, cases: tuple[str, ...], device: str) -> None:
    teacher, pictures, latents, cache = (work / name for name in ("teacher", "images", "latents", "cache"))
    common = ["--batch-size", 1, "--device", device]
    if not (teacher / "model_index.json").is_file():
        random_checkpoint(teacher)
    random_images(pictures, images)
    for stale in (latents, cache, work / "student"):
        shutil.rmtree(stale, ignore_errors=True)
    stages = {"encode": run_stage("encode", "--teacher", teacher, "--data", pictures, "--out", latents, *common)}
    rows = []
    for name in cases or CASES:
        options = CASES[name]
        shutil.rmtree(cache, ignore_errors=True)
        flags = [text for option, value in options.items() for text in (f"--{option.replace('_', '-')}", value)]
        inputs = ["--teacher", teacher, "--latents", latents, "--out", cache, "--rounds", 2, "--samples", 0]
        stages[f"teacher-cache, {name}"] = run_stage("teacher-cache", *inputs, *common, *flags)
        found = written_bytes(cache)
        rows.append((name, found, planned_bytes(teacher, options)))
        click.echo(f"{rows[-1]} {stages[f'teacher-cache, {name}']}", err=True)
    steps = [
        "--level",
        "sd_small",
        "--max-train-steps",
        TRAIN_STEPS,
        "--train-batch-size",
        1,
        "--no-report",
        "--device",
        device,
    ]
    stages["distill, sd_small"] = run_stage("distill", "--cache", cache, "--out", work / "student", *steps)

    threads, versions = torch.get_num_threads(), f"Python {platform.python_version()}, torch {torch.__version__}"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() and device == "auto" else "no GPU"
    print(f"{os.cpu_count()} cores, {threads} torch threads, {gpu}; {versions}; {images} images, batch 1, float32\n")
    print(f"| case | taps, bytes | entry on disk | with 1/{ROUNDS} of its image | planned | plan over it | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name, found, planned in rows:
        ratio, over = rows[0][1].shared / found.shared, 100 * (planned / found.shared - 1)
        cells = f"{found.taps:,.0f} | {found.entry:,.0f} | {found.shared:,.0f} | {planned:,.0f} | {over:+.1f} %"
        print(f"| {name} | {cells} | {ratio:.1f} |")
    print("\n" + stage_table(stages))


if __name__ == "__main__":
    main()

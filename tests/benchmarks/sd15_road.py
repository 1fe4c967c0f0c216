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
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from shards.manifest import read_manifest
from shards.reader import read_sidecar
from shards.store import open_store

CODECS = {
    "fp16": ["--codec", "fp16", "--tokens", "0"],
    "dither 20 dB": ["--codec", "dither", "--snr-db", "20", "--tokens", "0"],
    "dither 10 dB, 256 tokens": ["--codec", "dither", "--snr-db", "10", "--tokens", "256"],
    "dither 10 dB, 64 tokens": ["--codec", "dither", "--snr-db", "10", "--tokens", "64"],
}
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


def run_stage(*arguments: str) -> tuple[float, float, float]:
    """Run one stage; returns seconds in all, seconds a unit of its progress bar, and peak memory in GB."""
    started = time.monotonic()
    process = subprocess.Popen(["distill-sd", *map(str, arguments)], stderr=subprocess.PIPE, text=True)
    shown = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(shown)
    seconds = time.monotonic() - started
    done, minutes, rest = re.findall(r"(\d+)/\1 \[(\d+):(\d+)<", shown)[-1]
    return seconds, (60 * int(minutes) + int(rest)) / int(done), usage.ru_maxrss / 1e6


def member_bytes(cache: Path) -> tuple[float, float]:
    """Mean bytes of an entry: of its taps, and of all its members."""
    manifest = read_manifest(open_store(cache), "cache")
    sidecars = [read_sidecar(open_store(cache), shard, manifest.spec_sha256) for shard in manifest.plan.names()]
    entries = [sidecar.locate(place) for sidecar in sidecars for place in range(sidecar.count)]
    taps = sum(m[1] for members in entries for name, m in members.items() if name.startswith("tap."))
    return taps / len(entries), sum(m[1] for members in entries for m in members.values()) / len(entries)


@click.command()
@click.option("--work", type=Path, required=True, help="Directory for some 25 GB of files; made if needed.")
@click.option("--images", default=2, show_default=True, help="Images, and so entries of each cache.")
@click.option("--device", default="auto", show_default=True, help="auto or cpu.")
def main(work: Path, images: int, device: str) -> None:
    teacher, pictures, latents = work / "teacher", work / "images", work / "latents"
    if not (teacher / "model_index.json").is_file():
        random_checkpoint(teacher)
    random_images(pictures, images)
    for stale in (latents, work / "cache", work / "student"):
        shutil.rmtree(stale, ignore_errors=True)

    stages = [
        (
            "encode",
            run_stage(
                "encode",
                "--teacher",
                teacher,
                "--data",
                pictures,
                "--out",
                latents,
                "--batch-size",
                "1",
                "--device",
                device,
            ),
        )
    ]
    sizes = []
    for name, options in CODECS.items():
        shutil.rmtree(work / "cache", ignore_errors=True)
        measured = run_stage(
            "teacher-cache",
            "--teacher",
            teacher,
            "--latents",
            latents,
            "--out",
            work / "cache",
            "--rounds",
            "1",
            "--samples",
            "0",
            "--batch-size",
            "1",
            "--device",
            device,
            *options,
        )
        stages.append((f"teacher-cache, {name}", measured))
        sizes.append((name, *member_bytes(work / "cache")))
        click.echo(f"{name}: {sizes[-1]} {measured}", err=True)
    measured = run_stage(
        "distill",
        "--cache",
        work / "cache",
        "--out",
        work / "student",
        "--level",
        "sd_small",
        "--max-train-steps",
        TRAIN_STEPS,
        "--train-batch-size",
        "1",
        "--device",
        device,
    )
    stages.append(("distill, sd_small", measured))

    threads, versions = torch.get_num_threads(), f"Python {platform.python_version()}, torch {torch.__version__}"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() and device == "auto" else "no GPU"
    print(f"{os.cpu_count()} cores, {threads} torch threads, {gpu}; {versions}; {images} entries, batch 1, float32\n")
    print("| codec | taps, bytes an entry | ratio to fp16 | whole entry, bytes | ratio to fp16 |")
    print("|---|---|---|---|---|")
    for name, taps, whole in sizes:
        print(f"| {name} | {taps:,.0f} | {sizes[0][1] / taps:.1f} | {whole:,.0f} | {sizes[0][2] / whole:.1f} |")
    print("\n| stage | seconds in all | seconds an entry or step | peak memory, GB |")
    print("|---|---|---|---|")
    for name, (seconds, each, memory) in stages:
        print(f"| {name} | {seconds:.0f} | {each:.1f} | {memory:.1f} |")


if __name__ == "__main__":
    main()

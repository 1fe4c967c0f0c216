"""SDXL at its full size: the bytes of an entry from configs alone, and a teacher and a student of random weights.

`plan` prints what an entry takes by the set of taps and the codec, and how large the students are. No weights are made.
`run` makes a checkpoint of SDXL's shape in fp16 (so that no download is needed) and images of noise, and runs the
stages' own commands as child processes, whose peak memory the system reports:

    python tests/benchmarks/sdxl_road.py plan
    python tests/benchmarks/sdxl_road.py run --work /tmp/sdxl
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import click
import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from machine import in_process, machine, run_stage, stage_table
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from pipeline.cache import sizes
from pipeline.commands.plan import Cost, cost_of
from pipeline.models.families.sdxl import SDXL
from pipeline.models.families.sdxl_configs import CONFIGS
from pipeline.models.levels.tap_sets import TAP_SETS
from pipeline.models.shapes import TeacherShapes, checked_unet_config, teacher_shapes
from pipeline.models.students import meta_student
from pipeline.models.tap_pairs import taps_of_teacher
from pipeline.models.tokenizer import write_tokenizer
from pipeline.settings.plan import PlanSettings
from shards.manifest import read_manifest
from shards.sidecar import read_sidecar
from shards.store import open_store

# A student of each set's authors.
LEVELS = {"blocks": "sdxl_small", "resnets-attentions": "ssd_1b", "self-attention": "koala_700m"}
CODECS = {
    "fp16, all tokens": {"codec": "fp16", "tokens": 0},
    "10 dB, 64 tokens": {"snr_db": 10.0, "tokens": 64},
    "5 dB, 64 tokens": {"snr_db": 5.0, "tokens": 64},
}
# What is run, and how the last student is trained.
CASES = {taps: {"taps": taps, "students": level} for taps, level in LEVELS.items()}
RESOLUTION, TRAIN_STEPS = 512, 2


def write_configs(folder: Path) -> None:
    """SDXL's configs and tokenizers, without weights."""
    for name, config in CONFIGS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(config))
    for tokenizer in ("tokenizer", "tokenizer_2"):
        write_tokenizer(folder / tokenizer)


def planned(folder: Path, shapes: TeacherShapes, options: dict[str, float | str]) -> Cost:
    return cost_of(PlanSettings(teacher=str(folder), images=1, **options), shapes)


def shapes_of(folder: Path, taps: str, resolution: int) -> TeacherShapes:
    config = checked_unet_config(folder)
    return teacher_shapes(folder, resolution, taps_of_teacher(config, (LEVELS[taps],), taps))


@click.group()
def main() -> None:
    """SDXL at its full size."""


@main.command()
def plan() -> None:
    """Bytes and parameters, from configs alone."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_configs(folder)
        config = checked_unet_config(folder)
        print("| resolution | taps of | taps | values | " + " | ".join(CODECS) + " | an image |")
        print("|---|---|---|---|" + "---|" * (len(CODECS) + 1))
        for resolution in (512, 1024):
            for taps in TAP_SETS:
                shapes = shapes_of(folder, taps, resolution)
                costs = [planned(folder, shapes, options) for options in CODECS.values()]
                values = sum(int(np.prod(shape)) for shape in shapes.taps.values())
                cells = " | ".join(f"{sizes.stored_bytes(cost.entry):,}" for cost in costs)
                head = f"{resolution} px | {taps}, {LEVELS[taps]} | {len(shapes.taps)} | {values:,}"
                print(f"| {head} | {cells} | {costs[0].latents:,} |")
        print("\n| U-Net | parameters | bytes in float32 |")
        print("|---|---|---|")
        with torch.device("meta"):
            teacher = UNet2DConditionModel.from_config(config)
        for name, unet in {"teacher": teacher, **{level: meta_student(config, level) for level in SDXL.levels}}.items():
            count = sum(parameter.numel() for parameter in unet.parameters())
            print(f"| {name} | {count:,} | {4 * count:,} |")


def random_checkpoint(folder: Path) -> None:
    """A pipeline of SDXL's architecture in fp16, with 2.57e9 parameters in the U-Net, 0.81e9 in the text encoders and
    0.08e9 in the VAE. Each network is saved before the next one is made."""
    torch.manual_seed(0)
    # Initial values are drawn in it, so the U-Net is never in memory in float32.
    torch.set_default_dtype(torch.bfloat16)
    write_configs(folder)
    networks = {
        "unet": lambda: UNet2DConditionModel.from_config(CONFIGS["unet/config.json"]),
        "vae": lambda: AutoencoderKL.from_config(CONFIGS["vae/config.json"]),
        "text_encoder": lambda: CLIPTextModel(text_config(folder, "text_encoder")),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(text_config(folder, "text_encoder_2")),
    }
    for part, make in networks.items():
        make().half().save_pretrained(folder / part)
    torch.set_default_dtype(torch.float32)
    index = CONFIGS["model_index.json"]
    parts = {
        "scheduler": EulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "tokenizer_2": CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps({**index, "_diffusers_version": diffusers.__version__}))


def text_config(folder: Path, part: str) -> CLIPTextConfig:
    return CLIPTextConfig.from_pretrained(folder / part)


def random_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for i in range(count):
        coarse = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC)
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture number {i}")


def written_bytes(cache: Path) -> float:
    """The bytes of an entry on disk: its members in the tar, and its row in the sidecar."""
    manifest = read_manifest(open_store(cache), "cache")
    files = [cache / name for shard in manifest.plan for name in (shard.name, manifest.sidecar_name(shard.name))]
    count = sum(read_sidecar(open_store(cache), shard.name, manifest).count for shard in manifest.plan)
    return sum(file.stat().st_size for file in files) / count


@main.command()
@click.option("--work", type=Path, required=True, help="Directory for some 30 GB of files; made if needed.")
@click.option("--images", default=2, show_default=True, help="Images.")
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)), help="Only these; all by default.")
@click.option("--dtype", default="bf16", show_default=True, help="Precision of the teacher and of training.")
@click.option("--device", default="auto", show_default=True, help="auto or cpu.")
def run(work: Path, images: int, cases: tuple[str, ...], dtype: str, device: str) -> None:
    """A teacher of random weights, and the last case's student in training."""
    teacher, pictures, latents, cache = (work / name for name in ("teacher", "images", "latents", "cache"))
    if not (teacher / "model_index.json").is_file():
        # In a process of its own, which gives its memory back.
        made = work / "unfinished"
        in_process(random_checkpoint, made)
        made.rename(teacher)
    random_images(pictures, images)
    for stale in (latents, work / "student"):
        shutil.rmtree(stale, ignore_errors=True)
    common = ["--batch-size", 1, "--device", device]
    encode = ["encode", "--teacher", teacher, "--data", pictures, "--out", latents, "--resolution", RESOLUTION]
    stages, rows = {"encode": run_stage(*encode, *common)}, []
    for name in cases or CASES:
        shutil.rmtree(cache, ignore_errors=True)
        options = [text for option, value in CASES[name].items() for text in (f"--{option}", value)]
        inputs = ["--teacher", teacher, "--latents", latents, "--out", cache, "--rounds", 1, "--samples", 0]
        stages[f"teacher-cache, {name}"] = run_stage("teacher-cache", *inputs, *common, *options, "--dtype", dtype)
        cost = planned(teacher, shapes_of(teacher, name, RESOLUTION), {})
        rows.append((name, written_bytes(cache), sizes.stored_bytes(cost.entry)))
        click.echo(f"{rows[-1]} {stages[f'teacher-cache, {name}']}", err=True)
    level = CASES[(cases or list(CASES))[-1]]["students"]
    train = [
        "distill",
        "--cache",
        cache,
        "--out",
        work / "student",
        "--level",
        level,
        "--no-report",
        "--device",
        device,
    ]
    train += ["--max-train-steps", TRAIN_STEPS, "--train-batch-size", 1, "--gradient-checkpointing", "--use-8bit-adam"]
    stages[f"distill, {level}"] = run_stage(*train, "--mixed-precision", dtype, "--dataloader-num-workers", 0)

    print(f"{machine(device)}; {images} images of {RESOLUTION} px, batch 1, {dtype}\n")
    print("| taps | entry on disk | planned | plan over it |")
    print("|---|---|---|---|")
    for name, found, expected in rows:
        print(f"| {name}, {LEVELS[name]} | {found:,.0f} | {expected:,} | {100 * (expected / found - 1):+.1f} % |")
    print("\n" + stage_table(stages))


if __name__ == "__main__":
    main()

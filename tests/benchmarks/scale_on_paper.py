"""Two long trainings on paper: bytes, requests, hours and network, for one machine and for several.

Nothing is run. Bytes are those of `distill-sd plan`, arithmetic is counted on the meta device, and the time to open a
set is what scale.md measured. What this project has not measured is an option: what a GPU computes in a second, how
long a store takes to answer, and what it charges. Prints two markdown tables for each training.

    python tests/benchmarks/scale_on_paper.py
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click

from pipeline.commands.plan import Cost, cost_of
from pipeline.evaluation.training_cost import TRAINING_PASSES, TrainingCost, training_cost
from pipeline.models.families.sd_configs import VERSIONS
from pipeline.models.families.sdxl_configs import CONFIGS
from pipeline.models.load import unet_config
from pipeline.models.shapes import teacher_shapes
from pipeline.models.tap_pairs import taps_of_teacher
from pipeline.settings.plan import PlanSettings
from pipeline.settings.teacher_cache import TeacherCacheSettings
from pipeline.system.disk import format_bytes
from shards.remote_store import IN_FLIGHT

# Of a local set, from scale.md.
OPEN_SECONDS_A_SHARD = 0.14e-3
# An entry's targets and its image are each read by one range.
READS_AN_ENTRY = 2
# A shard and its sidecar.
FILES_A_SHARD = 2
# Processes that read, for each GPU.
WORKERS = 2


@dataclass(frozen=True)
class Training:
    """So many entries, each used once, by one student."""

    title: str
    configs: dict
    level: str
    resolution: int
    images: int
    rounds: int

    @property
    def entries(self) -> int:
        return self.images * self.rounds


@dataclass(frozen=True)
class Assumed:
    """What is not measured: TFLOP/s of a GPU, GPUs of a machine, seconds to an answer, and prices in dollars: of a
    million requests that read and that write, and of a GB for a month."""

    tflops: float
    gpus: int
    latency: float
    gets: float
    puts: float
    storage: float


SD15 = next(version.configs for version in VERSIONS if version.title == "SD-1.x")
TRAININGS = (
    Training("SD-1.x, as many samples as BK-SDM's training", SD15, "bk_small", 512, 212_776, 60),
    Training("SDXL, as many samples", CONFIGS, "koala_700m", 1024, 1_600_000, 8),
)


def counted(training: Training, folder: Path) -> tuple[Cost, TrainingCost]:
    """Bytes and arithmetic of a training, from configs alone."""
    for name, config in training.configs.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(config))
    levels = (training.level,)
    shapes = teacher_shapes(folder, training.resolution, taps_of_teacher(unet_config(folder), levels, "blocks"))
    settings = PlanSettings(teacher=str(folder), images=training.images, resolution=training.resolution)
    return cost_of(settings, shapes), training_cost(folder, training.resolution, shapes, levels)


def bytes_of(training: Training, cost: Cost) -> list[str]:
    """The first table: what is stored."""
    shards = -(-training.images // TeacherCacheSettings.entries_per_shard) * (training.rounds + 1)
    one_round = cost.total(training.images, 2) - cost.total(training.images, 1)
    rows = {
        "images": f"{training.images:,}",
        "rounds": training.rounds,
        "entries": f"{training.entries:,}",
        "bytes of an image": f"{cost.latents:,}",
        "bytes of an entry": f"{one_round // training.images:,}",
        "latents and cache": format_bytes(cost.total(training.images, training.rounds)),
        "with a window of two rounds": format_bytes(cost.total(training.images, 2)),
        "shards": f"{shards:,}",
    }
    return ["| what | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def hours(macs: float, gpus: int, assumed: Assumed) -> float:
    """Hours that so many multiply-accumulates take."""
    return 2 * macs / (assumed.tflops * 1e12 * gpus) / 3600


def times_of(training: Training, cost: Cost, arithmetic: TrainingCost, machines: int, assumed: Assumed) -> list[str]:
    """A column of the second table: what so many machines take."""
    gpus, entries, images = machines * assumed.gpus, training.entries, training.images
    student = TRAINING_PASSES * arithmetic.students[training.level]
    distill = hours(entries * student, gpus, assumed)
    online = hours(entries * (student + arithmetic.teacher + arithmetic.vae_encoder), gpus, assumed)
    read = cost.total(images, training.rounds) + images * cost.latents * (training.rounds - 1)
    shards = -(-images // TeacherCacheSettings.entries_per_shard) * (training.rounds + 1)
    # The head of each sidecar when a process opens the set, and its table when a worker first reads from the shard.
    gets = READS_AN_ENTRY * entries + shards * gpus * (1 + WORKERS)
    month = cost.total(images, training.rounds) / 1e9 * assumed.storage
    return [
        f"{hours(images * arithmetic.vae_encoder, gpus, assumed):,.1f}",
        f"{hours(entries * arithmetic.teacher, gpus, assumed):,.1f}",
        f"{distill:,.1f}",
        f"{online:,.1f}",
        f"{read / distill / 3600 / machines / 1e6:,.0f}",
        f"{shards * OPEN_SECONDS_A_SHARD:,.0f}",
        f"{shards / IN_FLIGHT * assumed.latency:,.0f}",
        f"{gets / 1e6:,.1f}",
        f"{gets / 1e6 * assumed.gets + FILES_A_SHARD * shards / 1e6 * assumed.puts:,.0f}",
        f"{month:,.0f}",
    ]


NAMES = (
    "encode, hours",
    "teacher-cache, hours",
    "distill, hours",
    "online training, hours",
    "read while training, MB a second and machine",
    "open the set on a disk, seconds",
    "open it in a store, seconds",
    "requests that read, millions",
    "all requests, dollars",
    "keeping all of it for a month, dollars",
)


@click.command(context_settings={"show_default": True})
@click.option("--tflops", default=100.0, help="TFLOP/s that a GPU really computes in half precision.")
@click.option("--gpus", default=8, help="GPUs of a machine.")
@click.option("--machines", multiple=True, default=(1, 8), help="Numbers of machines, a column each.")
@click.option("--latency", default=0.03, help="Seconds until a store answers.")
@click.option("--gets", default=0.4, help="Dollars for a million requests that read.")
@click.option("--puts", default=5.0, help="Dollars for a million requests that write.")
@click.option("--storage", default=0.023, help="Dollars for a GB in a store for a month.")
def main(
    tflops: float, gpus: int, machines: tuple[int, ...], latency: float, gets: float, puts: float, storage: float
) -> None:
    """Count two long trainings."""
    assumed = Assumed(tflops, gpus, latency, gets, puts, storage)
    for training in TRAININGS:
        with tempfile.TemporaryDirectory() as folder:
            cost, arithmetic = counted(training, Path(folder))
        click.echo(f"\n## {training.title}: `{training.level}` at {training.resolution} px\n")
        click.echo("\n".join(bytes_of(training, cost)))
        columns = [times_of(training, cost, arithmetic, count, assumed) for count in machines]
        titles = " | ".join(f"{count} x {gpus} GPUs" for count in machines)
        click.echo(f"\n| what | {titles} |\n|{'---|' * (1 + len(machines))}")
        for name, *cells in zip(NAMES, *columns, strict=True):
            click.echo(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

"""The whole road against online training: stage one, and stage two for one student or several, by visits to an entry.

Four parts are measured in one run, in turns, each turn in a process of its own: seconds an image takes in `encode`, an
entry in `teacher-cache`, a sample in `distill` from the cache, and a sample online, as distill-sd trains. The table
follows from them by arithmetic. For R rounds, V visits to each entry and S students

    offline = encode + R * teacher-cache + S * R * V * distill        seconds per image
    online  = S * R * V * online

Weights are random for `sd15`, the bundled teacher's for `demo`. On a quiet machine:

    python tests/benchmarks/whole_road.py --work work/whole-road --arch sd15 --batch-size 1 --steps 2 --images 4
"""

from __future__ import annotations

import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

import click
from machine import in_process, machine
from stage_one import run_stage
from stage_two import REFERENCE, RESOLUTIONS, Case, prepare, run

from pipeline.encode import EncodeSettings
from pipeline.models.levels import LEVELS
from pipeline.teacher_cache import TeacherCacheSettings

STUDENTS, VISITS = (1, 2, 4), (1, 2, 4)


@dataclass(frozen=True)
class Parts:
    """Seconds: of an image in encode, of an entry in teacher-cache, of a sample in distill and online."""

    encode: float
    teacher_cache: float
    distill: float
    online: float

    def ratio(self, rounds: int, visits: int, students: int) -> float:
        """How many times as long online training takes as the whole road."""
        samples = students * rounds * visits
        return samples * self.online / (self.encode + rounds * self.teacher_cache + samples * self.distill)


def stage_one(case: Case) -> tuple[float, float]:
    """Seconds of an image in encode and of an entry in teacher-cache, as `stage_one` times them."""
    common = {"teacher": str(case.teacher), "batch_size": case.batch_size, "device": case.device}
    latents, cache = case.work / "timed-latents", case.work / "timed-cache"
    for folder in (latents, cache):
        shutil.rmtree(folder, ignore_errors=True)
    encoding = EncodeSettings(data=str(case.work / "images"), out=latents, resolution=RESOLUTIONS[case.arch], **common)
    encoded = run_stage(encoding)
    caching = TeacherCacheSettings(
        latents=latents,
        out=cache,
        rounds=1,
        samples=0,
        students=(case.level,),
        **common,
    )
    cached = run_stage(caching)
    return encoded.seconds / encoded.entries, cached.seconds / cached.entries


def measure(case: Case) -> Parts:
    """One turn of all parts."""
    per_image, per_entry = in_process(stage_one, case)
    per_sample = {row: in_process(run, row, case).seconds / case.batch_size for row in ("cache", REFERENCE)}
    return Parts(per_image, per_entry, per_sample["cache"], per_sample[REFERENCE])


def table(turns: list[Parts], rounds: int) -> str:
    """Medians over the turns, of the parts and of each turn's ratios."""
    parts = [("encode, an image", "encode"), ("teacher-cache, an entry", "teacher_cache")]
    parts += [("distill, a sample", "distill"), ("online, a sample", "online")]
    lines = ["| part | seconds |", "|---|---|"]
    lines += [f"| {label} | {statistics.median(getattr(turn, name) for turn in turns):.3g} |" for label, name in parts]
    head = " | ".join(f"{visits} visit{'s' if visits > 1 else ''}" for visits in VISITS)
    lines += ["", f"| over online, {rounds} rounds | {head} |", "|---|" + "---|" * len(VISITS)]
    for students in STUDENTS:
        ratios = [statistics.median(turn.ratio(rounds, visits, students) for turn in turns) for visits in VISITS]
        label = f"{students} student{'s' if students > 1 else ''}"
        lines.append(f"| {label} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    return "\n".join(lines)


@click.command()
@click.option("--work", type=Path, required=True, help="Directory for the teacher, shards and students; emptied first.")
@click.option("--arch", type=click.Choice(list(RESOLUTIONS)), default="demo", show_default=True)
@click.option("--level", type=click.Choice(list(LEVELS)), default="sd_small", show_default=True)
@click.option("--rounds", default=8, show_default=True, help="Rounds of the cache, in the arithmetic.")
@click.option("--batch-size", default=16, show_default=True)
@click.option("--steps", default=20, show_default=True, help="Training steps that are timed.")
@click.option("--repeats", default=3, show_default=True, help="Turns of all parts.")
@click.option("--images", default=256, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto or cpu.")
@click.option("--mixed-precision", default="no", show_default=True, help="no, fp16 or bf16, of teacher and student.")
@click.option("--gradient-checkpointing/--no-gradient-checkpointing", default=False, show_default=True)
def main(
    work: Path,
    arch: str,
    level: str,
    rounds: int,
    batch_size: int,
    steps: int,
    repeats: int,
    images: int,
    device: str,
    mixed_precision: str,
    gradient_checkpointing: bool,
) -> None:
    shutil.rmtree(work, ignore_errors=True)
    case = Case(work, arch, level, batch_size, steps, device, mixed_precision, gradient_checkpointing, False, None)
    in_process(prepare, case, images)
    turns = [measure(case) for _ in range(repeats)]
    print(f"{machine(device)}; {arch}, precision {mixed_precision}, {level}, batches of {batch_size}\n")
    print(table(turns, rounds))


if __name__ == "__main__":
    main()

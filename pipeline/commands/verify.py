"""Checks latents or a cache, in three depths: what is there, what is in it, and whether the teacher agrees.

fast: manifest, sidecars, sizes, numbering -> full: every byte and every member -> recompute: entries, by the teacher.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from diffusers import DDPMScheduler
from tqdm import tqdm

from pipeline.cache.recompute import deviations, table
from pipeline.models.checksums import changed_files, has_checksums
from pipeline.models.families.sd import LEVELS
from pipeline.models.hashing import weights_sha256
from pipeline.models.load import MODEL_INDEX, find_pipeline, load_unet
from pipeline.system.command import stage_command
from pipeline.system.device import DTYPES, use_cpu
from pipeline.system.errors import UserError
from pipeline.system.options import DeviceOptions, HubOptions
from pipeline.system.settings import REQUIRED, option
from shards.expected import expected_tensors
from shards.manifest import STAGE_COMMANDS, Manifest, read_manifest
from shards.reader import ShardSet
from shards.schema import ShardError
from shards.survey import Problem, Survey, check_contents, remove_shard, survey


@dataclass(frozen=True, kw_only=True)
class VerifySettings(DeviceOptions, HubOptions):
    directory: Path = option(REQUIRED, "Directory that `encode` or `teacher-cache` wrote.", argument=True)
    full: bool = option(False, "Read every byte: checksums, and every member decoded.")
    recompute: int | None = option(None, "Entries to run the teacher on again, drawn at random.", ge=1)
    teacher: str | None = option(None, "The teacher of the cache, for --recompute: a folder, a hub's name, or demo.")
    seed: int = option(0, "Seed of the draw of --recompute.", ge=0)
    remove_damaged: bool = option(False, "Delete damaged shards, for the stage to write again.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.recompute is None) != (self.teacher is None):
            raise UserError("--recompute and --teacher go together: give the number of entries and the cache's teacher")


def run(settings: VerifySettings) -> None:
    """Check latents or a cache for damage: DIR is what `encode` or `teacher-cache` wrote.

    Every problem is one line with its remedy; the last line is a tally. Exit status 0 when all is fine, else 2.
    """
    directory = settings.directory
    try:
        manifest = read_manifest(directory)
    except ShardError as error:
        click.echo(Problem.of(error).message)
        raise UserError(f"1 problem in {directory}; without its manifest nothing else can be checked") from None
    if settings.recompute and manifest.spec["stage"] != "cache":
        raise UserError(f"--recompute needs a cache; {directory} holds {manifest.spec['stage']}")
    found = survey(directory, manifest)
    if manifest.spec["stage"] == "cache":
        found.problems += missing_parts(directory)
    if settings.full:
        total = sum(size.bytes for size in found.sizes.values())
        with tqdm(total=total, unit="B", unit_scale=True, desc="verify") as progress:
            check_contents(directory, manifest, found, progress.update)
        found.problems += changed_parts(directory)
    whole = not found.problems and not found.unfinished
    if settings.recompute and whole:
        found.problems += ask_the_teacher(settings)
    for problem in found.problems:
        click.echo(problem.message)
    if settings.recompute and not whole:
        click.echo("the teacher was not asked again: that needs a whole set")
    if settings.remove_damaged:
        remove_damaged(directory, manifest, found)
    conclude(settings, manifest, found)


def parts(directory: Path) -> list[Path]:
    """The folders of weights of a cache: base/ and each of students/."""
    students = directory / "students"
    levels = sorted(path for path in students.iterdir() if path.name in LEVELS) if students.is_dir() else []
    return [path for path in (directory / "base", *levels) if path.is_dir()]


def missing_parts(directory: Path) -> list[Problem]:
    """What a student needs beside the shards, and is not there."""
    remedy = "copy it from a whole cache, or delete the folder and run the same `distill-sd teacher-cache` again"
    levels = {*stated_levels(directory), *(folder.name for folder in parts(directory) if folder.name in LEVELS)}
    needed = [directory / "base" / MODEL_INDEX]
    for level in sorted(levels):
        folder = directory / "students" / level
        needed += [folder / "config.json", folder / "diffusion_pytorch_model.safetensors"]
    problems = [Problem(f"{path} is missing; {remedy}") for path in needed if not path.is_file()]
    if not levels:
        what = f"{directory / 'students'} holds no student's initial weights"
        problems.append(Problem(f"{what}; run the same `distill-sd teacher-cache` again"))
    return problems


def stated_levels(directory: Path) -> list[str]:
    """The levels that the cache's settings name; none when they are not there or cannot be read."""
    try:
        settings = json.loads((directory / "teacher-cache.json").read_text(encoding="utf-8"))
        return [level for level in settings["students"] if level in LEVELS]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def changed_parts(directory: Path) -> list[Problem]:
    """Files of base/ and students/ that are not as they were written."""
    remedy = "copy it from a whole cache, or delete its folder and run the same `distill-sd teacher-cache` again"
    return [Problem(f"{folder}: {what}; {remedy}") for folder in parts(directory) for what in changed_files(folder)]


def remove_damaged(directory: Path, manifest: Manifest, found: Survey) -> None:
    """Delete the damaged shards, and nothing else."""
    doomed = found.damaged_shards()
    for shard in doomed:
        remove_shard(directory, shard)
    if doomed:
        command = STAGE_COMMANDS[manifest.spec["stage"]]
        click.echo(f"removed {', '.join(doomed)}: run the same `distill-sd {command}` again to write them anew")


def ask_the_teacher(settings: VerifySettings) -> list[Problem]:
    """Run the teacher again on entries drawn at random; prints the table. A problem for each bound that is broken."""
    shards = ShardSet(settings.directory, "cache")
    spec = shards.manifest.spec
    folder = find_pipeline(settings.teacher, settings.revision, settings.variant)
    unet = load_unet(folder, settings.variant)
    if weights_sha256(unet) != spec["teacher_sha256"]:
        raise UserError(f"{settings.directory} was made with another U-Net than --teacher {settings.teacher} has")
    device = torch.device("cpu") if use_cpu(settings.device) else torch.accelerator.current_accelerator()
    unet.to(device, DTYPES[spec["dtype"]], memory_format=torch.channels_last).eval().requires_grad_(False)
    alphas_cumprod = DDPMScheduler.from_config(spec["noise_scheduler"]).alphas_cumprod.to(device)
    draw = np.random.Generator(np.random.Philox(key=settings.seed))
    chosen = sorted(draw.choice(len(shards), min(settings.recompute, len(shards)), replace=False).tolist())
    names = list(expected_tensors(spec))
    samples = (shards.read(index, names) for index in tqdm(chosen, unit="entry", desc="recompute"))
    rows = deviations(samples, spec, unet, alphas_cumprod)
    click.echo("\n".join(table(rows)))
    remedy = "do not train from it; write it anew with `distill-sd teacher-cache`"
    broken = [row for row in rows if row.share > 1]
    return [
        Problem(f"{settings.directory}: {row.name} is up to {row.largest:.3g} from what the teacher says; {remedy}")
        for row in broken
    ]


def conclude(settings: VerifySettings, manifest: Manifest, found: Survey) -> None:
    """The tally, as the last line; raises UserError unless all is fine."""
    directory, planned = settings.directory, manifest.shard_names()
    bad = set(found.damaged_shards())
    sound = [size for shard, size in found.sizes.items() if shard not in bad]
    entries, size = sum(s.entries for s in sound), sum(s.bytes for s in sound)
    rounds = f" ({manifest.rounds} rounds)" if manifest.rounds else ""
    held = f"{len(sound)} of {len(planned)} shards whole, {entries} entries{rounds}, {size / 1e6:.1f} MB"
    if found.unfinished:
        command = STAGE_COMMANDS[manifest.spec["stage"]]
        click.echo(
            f"{directory} is unfinished: {len(found.unfinished)} of {len(planned)} shards are still to be written, "
            f"the first {found.unfinished[0]}; run the same `distill-sd {command}` again to complete it"
        )
    unchecked = [] if not settings.full else [p.name for p in parts(directory) if not has_checksums(p)]
    if unchecked:
        click.echo(f"not checked, since an earlier version wrote them without checksums: {', '.join(unchecked)}")
    if found.problems:
        count = len(found.problems)
        raise UserError(f"{count} problem{'s' if count > 1 else ''} in {directory}; {held}, {len(bad)} damaged")
    if found.unfinished:
        raise UserError(f"no problem in {directory}, but it is unfinished; {held}")
    click.echo(f"{directory} is fine; {held}; checked: {depth(settings)}")


def depth(settings: VerifySettings) -> str:
    done = ["manifest, sidecars and sizes"]
    done += ["every byte and member"] if settings.full else []
    done += [f"{settings.recompute} entries by the teacher"] if settings.recompute else []
    return ", ".join(done)


command = stage_command("verify", VerifySettings, None, run)

if __name__ == "__main__":
    command()

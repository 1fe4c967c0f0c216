"""`distill-sd verify`: checks latents or a cache, at three depths.

fast: manifest, sidecars, sizes, numbering -> full: every byte and member -> recompute: entries, with the teacher.
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
from pipeline.models.families import LEVELS
from pipeline.models.hashing import weights_sha256
from pipeline.models.load import MODEL_INDEX, find_pipeline, load_unet
from pipeline.system.command import stage_command
from pipeline.system.device import DTYPES, process_state
from pipeline.system.errors import UserError
from pipeline.system.options import DeviceOptions, HubOptions
from pipeline.system.settings import REQUIRED, option
from shards.expected import expected_tensors
from shards.manifest import STAGE_COMMANDS, Manifest, read_manifest
from shards.reader import ShardSet
from shards.schema import ShardError
from shards.store import open_store
from shards.survey import Problem, Survey, check_contents, remove_shard, survey

REMEDY = "Copy it from an intact cache, or delete its folder and rerun the same `distill-sd teacher-cache`."


@dataclass(frozen=True, kw_only=True)
class VerifySettings(DeviceOptions, HubOptions):
    directory: Path = option(REQUIRED, "Directory that `encode` or `teacher-cache` wrote.", argument=True)
    full: bool = option(False, "Read every byte: check all checksums and decode every member.")
    recompute: int | None = option(None, "Number of random entries to run the teacher on again.", ge=1)
    teacher: str | None = option(None, "The cache's teacher, for --recompute: a folder, a name on the hub, or demo.")
    seed: int = option(0, "Seed for the entries of --recompute.", ge=0)
    remove_damaged: bool = option(False, "Delete damaged shards, so that the stage can write them again.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.recompute is None) != (self.teacher is None):
            raise UserError(
                "--recompute and --teacher go together. Pass the number of entries and the cache's teacher."
            )


def run(settings: VerifySettings) -> None:
    """Check latents or a cache for damage. DIR is what `encode` or `teacher-cache` wrote.

    Prints every problem as one line with its remedy, then a summary. Exits with status 0 if all is fine, else 2.
    """
    directory, store = settings.directory, open_store(settings.directory)
    try:
        manifest = read_manifest(store)
    except ShardError as error:
        click.echo(Problem.of(error).message)
        raise UserError(f"1 problem in {directory}. Nothing else can be checked without its manifest.") from None
    if settings.recompute and manifest.spec["stage"] != "cache":
        raise UserError(f"--recompute needs a cache, but {directory} holds {manifest.spec['stage']}")
    found = survey(store, manifest)
    if manifest.spec["stage"] == "cache":
        found.problems += missing_parts(directory)
    if settings.full:
        total = sum(size.bytes for size in found.sizes.values())
        with tqdm(total=total, unit="B", unit_scale=True, desc="verify") as progress:
            check_contents(store, manifest, found, progress.update)
        found.problems += changed_parts(directory)
    intact = not found.problems and not found.unfinished
    if settings.recompute and settings.teacher and intact:
        found.problems += recompute(settings, settings.recompute, settings.teacher)
    for problem in found.problems:
        click.echo(problem.message)
    if settings.recompute and not intact:
        click.echo("skipped --recompute: the cache is incomplete or damaged")
    if settings.remove_damaged:
        remove_damaged(directory, manifest, found)
    conclude(settings, manifest, found)


def parts(directory: Path) -> list[Path]:
    """The folders of weights in a cache: base/ and each of students/."""
    students = directory / "students"
    levels = sorted(path for path in students.iterdir() if path.name in LEVELS) if students.is_dir() else []
    return [path for path in (directory / "base", *levels) if path.is_dir()]


def missing_parts(directory: Path) -> list[Problem]:
    """What a student needs besides the shards and does not find."""
    levels = {*stated_levels(directory), *(folder.name for folder in parts(directory) if folder.name in LEVELS)}
    needed = [directory / "base" / MODEL_INDEX]
    for level in sorted(levels):
        folder = directory / "students" / level
        needed += [folder / "config.json", folder / "diffusion_pytorch_model.safetensors"]
    problems = [Problem(f"{path} is missing. {REMEDY}") for path in needed if not path.is_file()]
    if not levels:
        what = f"{directory / 'students'} holds no student's initial weights"
        problems.append(Problem(f"{what}. Rerun the same `distill-sd teacher-cache`."))
    return problems


def stated_levels(directory: Path) -> list[str]:
    """The levels in the cache's settings; none if they cannot be read."""
    try:
        settings = json.loads((directory / "teacher-cache.json").read_text(encoding="utf-8"))
        return [level for level in settings["students"] if level in LEVELS]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def changed_parts(directory: Path) -> list[Problem]:
    """Files of base/ and students/ that were changed since they were written."""
    folders = parts(directory)
    return [Problem(f"{folder}: {change}. {REMEDY}") for folder in folders for change in changed_files(folder)]


def remove_damaged(directory: Path, manifest: Manifest, found: Survey) -> None:
    """Delete the damaged shards, and nothing else."""
    damaged, store = found.damaged_shards(), open_store(directory)
    for shard in damaged:
        remove_shard(store, shard)
    if damaged:
        command = STAGE_COMMANDS[manifest.spec["stage"]]
        click.echo(f"removed {', '.join(damaged)}. Rerun the same `distill-sd {command}` to write them again.")


def recompute(settings: VerifySettings, count: int, teacher: str) -> list[Problem]:
    """Run the teacher again on random entries and print the table. A problem for each broken bound."""
    shards = ShardSet(open_store(settings.directory), "cache")
    spec = shards.manifest.spec
    folder = find_pipeline(teacher, settings.revision, settings.variant)
    unet = load_unet(folder, settings.variant)
    if weights_sha256(unet) != spec["teacher_sha256"]:
        raise UserError(f"{settings.directory} was made with another U-Net than the one of --teacher {teacher}")
    device = process_state(settings.device).device
    unet.to(device, DTYPES[spec["dtype"]], memory_format=torch.channels_last).eval().requires_grad_(False)
    alphas_cumprod = DDPMScheduler.from_config(spec["noise_scheduler"]).alphas_cumprod.to(device)
    generator = np.random.Generator(np.random.Philox(key=settings.seed))
    chosen = sorted(generator.choice(len(shards), min(count, len(shards)), replace=False).tolist())
    names = list(expected_tensors(spec))
    entries = (shards.read(index, names) for index in tqdm(chosen, unit="entry", desc="recompute"))
    rows = deviations(entries, spec, unet, alphas_cumprod)
    click.echo("\n".join(table(rows)))
    return [
        Problem(
            f"{settings.directory}: {row.name} differs from the teacher's output by up to {row.largest:.3g}, which is "
            "more than the codec allows. Do not train on this cache. Regenerate it with `distill-sd teacher-cache`."
        )
        for row in rows
        if row.share > 1
    ]


def conclude(settings: VerifySettings, manifest: Manifest, found: Survey) -> None:
    """Print the summary as the last line. Raises UserError unless all is fine."""
    directory, planned = settings.directory, len(manifest.plan)
    damaged = set(found.damaged_shards())
    sound = [size for shard, size in found.sizes.items() if shard not in damaged]
    entries, size = sum(s.entries for s in sound), sum(s.bytes for s in sound)
    rounds = f" ({manifest.rounds} rounds)" if manifest.rounds else ""
    held = f"{len(sound)} of {planned} shards intact, {entries} entries{rounds}, {size / 1e6:.1f} MB"
    if found.unfinished:
        command = STAGE_COMMANDS[manifest.spec["stage"]]
        click.echo(
            f"{directory} is unfinished: {len(found.unfinished)} of {planned} shards are still to be written, the "
            f"first is {found.unfinished[0]}. Rerun the same `distill-sd {command}` to complete it."
        )
    unchecked = [] if not settings.full else [p.name for p in parts(directory) if not has_checksums(p)]
    if unchecked:
        click.echo(f"not checked, because an earlier version wrote no checksums for them: {', '.join(unchecked)}")
    if found.problems:
        count = len(found.problems)
        raise UserError(f"{count} problem{'s' if count > 1 else ''} in {directory}; {held}, {len(damaged)} damaged")
    if found.unfinished:
        raise UserError(f"no problem in {directory}, but it is unfinished; {held}")
    click.echo(f"{directory} is fine; {held}; checked: {depth(settings)}")


def depth(settings: VerifySettings) -> str:
    done = ["manifest, sidecars and sizes"]
    done += ["every byte and member"] if settings.full else []
    done += [f"{settings.recompute} entries with the teacher"] if settings.recompute else []
    return ", ".join(done)


command = stage_command("verify", VerifySettings, None, run)

if __name__ == "__main__":
    command()

"""`distill-sd plan`: what a cache will take, from the teacher's configs alone, and what fits in a budget."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from pipeline.cache import sizes
from pipeline.cache.settings import CacheFormat, sampling_lines
from pipeline.cache.trial import try_teacher
from pipeline.evaluation.training_cost import TrainingCost, training_cost
from pipeline.models.load import family_of, find_pipeline, load_unet
from pipeline.models.shapes import TeacherShapes, teacher_shapes
from pipeline.models.students import teacher_taps
from pipeline.system.command import stage_command
from pipeline.system.device import DTYPES, device_name, process_state, resolve_dtype
from pipeline.system.disk import format_bytes, free_bytes
from pipeline.system.echo import say
from pipeline.system.errors import UserError
from pipeline.system.options import HubOptions, PrecisionOptions
from pipeline.system.settings import REQUIRED, option
from shards.codec import MAX_SNR_DB

# Bytes by unit: B, KB, MB, ... and KIB, MIB, ...
UNITS = {"B": 1} | {
    prefix + ending: base**power
    for power, prefix in enumerate("KMGTP", 1)
    for ending, base in (("B", 1000), ("IB", 1024))
}
PERIODS = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))
# (decibels, stride), from the most exact on. The next one is tried if the requested rounds do not fit.
LADDER = ((10.0, 4), (5.0, 4), (0.0, 4))
VISITS = {1: "one visit", 2: "two", 4: "four"}
# After so many rounds, an image has been seen at each timestep of the usual schedule.
MOST_ROUNDS = 1000


def help_of(name: str) -> str:
    """The help of one of the options that decide the size of an entry."""
    return next(setting.metadata["help"] for setting in fields(CacheFormat) if setting.name == name)


@dataclass(frozen=True, kw_only=True)
class PlanSettings(CacheFormat, PrecisionOptions, HubOptions):
    teacher: str = option(REQUIRED, "The teacher: a folder (its configs are enough), a name on the hub, or demo.")
    images: int = option(REQUIRED, "Images to train on.", ge=1)
    rounds: int = option(4, "Passes over the images; with a budget, the minimum to aim for.", ge=1)
    resolution: int = option(512, "Side of the images, in pixels.", ge=8)
    budget: str | None = option(
        None,
        "Bytes for latents and cache, such as 500GB; chooses rounds, and decibels and stride if they are not given.",
    )
    snr_db: float | None = option(  # type: ignore[assignment]
        None, f"{help_of('snr_db')} Default: {LADDER[0][0]:g}, or less to fit a budget.", ge=-10.0, le=MAX_SNR_DB
    )
    token_stride: int | None = option(  # type: ignore[assignment]
        None, f"{help_of('token_stride')} Default: {LADDER[0][1]}.", ge=1
    )
    trial: bool = option(
        False, "Run the teacher on a few batches on this machine to estimate the time; needs its weights."
    )
    batch_size: int = option(8, "Entries per forward pass of the trial.", ge=1)
    out: Path = option(Path("."), "Where the cache would go, to show its free space.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None:
            bytes_of(self.budget)
            if self.codec != "dither":
                raise UserError(f"--budget chooses the decibels of the dither codec. Drop --codec {self.codec}.")

    def at(self, snr_db: float, token_stride: int) -> PlanSettings:
        """The settings with these values where none are given."""
        return replace(
            self,
            snr_db=snr_db if self.snr_db is None else self.snr_db,
            token_stride=token_stride if self.token_stride is None else self.token_stride,
        )


@dataclass(frozen=True)
class Cost:
    """Bytes on disk: of an image's latents, and of an entry of the cache, per member."""

    latents: int
    entry: dict[str, int]

    def total(self, images: int, rounds: int) -> int:
        return images * (self.latents + rounds * sizes.stored_bytes(self.entry))


def bytes_of(size: str) -> int:
    """'500GB' -> 500,000,000,000. Raises UserError if it is not a size."""
    matched = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Z]+)", size.strip().upper())
    if not matched or matched[2] not in UNITS:
        raise UserError(f"--budget {size!r} is not a size. Write it as 500GB or 1.5TB.")
    return int(float(matched[1]) * UNITS[matched[2]])


def cost_of(settings: PlanSettings, shapes: TeacherShapes) -> Cost:
    settings = settings.at(*LADDER[0])
    assert settings.snr_db is not None
    taps = settings.tap_specs(shapes.taps)
    entry = sizes.cache_entry(shapes.latents, shapes.conditioning, taps, settings.codec, settings.snr_db)
    return Cost(sizes.stored_bytes(sizes.latents_entry(shapes.latents, shapes.conditioning)), entry)


def fit(settings: PlanSettings, shapes: TeacherShapes) -> PlanSettings:
    """The settings that fill the budget: the most exact of LADDER at which the rounds fit, with as many as fit.

    What the settings give is kept. Many small entries teach more than a few exact ones, so the rest of the budget goes
    into further rounds, up to MOST_ROUNDS. If the rounds fit at none, the least exact is used with as many rounds as
    fit. Raises UserError if not even one fits.
    """
    assert settings.budget is not None
    available = bytes_of(settings.budget)
    for snr_db, stride in LADDER:
        candidate = settings.at(snr_db, stride)
        cost = cost_of(candidate, shapes)
        rounds = (available // settings.images - cost.latents) // sizes.stored_bytes(cost.entry)
        if rounds >= settings.rounds:
            break
    if rounds < 1:
        raise UserError(
            f"--budget {settings.budget} is less than one round of {settings.images} images, which takes "
            f"{format_bytes(cost.total(settings.images, 1))}. Use fewer --images or a larger budget."
        )
    return replace(candidate, rounds=min(rounds, max(MOST_ROUNDS, settings.rounds)))


def plan(settings: PlanSettings) -> list[str]:
    """The lines of the plan."""
    folder = find_pipeline(settings.teacher, settings.revision, settings.variant)
    shapes = teacher_shapes(folder, settings.resolution, teacher_taps(settings.students))
    chosen = fit(settings, shapes) if settings.budget else settings.at(*LADDER[0])
    cost = cost_of(chosen, shapes)
    entries = chosen.images * chosen.rounds
    flags = f"--rounds {chosen.rounds} --snr-db {chosen.snr_db:g} --token-stride {chosen.token_stride}"
    return [
        *([f"chosen for {settings.budget}: teacher-cache {flags}"] if settings.budget else []),
        f"entries: {chosen.images} images x {chosen.rounds} rounds = {entries}",
        *sizes.lines(cost.entry, entries),
        *sampling_lines(chosen.tap_specs(shapes.taps)),
        f"latents: {cost.latents:,} bytes per image, {format_bytes(chosen.images * cost.latents)}",
        f"latents and cache: {format_bytes(cost.total(chosen.images, chosen.rounds))}; "
        f"{format_bytes(free_bytes(chosen.out))} are free in {chosen.out}",
        f"teacher forward passes: {entries}",
        *training_lines(training_cost(folder, chosen.resolution, shapes, chosen.students), chosen),
        *([time_of(chosen, folder, shapes, entries)] if chosen.trial else []),
    ]


def training_lines(cost: TrainingCost, settings: PlanSettings) -> list[str]:
    """Both stages beside online training, by arithmetic."""
    students = " and ".join(settings.students)
    shares = [f"{cost.share_of_online(settings.rounds, visits):.2f} with {word}" for visits, word in VISITS.items()]
    samples = cost.break_even(settings.images, settings.rounds)
    return [
        f"training {students}: {', '.join(shares)} to each entry, as a share of online training's arithmetic",
        f"break-even: online training takes more than both stages from {samples} samples per student on",
    ]


def time_of(settings: PlanSettings, folder: Path, shapes: TeacherShapes, entries: int) -> str:
    """The time that so many entries take, estimated by a trial on this machine."""
    assert settings.snr_db is not None
    device = process_state(settings.device).device
    dtype = DTYPES[resolve_dtype(settings.dtype, device)]
    unet = load_unet(folder, settings.variant).to(device, dtype, memory_format=torch.channels_last).eval()
    taps = settings.tap_specs(shapes.taps)
    trial = try_teacher(unet, family_of(folder), shapes, taps, settings.codec, settings.snr_db, settings.batch_size)
    rate = 1 / trial.seconds(1)
    return (
        f"time: about {format_duration(trial.seconds(entries))} at {rate:.3g} entries per second, measured with one "
        f"process on {device_name(device)} in batches of {settings.batch_size}"
    )


def format_duration(seconds: float) -> str:
    """45 -> '45 seconds'; 5000 -> '1.4 hours'."""
    name, length = next((n, s) for n, s in PERIODS if seconds >= 2 * s or s == 1)
    return f"{seconds / length:.3g} {name}"


def run(settings: PlanSettings) -> None:
    """Estimate what a cache will take: entries, bytes per member, forward passes; with --budget, what fits."""
    say("\n".join(plan(settings)))


command = stage_command("plan", PlanSettings, plan, run)

if __name__ == "__main__":
    command()

"""`distill-sd plan`: what a cache will take, from the teacher's configs alone, and what fits in a budget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipeline.cache import sizes
from pipeline.cache.taps import sampling_lines, tap_specs
from pipeline.cache.trial import try_teacher
from pipeline.core.buckets import bucket_sizes
from pipeline.evaluation.training_cost import TrainingCost, training_cost
from pipeline.models.load import family_of, find_pipeline, load_unet
from pipeline.models.shapes import TeacherShapes, checked_unet_config, teacher_shapes
from pipeline.models.students import levels_of, refuse_foreign
from pipeline.models.tap_pairs import taps_of_teacher
from pipeline.settings.plan import LADDER, PlanSettings, bytes_of
from pipeline.system.device import DTYPES, device_name, process_state, resolve_dtype
from pipeline.system.disk import format_bytes, free_bytes
from pipeline.system.echo import format_duration, plural, say
from pipeline.system.errors import UserError

# How often a student uses each entry.
USES = {1: "if each entry is used once", 2: "if twice", 4: "if four times"}
# After so many rounds, an image has been seen at each timestep of the usual schedule.
MOST_ROUNDS = 1000


@dataclass(frozen=True)
class Cost:
    """Bytes on disk: of an image's latents, and of an entry of the cache, per member."""

    latents: int
    entry: dict[str, int]

    def total(self, images: int, rounds: int) -> int:
        return images * (self.latents + rounds * sizes.stored_bytes(self.entry))


def cost_of(settings: PlanSettings, shapes: TeacherShapes) -> Cost:
    settings = settings.at(*LADDER[0])
    assert settings.snr_db is not None
    taps = tap_specs(settings, shapes.taps)
    entry = sizes.cache_entry(shapes.latents, taps, settings.codec, settings.snr_db)
    latents = sizes.latents_entry(shapes.latents, shapes.conditioning, shapes.dtypes)
    return Cost(sizes.stored_bytes(latents), entry)


def fit(settings: PlanSettings, shapes: TeacherShapes) -> tuple[PlanSettings, str]:
    """The settings that fill the budget, and why: the most exact of LADDER at which the rounds fit.

    What the settings give is kept. Many small entries teach more than a few exact ones, so the rest of the budget goes
    into further rounds, up to MOST_ROUNDS. If the rounds fit at none, the least exact is used with as many rounds as
    fit. Raises UserError if not even one fits.
    """
    assert settings.budget is not None
    available = bytes_of(settings.budget)
    tried: dict[str, int] = {}
    for snr_db, tokens in LADDER:
        candidate = settings.at(snr_db, tokens)
        cost = cost_of(candidate, shapes)
        tried[exactness(candidate)] = cost.total(settings.images, settings.rounds)
        rounds = (available // settings.images - cost.latents) // sizes.stored_bytes(cost.entry)
        if rounds >= settings.rounds:
            break
    if rounds < 1:
        raise UserError(
            f"--budget {settings.budget} is less than one round of {plural(settings.images, 'image')}, which takes "
            f"{format_bytes(cost.total(settings.images, 1))}. Use fewer --images or a larger budget."
        )
    chosen = replace(candidate, rounds=min(rounds, max(MOST_ROUNDS, settings.rounds)))
    wanted = plural(settings.rounds, "round")
    takes = "; ".join(f"{format_bytes(size)} at {exact}" for exact, size in tried.items())
    last = "what is left goes into further rounds" if rounds >= settings.rounds else "so there are fewer rounds"
    return chosen, f"{wanted} {'takes' if settings.rounds == 1 else 'take'} {takes}; {last}"


def exactness(settings: PlanSettings) -> str:
    """The options that decide how exact an entry is, in words."""
    tokens = f"{settings.tokens} tokens" if settings.tokens else "all tokens"
    return f"{settings.snr_db:g} dB and {tokens}"


def plan(settings: PlanSettings) -> list[str]:
    """The lines of the plan."""
    folder = find_pipeline(settings.teacher, settings.revision, settings.variant)
    levels = levels_of(settings.students, family_of(folder))
    refuse_foreign(levels, family_of(folder), f"--teacher {settings.teacher}")
    taps = taps_of_teacher(checked_unet_config(folder), levels, settings.taps)
    shapes = teacher_shapes(folder, settings.resolution, taps)
    chosen, why = fit(settings, shapes) if settings.budget else (settings.at(*LADDER[0]), "")
    cost = cost_of(chosen, shapes)
    entries = chosen.images * chosen.rounds
    flags = f"--rounds {chosen.rounds} --snr-db {chosen.snr_db:g} --tokens {chosen.tokens}"
    return [
        *([f"options that fill {settings.budget}: teacher-cache {flags}", f"why: {why}"] if why else []),
        f"entries: {plural(chosen.images, 'image')} x {plural(chosen.rounds, 'round')} = {entries}",
        *sizes.lines([sizes.Planned("", entries, cost.entry)]),
        *sampling_lines(tap_specs(chosen, shapes.taps)),
        f"latents: {cost.latents:,} bytes per image, {format_bytes(chosen.images * cost.latents)}",
        *(bucket_lines(chosen, folder, taps) if chosen.buckets else []),
        f"latents and cache: {format_bytes(cost.total(chosen.images, chosen.rounds))}; "
        f"the disk of {chosen.out} has {format_bytes(free_bytes(chosen.out))} free",
        f"teacher forward passes: {entries}",
        *training_lines(training_cost(folder, chosen.resolution, shapes, levels), chosen, levels),
        *([time_of(chosen, folder, shapes, entries)] if chosen.trial else []),
    ]


def bucket_lines(settings: PlanSettings, folder: Path, taps: list[str]) -> list[str]:
    """What an image and an entry of each bucket take. How many each has, only the images tell."""
    lines = ["of each bucket, about:"]
    for height, width in bucket_sizes(settings.resolution):
        cost = cost_of(settings, teacher_shapes(folder, height, taps, width))
        entry = sizes.stored_bytes(cost.entry)
        lines.append(f"  {width} x {height} px: {cost.latents:,} bytes per image, {entry:,} per entry")
    return lines


def training_lines(cost: TrainingCost, settings: PlanSettings, levels: tuple[str, ...]) -> list[str]:
    """Both stages beside online training, by arithmetic."""
    students = " and ".join(levels)
    shares = [f"{cost.share_of_online(settings.rounds, uses):.2f} {often}" for uses, often in USES.items()]
    samples = cost.break_even(settings.images, settings.rounds)
    return [
        f"arithmetic of both stages for {students}, where online training is 1: {', '.join(shares)}",
        f"the cache pays off when each student trains on more than {samples} samples",
    ]


def time_of(settings: PlanSettings, folder: Path, shapes: TeacherShapes, entries: int) -> str:
    """The time that so many entries take, estimated by a trial on this machine."""
    assert settings.snr_db is not None
    device = process_state(settings.device).device
    dtype = DTYPES[resolve_dtype(settings.dtype, device)]
    unet = load_unet(folder, settings.variant, as_stored=True)
    unet.to(device, dtype, memory_format=torch.channels_last).eval()
    taps = tap_specs(settings, shapes.taps)
    trial = try_teacher(unet, family_of(folder), shapes, taps, settings.codec, settings.snr_db, settings.batch_size)
    rate = 1 / trial.seconds(1)
    return (
        f"time: about {format_duration(trial.seconds(entries))} at {rate:.3g} entries per second, measured with one "
        f"process on {device_name(device)} in batches of {settings.batch_size}"
    )


def run(settings: PlanSettings) -> None:
    """Estimate what a cache will take: entries, bytes per member, forward passes; with --budget, what fits."""
    say("\n".join(plan(settings)))

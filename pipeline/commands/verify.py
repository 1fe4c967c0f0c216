"""`distill-sd verify`: checks latents or a cache, at three depths.

fast: manifest, sidecars, sizes, numbering -> full: every byte and member -> recompute: entries, with the teacher.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from tqdm import tqdm

from pipeline.cache.latents import manifest_at
from pipeline.cache.parts import (
    BASE,
    REMEDY,
    STUDENTS,
    bound_parts,
    changes,
    existing_parts,
    is_bound,
    student_part,
)
from pipeline.cache.readers import rolling_lines
from pipeline.cache.recompute import deviations, table
from pipeline.cache.remote_parts import changes_at, parts_of, take_file
from pipeline.models.checksums import has_checksums
from pipeline.models.hashing import config_of, stated_once, weights_sha256
from pipeline.models.levels import LEVELS
from pipeline.models.load import MODEL_INDEX, find_pipeline, load_unet
from pipeline.models.provenance import ORIGIN, read_origin
from pipeline.sampling.teacher_samples import take_samples, teacher_samples
from pipeline.settings.verify import VerifySettings
from pipeline.system.device import DTYPES, process_state
from pipeline.system.disk import format_bytes
from pipeline.system.echo import plural, say
from pipeline.system.errors import UserError
from pipeline.system.lock import OutputLock
from shards.cache import Cache
from shards.location import Location, Url
from shards.manifest import Manifest, difference, read_manifest
from shards.readers import rounds_there
from shards.schema import ShardError
from shards.store import Store, at_once, open_store
from shards.survey import Problem, Survey, check_contents, remove_shard, survey, survey_images, unreadable


def run(settings: VerifySettings) -> None:
    """Check latents or a cache for damage. DIR is what `encode` or `teacher-cache` wrote.

    Prints every problem as one line with its remedy, then a summary. Exits with status 0 if there is none, else 2.
    """
    directory, store = settings.directory, open_store(settings.directory)
    if isinstance(directory, Path) and not directory.is_dir():
        raise UserError(
            f"{directory} {'is not a directory' if directory.exists() else 'does not exist'}. Check the path."
        )
    try:
        manifest = manifest_at(directory)
    except ShardError as error:
        say(Problem.of(error).message)
        raise UserError(f"1 problem in {directory}. Nothing else can be checked without its manifest.") from None
    if settings.recompute and not manifest.is_cache:
        raise UserError(f"--recompute needs a cache, but {directory} holds {manifest.spec['stage']}")
    if settings.remove_damaged and manifest.in_cache:
        raise UserError(
            f"--remove-damaged: {directory} holds the images of a cache, which may be the only ones. Move damaged "
            "files away yourself."
        )
    if settings.remove_damaged and manifest.is_cache and manifest.version == 1:
        raise UserError(f"--remove-damaged: {directory} is a cache of format 1, whose shards are not written again.")
    if isinstance(directory, Url):
        check(settings, store, manifest)
        return
    with OutputLock(directory) as lock:
        if settings.remove_damaged:
            lock.take()
        check(settings, store, manifest)


def check(settings: VerifySettings, store: Store, manifest: Manifest) -> None:
    """Print what is wrong, remove what is to be removed, and conclude."""
    directory = settings.directory
    found = survey(store, manifest)
    images = None if manifest.has_own_images else survey_images(store, manifest, found)
    sets = [found] if images is None else [found, images]
    if manifest.is_cache:
        parts = parts_of(directory)
        found.problems += missing_parts(store, parts)
        found.problems += changed_parts(directory, manifest, parts, settings.full) + bad_small_files(directory)
    if settings.full:
        total = sum(size.bytes for each in sets for size in each.sizes.values())
        with tqdm(total=total, unit="B", unit_scale=True, desc="verify") as progress:
            for each in sets:
                check_contents(each, progress.update)
    intact = not any(each.problems or lacks_shards(each) for each in sets)
    if settings.recompute and settings.teacher and intact:
        found.problems += recompute(settings, settings.recompute, settings.teacher)
    # The images are kept: their latents may be gone, and the other entries of a shard are still of use.
    removed = found.damaged_shards() if settings.remove_damaged else []
    for shard in removed:
        remove_shard(store, shard, manifest)
    for problem in [problem for each in sets for problem in each.problems]:
        done = problem.damaged and problem.shard in removed
        say(problem.message.replace(manifest.rewrite, "It was removed.") if done else problem.message)
    if settings.recompute and not intact:
        say("skipped --recompute: the cache is incomplete or damaged")
    if removed:
        say(f"removed {', '.join(removed)}. Rerun the same `distill-sd {manifest.command}` to write them again.")
    conclude(settings, manifest, found, images)


def missing_parts(store: Store, parts: list[str]) -> list[Problem]:
    """What a student needs besides the shards and does not find; `parts` are the folders that exist."""
    levels = {*stated_levels(store), *(part.rpartition("/")[2] for part in parts if part != BASE)}
    needed = [f"{BASE}/{MODEL_INDEX}"]
    for level in sorted(levels):
        needed += [f"{student_part(level)}/{name}" for name in ("config.json", "diffusion_pytorch_model.safetensors")]
    found = zip(needed, at_once(store, store.exists, needed), strict=True)
    problems = [Problem(f"{store}/{name} is missing. {REMEDY}") for name, exists in found if not exists]
    if not levels:
        what = f"{store}/{STUDENTS} holds no student's initial weights"
        problems.append(Problem(f"{what}. Rerun the same `distill-sd teacher-cache`."))
    return problems


def stated_levels(store: Store) -> list[str]:
    """The levels in the cache's settings; none if they cannot be read."""
    try:
        settings = json.loads(store.read("teacher-cache.json").decode("utf-8"))
        return [level for level in settings["students"] if level in LEVELS]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def changed_parts(directory: Location, manifest: Manifest, parts: list[str], contents: bool) -> list[Problem]:
    """What was changed in base/ and students/ since they were written; see `changes`."""
    problems = []
    for part in sorted({*parts, *bound_parts(manifest)}):
        if isinstance(directory, Url):
            store = open_store(directory)
            problems += [Problem(change) for change in changes_at(store, manifest, part, contents=contents)]
            continue
        try:
            found = changes(directory, manifest, part, contents=contents)
        except OSError as error:
            problems.append(Problem.of(unreadable(str(directory / part), error)))
        else:
            problems += [Problem(f"{directory / part}: {change}. {REMEDY}") for change in found]
    return problems


def bad_small_files(directory: Location) -> list[Problem]:
    """What is wrong with origin.json and samples/. Those at an address are looked at in a copy."""
    problems = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = directory if isinstance(directory, Path) else Path(temporary)
        if isinstance(directory, Url):
            take_file(open_store(directory), ORIGIN, folder)
            take_samples(open_store(directory), folder)
        for check_file in (read_origin, teacher_samples):
            try:
                check_file(folder)
            except UserError as error:
                problems.append(Problem.of(UserError(str(error).replace(str(folder), str(directory)))))
    return problems


def recompute(settings: VerifySettings, count: int, teacher: str) -> list[Problem]:
    """Run the teacher again on random entries and print the table. A problem for each broken bound."""
    store = open_store(settings.directory)
    rolling = read_manifest(store, "cache").window is not None
    cache = Cache(store, rolling=rolling)
    spec = cache.manifest.spec
    there = entries_there(cache) if rolling else np.arange(len(cache))
    folder = find_pipeline(teacher, settings.revision, settings.variant)
    unet = load_unet(folder, settings.variant, as_stored=True)
    if weights_sha256(unet, torch.float32) != spec["teacher_sha256"]:
        raise UserError(f"{settings.directory} was made with another U-Net than the one of --teacher {teacher}")
    found = config_of(unet)
    made_with = stated_once(spec.get("teacher_config", found))
    keys = [line.split(":")[0] for line in difference(made_with, stated_once(found))]
    if keys:
        raise UserError(
            f"{settings.directory} was made with another unet/config.json than that of --teacher {teacher}: they "
            f"differ in {', '.join(keys)}. Restore the config that the cache was made with."
        )
    device = process_state(settings.device).device
    unet.to(device, DTYPES[spec["dtype"]], memory_format=torch.channels_last).eval().requires_grad_(False)
    alphas_cumprod = DDPMScheduler.from_config(spec["noise_scheduler"]).alphas_cumprod.to(device)
    generator = np.random.Generator(np.random.Philox(key=settings.seed))
    chosen = sorted(generator.choice(there, min(count, len(there)), replace=False).tolist())
    progress = tqdm(chosen, unit="entry", desc="recompute")
    entries = at_once(cache.store, lambda index: cache.read(index, cache.tensors), progress)
    rows = deviations(entries, cache.manifest, cache.calibrations(), unet, alphas_cumprod)
    say("\n".join(table(rows)))
    return [
        Problem(
            f"{settings.directory}: {row.name} differs from the teacher's output by up to {row.largest:.3g}, which is "
            "more than storing it explains. Do not train on this cache. Make it again with `distill-sd teacher-cache`."
        )
        for row in rows
        if row.share > 1
    ]


def conclude(settings: VerifySettings, manifest: Manifest, found: Survey, images: Survey | None) -> None:
    """Print the summary as the last line. Raises UserError if there is a problem or anything left to write."""
    directory, planned = settings.directory, len(manifest.plan)
    intact = found.intact()
    entries, size = sum(s.entries for s in intact), sum(s.bytes for s in intact)
    rounds = f" ({plural(manifest.rounds, 'round')})" if manifest.rounds else ""
    held = f"{len(intact)} of {plural(planned, 'shard')} intact, {plural(entries, 'entry', 'entries')}{rounds}, "
    held += format_bytes(size)
    if manifest.window is not None:
        tell_rounds(found)
    if lacks_shards(found):
        say(
            f"{directory} is unfinished. Still to be written: {len(found.unfinished)} of {plural(planned, 'shard')}, "
            f"from {found.unfinished[0]} on. Rerun the same `distill-sd {manifest.command}` to complete it."
        )
    if manifest.is_cache and isinstance(directory, Path):
        tell_unchecked(directory, manifest)
    of_images = images.problems if images else []
    if images and images.unfinished:
        say(
            f"{images.store} lacks {plural(len(images.unfinished), 'shard')}, from {images.unfinished[0]} on. Rerun "
            "`distill-sd teacher-cache` with the latents that the cache was made from."
        )
    if found.problems or of_images:
        damaged = len(found.damaged_shards()) + (len(images.damaged_shards()) if images else 0)
        problems = plural(len(found.problems) + len(of_images), "problem")
        raise UserError(f"{problems} in {directory}; {held}, {damaged} damaged")
    if lacks_shards(found) or (images and images.unfinished):
        raise UserError(f"{directory} is unfinished; {held}; no problem in what is there")
    say(f"{directory}: no damage found; {held}; checked: {depth(settings, entries)}")


def lacks_shards(found: Survey) -> bool:
    """Whether shards are missing that belong there. Of a rolling cache nobody knows."""
    return bool(found.unfinished) and found.manifest.window is None


def tell_rounds(found: Survey) -> None:
    """Print which rounds of a rolling cache are there, complete or in part, and how far its readers have come."""
    lines = rolling_lines(found.store, found.manifest, set(found.sizes))
    say("\n".join([f"{found.store} is a rolling cache:", *(f"  {line}" for line in lines)]))


def entries_there(cache: Cache) -> np.ndarray:
    """The numbers of the entries that a rolling cache has in complete rounds."""
    in_round = len(cache) // (cache.manifest.rounds or 1)
    rounds = sorted(rounds_there(cache.store, cache.manifest.plan.in_round))
    return np.concatenate([np.arange(r * in_round, (r + 1) * in_round) for r in rounds] or [np.arange(0)])


def tell_unchecked(directory: Path, manifest: Manifest) -> None:
    """Print which folders of weights an earlier version wrote without what they could be compared with."""
    existing = existing_parts(directory)
    unlisted = [part for part in existing if not has_checksums(directory / part) and not is_bound(manifest, part)]
    if unlisted:
        names = ", ".join(part.rpartition("/")[2] for part in unlisted)
        say(f"not checked, because an earlier version wrote no checksums for them: {names}")
    foreign = [part for part in existing if part not in unlisted and not is_bound(manifest, part)]
    if foreign:
        say(f"not checked to belong to this cache, because an earlier version did not record it: {', '.join(foreign)}")


def depth(settings: VerifySettings, entries: int) -> str:
    """What was checked of so many entries, and how to check more."""
    done = ["names, sizes and numbering of the files"]
    done += ["checksums and contents of all shards"] if settings.full else []
    if settings.recompute:
        done.append(f"{plural(min(settings.recompute, entries), 'entry', 'entries')} with the teacher")
    return ", ".join(done) + ("" if settings.full else "; the contents with --full")

"""base/ and students/ of a cache, written once from the teacher."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from pipeline.cache.parts import BASE, existing_parts, student_part
from pipeline.cache.remote_parts import parts_of, put_folder
from pipeline.models.checksums import CHECKSUMS, write_checksums
from pipeline.models.load import family_of
from pipeline.models.save import save_base
from pipeline.models.students import initialised_student, levels_of
from pipeline.models.weights import network_bytes
from pipeline.settings.teacher_cache import TeacherCacheSettings
from pipeline.system.echo import say_wait
from pipeline.system.errors import UserError
from shards.files import atomic_directory
from shards.store import open_store


def save_students(
    settings: TeacherCacheSettings, folder: Path, unet: UNet2DConditionModel, noise_scheduler: DDPMScheduler
) -> list[str]:
    """Write base/ and students/<level>/ to the cache, each with its checksums, unless they exist.

    Returns the names of the folders that were written.
    """
    out = settings.out
    if isinstance(out, Path):
        return save_parts(settings, out, existing_parts(out), folder, unet, noise_scheduler)
    with tempfile.TemporaryDirectory(prefix="distill-sd-") as temporary:
        saved = save_parts(settings, Path(temporary), parts_of(out), folder, unet, noise_scheduler)
        for part in saved:
            put_folder(open_store(out), part, Path(temporary) / part, last=CHECKSUMS)
    return saved


def save_parts(
    settings: TeacherCacheSettings,
    out: Path,
    existing: list[str],
    folder: Path,
    unet: UNet2DConditionModel,
    noise_scheduler: DDPMScheduler,
) -> list[str]:
    """Write the folders of weights to `out` that are not among the `existing` ones. Returns their names."""
    saved = []
    if BASE not in existing:
        save_base(folder, settings.variant, noise_scheduler, out / BASE)
        saved.append(BASE)
    for level in levels_of(settings.students, family_of(folder)):
        if student_part(level) in existing:
            continue
        try:
            save_student(unet, level, out / student_part(level))
        except ValueError as error:
            raise UserError(f"--teacher {settings.teacher}: {error}") from None
        saved.append(student_part(level))
    return saved


def save_student(teacher: UNet2DConditionModel, level: str, folder: Path) -> None:
    """Write a student as training begins with it, in float32. Raises ValueError for a teacher that it does not fit."""
    student = initialised_student(dict(teacher.config), teacher.state_dict(), level).to(torch.float32)
    with atomic_directory(folder, exist_ok=True) as temporary:
        say_wait(f"writing {folder}", network_bytes(student))
        student.save_pretrained(temporary)
        write_checksums(temporary)

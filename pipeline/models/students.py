"""Making a student from its teacher: its config, its initial weights, and the teacher's modules it is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from pipeline.models.families import Family, family_of_level
from pipeline.models.hashing import shapes_of
from pipeline.models.levels import LEVELS
from pipeline.system.errors import UserError


def levels_of(named: tuple[str, ...] | None, family: Family) -> tuple[str, ...]:
    """The levels that --students names, or its family's own where it names none."""
    return (family.default_level,) if named is None else named


def refuse_foreign(levels: Iterable[str], family: Family, teacher: str, option: str = "--students") -> None:
    """Raise UserError if one of the levels is not a student of this family. `teacher` is how messages call its teacher,
    such as `--teacher path`, and `option` is what chose the levels."""
    for level in levels:
        if level not in family.levels:
            raise UserError(
                f"{level} is a student of {family_of_level(level).title}, and {teacher} is of {family.title}. "
                f"Choose from {', '.join(family.levels)} with {option}."
            )


def student_config(teacher_config: dict[str, Any], level: str) -> dict[str, Any]:
    """The student's U-Net config. Raises ValueError for a teacher that is not of the level's family."""
    family_of_level(level).check(teacher_config)
    return LEVELS[level].student_config(teacher_config)


def meta_student(teacher_config: dict[str, Any], level: str) -> UNet2DConditionModel:
    """The student without weights, on the meta device."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(student_config(teacher_config, level))


def initialised_student(
    teacher_config: dict[str, Any], teacher_weights: Mapping[str, Tensor], level: str
) -> UNet2DConditionModel:
    """The student filled from the teacher, whose tensors it shares. Raises ValueError where they do not fit."""
    student = meta_student(teacher_config, level)
    student.load_state_dict(student_weights(shapes_of(student), teacher_weights, level), strict=True, assign=True)
    return student


def student_weights(
    student_shapes: Mapping[str, tuple[int, ...]], teacher_weights: Mapping[str, Tensor], level: str
) -> dict[str, Tensor]:
    """Every tensor of the student: the teacher's own, not a copy.

    Raises ValueError, naming the tensor, if the teacher has none of that name or shape.
    """
    weights = {}
    for key, shape in student_shapes.items():
        source = LEVELS[level].teacher_key(key)
        if source not in teacher_weights:
            raise ValueError(f"the teacher has no tensor {source}, which the {level} student's {key} starts from")
        tensor = teacher_weights[source]
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"the teacher's {source} has shape {tuple(tensor.shape)}; "
                f"the {level} student's {key} needs {tuple(shape)}"
            )
        weights[key] = tensor
    return weights


def teacher_taps(levels: Iterable[str]) -> list[str]:
    """The teacher's modules that any of the levels is compared with, each once, in the order of the forward pass."""
    wanted = {teacher for level in levels for _, teacher in LEVELS[level].taps}
    modules = dict.fromkeys(module for level in levels for module in family_of_level(level).modules)
    return [module for module in modules if module in wanted]

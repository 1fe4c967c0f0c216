"""A level: what a student is, compared with its teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Level:
    """A student of a family: how it differs from its teacher, and which of their outputs the loss compares.

    `student_config` makes the student's U-Net config from the teacher's; `teacher_key` names the teacher's tensor that
    a tensor of the student starts from; `taps` are pairs (student module, teacher module) whose outputs have equal
    shapes. `summary` completes the sentence "Compared with its teacher, the student has ...". `source` is the name and
    the address of the published model that has the student's shape, where that is of another kind than distill-sd's.
    """

    student_config: Callable[[dict[str, Any]], dict[str, Any]]
    teacher_key: Callable[[str], str]
    taps: tuple[tuple[str, str], ...]
    summary: str
    source: tuple[str, str] | None = None

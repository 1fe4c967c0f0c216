"""What students cost to train from a cache, beside training them online: arithmetic alone, before anything is run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.evaluation.cost import count_macs, unet_macs
from pipeline.models.load import family_of, part_classes, unet_config
from pipeline.models.reading import read_json
from pipeline.models.shapes import TeacherShapes
from pipeline.models.students import student_config

# A forward pass and a backward pass, which takes twice as much.
TRAINING_PASSES = 3


@dataclass(frozen=True)
class TrainingCost:
    """Multiply-accumulates of a forward pass for one image: the VAE's encoder, the teacher, and each student by level.

    The text encoder is left out: it takes about a hundredth of what the VAE's encoder takes.
    """

    vae_encoder: int
    teacher: int
    students: dict[str, int]

    def share_of_online(self, rounds: int, visits: int) -> float:
        """All that the two stages compute, over what online training computes for the same samples.

        Each student visits each entry of so many rounds `visits` times. Online training, as distill-sd does it, runs
        the VAE and the teacher for every sample of every student.
        """
        samples = rounds * visits
        training = sum(TRAINING_PASSES * student for student in self.students.values())
        offline = self.vae_encoder + rounds * self.teacher + samples * training
        online = samples * (len(self.students) * (self.vae_encoder + self.teacher) + training)
        return offline / online

    def break_even(self, images: int, rounds: int) -> int:
        """The samples per student after which online training has computed more than both stages."""
        spared = len(self.students) * (self.vae_encoder + self.teacher)
        return math.ceil(images * (self.vae_encoder + rounds * self.teacher) / spared)


def training_cost(folder: Path, resolution: int, shapes: TeacherShapes, levels: tuple[str, ...]) -> TrainingCost:
    """The cost for the teacher of a pipeline's folder, of which the configs are enough."""
    family, config, classes = family_of(folder), unet_config(folder), part_classes(folder)
    with torch.device("meta"):
        vae = classes["vae"].from_config(read_json(folder / "vae" / "config.json"))
        encoder = count_macs(vae.encode, torch.empty(1, vae.config.in_channels, resolution, resolution))

    def macs(unet: dict[str, Any]) -> int:
        return unet_macs({**unet, "sample_size": shapes.latents[1:]}, shapes.conditioning, family)

    return TrainingCost(encoder, macs(config), {level: macs(student_config(config, level)) for level in levels})

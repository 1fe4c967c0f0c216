"""Loading a student and its teacher, and checking that they match before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from pipeline.evaluation.fidelity import levels_of
from pipeline.models.fake_quant import state_of_quantisers
from pipeline.models.families import Family
from pipeline.models.hashing import config_of, tokenizer_sha256, weights_sha256
from pipeline.models.load import family_of, find_pipeline, load_base, load_deployed_unet
from pipeline.sampling.process import PipelineRef
from pipeline.system.errors import UserError
from shards.manifest import sha256_of_json


@dataclass(frozen=True)
class LoadedPipeline:
    """One of the two pipelines, on the CPU, and a reference to load it with in another process.

    The U-Net of `pipe` has the precision of `model`; the other parts are float32.
    """

    name: str
    folder: Path
    pipe: DiffusionPipeline
    model: PipelineRef

    @property
    def family(self) -> Family:
        return family_of(self.folder)

    @property
    def spec(self) -> dict[str, Any]:
        """Everything that determines the pipeline's images, independent of the folder's name."""
        networks = {part: getattr(self.pipe, part) for part in ("unet", *self.family.encoders)}
        parts = {part: weights_sha256(network) for part, network in networks.items()}
        tokenizers = {f"{part}_sha256": tokenizer_sha256(getattr(self.pipe, part)) for part in self.family.tokenizers}
        configs = {part: config_of(network) for part, network in networks.items()}
        config = {key: value for key, value in self.pipe.scheduler.config.items() if not key.startswith("_")}
        quantisers = state_of_quantisers(self.pipe.unet)
        stated = {"quantisers": sha256_of_json(quantisers)} if quantisers else {}
        return {**parts, **stated, **tokenizers, "configs": configs, "scheduler": config}


def load_named_pipeline(
    name: str, flag: str, revision: str | None, variant: str | None, device: torch.device, dtype: torch.dtype
) -> LoadedPipeline:
    """The pipeline `name`, the value of the option `flag`. Raises UserError if it cannot be loaded."""
    folder = find_pipeline(name, revision, variant, flag)
    pipe = load_base(folder, variant, load_deployed_unet(folder / "unet", variant, dtype))
    return LoadedPipeline(name, folder, pipe, PipelineRef(folder, folder / "unet", device, dtype, variant, variant))


def on_device(loaded: LoadedPipeline) -> DiffusionPipeline:
    """The pipeline with its U-Net moved to the device of `model`."""
    loaded.pipe.unet.to(loaded.model.device, memory_format=torch.channels_last).eval()
    return loaded.pipe


def level_of(teacher: LoadedPipeline, student: LoadedPipeline, wanted: str | None) -> str:
    """The student's level: `wanted`, or by default the first level that its layers match.

    Raises UserError if the layers match no level of this teacher, or not the wanted one.
    """
    try:
        teacher.family.check(teacher.pipe.unet.config)
    except ValueError as error:
        raise UserError(f"--teacher {teacher.name}: {error}. Pass a teacher of that family.") from None
    found = levels_of(student.pipe.unet, teacher.pipe.unet, teacher.family)
    if not found:
        raise UserError(
            f"--student {student.name} is not a student of --teacher {teacher.name}: its layers match none of "
            f"{', '.join(teacher.family.levels)}. Pass the teacher it was distilled from."
        )
    if wanted and wanted not in found:
        raise UserError(
            f"--level {wanted} is not the level of --student {student.name}, whose layers match {' and '.join(found)}. "
            "Pass a level that matches, or leave --level out."
        )
    teacher_type, student_type = (model.pipe.scheduler.config.prediction_type for model in (teacher, student))
    if teacher_type != student_type:
        raise UserError(
            f"--student {student.name} predicts {student_type}, but --teacher {teacher.name} predicts {teacher_type}. "
            "Pass the teacher it was distilled from."
        )
    return wanted or found[0]

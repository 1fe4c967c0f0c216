"""The options of `evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.models.levels import LEVELS
from pipeline.system.errors import UserError
from pipeline.system.options import MAX_BATCH, MAX_SAMPLING_STEPS, MAX_SIDE, SAMPLERS, HubOptions, PrecisionOptions
from pipeline.system.settings import REQUIRED, option
from shards.location import Location

# The files that an evaluation writes.
EVALUATION, COST, FIDELITY = "evaluation.json", "cost.json", "fidelity.json"
# Pillow's, by their names in lower case.
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(PrecisionOptions, HubOptions):
    """Compare a student with its teacher: cost, fidelity on held-out latents, and quality of generated images."""

    command: ClassVar[str] = "evaluate"
    work_module: ClassVar[str] = "pipeline.commands.evaluate"
    has_plan: ClassVar[bool] = True

    student: str = option(REQUIRED, "Student pipeline: a folder or a name on the hub.", place=True)
    teacher: str = option(REQUIRED, "Teacher pipeline: a folder, a name on the hub, demo or demo-xl.", place=True)
    out: Path = option(REQUIRED, "Directory for the table, the report and the images.")
    level: str | None = option(None, "The student's level; by default detected from its layers.", choices=tuple(LEVELS))
    latents: Location | None = option(
        None,
        "Held-out latents that `encode` wrote, a directory or an address; without them fidelity is not measured.",
    )
    entries: int = option(64, "Number of held-out images to compare on.", ge=1)
    bins: int = option(
        10, "Number of equal parts of the noise schedule; each image is compared once per part.", ge=1, le=100
    )
    prompts: Path | None = option(None, "Text file with one prompt per line; without it quality is not measured.")
    num_inference_steps: int = option(25, "Sampling steps.", ge=1, le=MAX_SAMPLING_STEPS)
    guidance_scale: float = option(7.5, "Scale of classifier-free guidance; 1 turns it off.", ge=1.0)
    scheduler: str = option("pndm", "Scheduler to sample with.", choices=SAMPLERS)
    picture_size: int = option(
        256, "Side in pixels that images are resized to before they are scored.", ge=8, le=MAX_SIDE
    )
    resize_filter: str = option("bicubic", "Pillow filter to resize with.", choices=FILTERS)
    reference: Path | None = option(
        None, "Reference for FID: a folder of images, or an .npz or .safetensors file with mu and sigma."
    )
    inception_weights: Path | None = option(
        None, "torch-fidelity's weights for FID and Inception score, where they cannot be downloaded."
    )
    clip: Path | None = option(None, "Folder of a CLIP model saved by transformers, for the CLIP score.")
    repeats: int = option(5, "Timing repeats, with student and teacher alternating; the median is reported.", ge=1)
    timing_batch_size: int = option(1, "Images per forward pass while timing.", ge=1, le=MAX_BATCH)
    batch_size: int = option(8, "Images per forward pass otherwise.", ge=1, le=MAX_BATCH)
    seed: int = option(0, "Seed of the held-out noise and of the first image; each further image adds one.", ge=0)
    update_card: bool = option(False, "Add the figures to the model card of a student that `distill` wrote.")

    revision: str | None = option(None, "Revision of the teacher on the hub.")
    variant: str | None = option(None, "Variant of the teacher's weight files, such as fp16.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, path in (
            ("reference", self.reference),
            ("inception-weights", self.inception_weights),
            ("clip", self.clip),
        ):
            if path is not None and self.prompts is None:
                raise UserError(f"--{name} scores images, and without --prompts there are none. Pass --prompts FILE.")
            if path is not None and not path.exists():
                raise UserError(f"--{name} {path} does not exist. Pass the path of the downloaded file or folder.")

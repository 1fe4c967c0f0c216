"""The options of `evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.evaluation.quality import FILTERS
from pipeline.models.families.sd import LEVELS
from pipeline.sampling.generate import SCHEDULERS, Sampler
from pipeline.system.errors import UserError
from pipeline.system.options import HubOptions, PrecisionOptions
from pipeline.system.settings import REQUIRED, option

# The files of an evaluation.
EVALUATION, COST, FIDELITY = "evaluation.json", "cost.json", "fidelity.json"


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(PrecisionOptions, HubOptions):
    student: str = option(REQUIRED, "The student's pipeline: a folder or a hub's name.")
    teacher: str = option(REQUIRED, "Its teacher's pipeline: a folder, a hub's name, or demo.")
    out: Path = option(REQUIRED, "Directory to write the table, the report and the pictures to.")
    level: str | None = option(None, "The student's level; by default found from its layers.", choices=tuple(LEVELS))
    latents: Path | None = option(None, "Directory that `encode` wrote of held-out pictures; without it no fidelity.")
    entries: int = option(64, "Held-out pictures to compare on.", ge=1)
    bins: int = option(10, "Equal parts of the noise schedule; each picture is compared once in each.", ge=1, le=100)
    prompts: Path | None = option(None, "Text file of prompts, one a line, to draw; without it no quality.")
    num_inference_steps: int = option(25, "Steps of the sampler.", ge=1)
    guidance_scale: float = option(7.5, "Classifier-free guidance; 1 is none.", ge=1.0)
    scheduler: str = option("pndm", "The sampler.", choices=tuple(SCHEDULERS))
    picture_size: int = option(256, "Side that pictures are resized to before they are measured, in pixels.", ge=8)
    resize_filter: str = option("bicubic", "Pillow's filter that resizes them.", choices=tuple(FILTERS))
    reference: Path | None = option(
        None, "For FID: a folder of pictures, or an .npz or .safetensors file with mu and sigma."
    )
    inception_weights: Path | None = option(
        None, "For FID and Inception score: torch-fidelity's weights file, where it cannot be downloaded."
    )
    clip: Path | None = option(None, "For the CLIP score: folder of a CLIP that transformers saved.")
    repeats: int = option(5, "Turns that student and teacher take when they are timed; the median counts.", ge=1)
    timing_batch_size: int = option(1, "Pictures in one forward pass when they are timed.", ge=1)
    batch_size: int = option(8, "Pictures in one forward pass otherwise.", ge=1)
    seed: int = option(0, "Seed of the first picture, each next one has the next; and of the held-out noise.", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, path in (
            ("reference", self.reference),
            ("inception-weights", self.inception_weights),
            ("clip", self.clip),
        ):
            if path is not None and self.prompts is None:
                raise UserError(
                    f"--{name} measures pictures, and there are none without --prompts: give a prompts file"
                )
            if path is not None and not path.exists():
                raise UserError(f"--{name} {path} does not exist: give the path of what was downloaded")

    def sampler(self, batch_size: int) -> Sampler:
        return Sampler(self.num_inference_steps, self.guidance_scale, batch_size, self.scheduler, seed=self.seed)

"""The options of `finetune`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.settings.training import TrainingSettings
from pipeline.system.errors import UserError
from pipeline.system.options import PREDICTION_TYPES, HubOptions
from pipeline.system.settings import REQUIRED, option
from shards.location import Location

LORA_FORMATS = ("diffusers", "kohya")


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(TrainingSettings, HubOptions):
    """Train a pipeline's U-Net on latents. Ends with a complete pipeline, or with LoRA weights."""

    command: ClassVar[str] = "finetune"
    work_module: ClassVar[str] = "pipeline.commands.finetune"
    has_plan: ClassVar[bool] = True

    model: str = option(
        REQUIRED, "Pipeline whose U-Net is trained: a student's folder, a name on the hub, demo or demo-xl.", place=True
    )
    latents: Location = option(
        REQUIRED, "Directory or address that `encode` wrote to, with the model's own VAE and text encoder."
    )
    lora_rank: int | None = option(None, "Train LoRA adapters of this rank instead of the whole U-Net.", ge=1, le=4096)
    lora_format: str = option(
        "diffusers", "Names of the adapters' tensors; kohya's are for ComfyUI and web UIs.", choices=LORA_FORMATS
    )
    noise_offset: float = option(0.0, "Standard deviation of an offset added to each channel of the noise.", ge=0.0)
    input_perturbation: float = option(0.0, "Strength of extra input noise that is not part of the target.", ge=0.0)
    uncond_fraction: float = option(0.1, "Share of entries that get the empty prompt.", ge=0.0, le=1.0)
    prediction_type: str | None = option(
        None, "Prediction type; overrides the scheduler's config.", choices=PREDICTION_TYPES
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_format != "diffusers" and not self.lora_rank:
            raise UserError(f"--lora-format {self.lora_format} is for LoRA weights. Add --lora-rank.")
        if self.qat and self.lora_rank:
            raise UserError(f"--qat {self.qat} trains the whole U-Net, and --lora-rank does not. Drop one of the two.")
        if self.fp16_variant and self.lora_rank:
            raise UserError("--fp16-variant is for a whole pipeline, and LoRA weights are small. Drop one of the two.")

    @property
    def entries(self) -> Location:
        return self.latents

"""The options of `sample`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.system.errors import UserError
from pipeline.system.options import MAX_BATCH, MAX_SAMPLING_STEPS, MAX_SIDE, SAMPLERS, HubOptions, PrecisionOptions
from pipeline.system.settings import REQUIRED, option


@dataclass(frozen=True, kw_only=True)
class SampleSettings(PrecisionOptions, HubOptions):
    """Generate an image for each prompt, and a contact sheet."""

    command: ClassVar[str] = "sample"
    work_module: ClassVar[str] = "pipeline.commands.sample"

    model: str = option(
        REQUIRED,
        "Pipeline to generate with: a folder, a name on the hub, demo or demo-xl.",
        place=True,
    )
    prompts: tuple[str, ...] = option(
        REQUIRED, "A prompt, or a text file with one prompt per line; may be repeated.", repeated=True
    )
    out: Path = option(REQUIRED, "New folder for the images.")
    num_inference_steps: int = option(25, "Sampling steps.", ge=1, le=MAX_SAMPLING_STEPS)
    guidance_scale: float = option(7.0, "Scale of classifier-free guidance; 1 turns it off.", ge=1.0)
    negative_prompt: str | None = option(None, "What the images must not show.")
    scheduler: str = option("dpm", "Scheduler to sample with.", choices=SAMPLERS)
    height: int | None = option(None, "Height of the images in pixels; by default the model's own.", ge=8, le=MAX_SIDE)
    width: int | None = option(None, "Width of the images in pixels; by default the model's own.", ge=8, le=MAX_SIDE)
    batch_size: int = option(4, "Images per forward pass; does not change the images.", ge=1, le=MAX_BATCH)
    engine: str = option(
        "torch",
        "What runs the networks; onnx (onnxruntime) and openvino run those that `export --format onnx` wrote, on the "
        "CPU.",
        choices=("torch", "onnx", "openvino"),
    )
    seed: int = option(0, "Seed of the first image; each further image adds one.", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.height is None) != (self.width is None):
            raise UserError("--height and --width go together. Pass both or neither.")
        if self.engine != "torch" and (self.dtype != "auto" or self.device not in ("auto", "cpu")):
            raise UserError(
                f"--dtype and --device do not work with --engine {self.engine}, which runs graphs as they are on the "
                "CPU. Leave them out."
            )
        for name in ("height", "width"):
            if (getattr(self, name) or 0) % 8:
                raise UserError(f"--{name} is {getattr(self, name)}, but must be a multiple of 8")

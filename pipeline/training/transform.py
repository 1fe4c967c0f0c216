"""What is done to a student so that it can be trained, and undone when it is saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from diffusers import UNet2DConditionModel

from pipeline.models.fake_quant import save_unet
from pipeline.models.save import save_pipeline


class Transform:
    """Trains the student as it is and saves it as a pipeline. Subclasses train it in another form."""

    def prepare(self, student: UNet2DConditionModel) -> None:
        """Change the student, before its optimiser is made. Parameters that require gradients are trained."""

    def save_weights(self, student: UNet2DConditionModel, folder: Path) -> None:
        """Write what is trained to a checkpoint's folder."""
        save_unet(student, folder)

    def load_weights(self, initial: Callable[[], UNet2DConditionModel], folder: Path) -> UNet2DConditionModel:
        """The prepared student with the weights of a checkpoint's folder. `initial` loads the one trained at first."""
        return UNet2DConditionModel.from_pretrained(folder)

    def convert(self, student: UNet2DConditionModel, base: Path, out: Path, prediction_type: str) -> None:
        """Write the trained student to `out` in its final form. `base` is the pipeline that it belongs to."""
        save_pipeline(base, student, out, prediction_type)

"""What a student is trained towards: the terms of the loss and their weights.

    total = task + output_weight * output + feature_weight * sum of the features' terms

The stage makes it and gives it to the loop. An objective without a teacher has only the task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from pipeline.core.diffusion import min_snr_weights, target
from pipeline.core.losses import distillation_losses, total_loss
from pipeline.core.taps import sample_tokens
from shards.dataset import Batch


@dataclass(frozen=True)
class Objective:
    """`pairs` are (student tap, teacher tap). `feature_loss` is a key of losses.FEATURE_LOSSES.

    `calibrations`, on the training's device, decode the teacher's taps (see `CacheDataset.calibrations`).
    `snr_gamma` weights task and output by Min-SNR (see `diffusion.min_snr_weights`); None does not.
    """

    pairs: tuple[tuple[str, str], ...] = ()
    output_weight: float = 0.0
    feature_weight: float = 0.0
    feature_loss: str = "mse"
    snr_gamma: float | None = None
    calibrations: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def student_taps(self) -> list[str]:
        return [student_tap for student_tap, _ in self.pairs]

    def losses(
        self,
        batch: Batch,
        student_pred: Tensor,
        features: dict[str, Tensor],
        alphas_cumprod: Tensor,
        prediction_type: str,
    ) -> dict[str, Tensor]:
        """The terms by name, float32 scalars (see `losses.distillation_losses`).

        student_pred (B, C, H, W); `features` are the student's taps, full maps (B, C, H, W) by name, of which the
        positions that the batch has of the teacher's are compared; alphas_cumprod (T,) float32.
        """
        sampled, stored = {}, {}
        for student_tap, teacher_tap in self.pairs:
            feature = batch.features[teacher_tap]
            sampled[student_tap] = sample_tokens(features[student_tap], feature.rows, feature.columns, feature.stride)
            stored[teacher_tap] = feature.decode(self.calibrations.get(teacher_tap))
        weights = None
        if self.snr_gamma is not None:
            weights = min_snr_weights(batch.timesteps, alphas_cumprod, self.snr_gamma, prediction_type)
        wanted = target(batch.latents, batch.noise, batch.timesteps, alphas_cumprod, prediction_type)
        return distillation_losses(
            student_pred, wanted, batch.teacher_pred, sampled, stored, self.pairs, self.feature_loss, weights
        )

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        return total_loss(terms, self.output_weight, self.feature_weight)

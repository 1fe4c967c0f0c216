"""The distillation losses (BK-SDM, eq. 1 to 4; weights as in distill-sd). Every term is float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mse(a: Tensor, b: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean square error over all elements, a scalar. `weights` (B,) multiply the error of each entry.

    Computed in float32, since half precision would overflow from |a - b| = 256 on.
    """
    if weights is None:
        return F.mse_loss(a.float(), b.float())
    return (weights * (a.float() - b.float()).square().flatten(1).mean(1)).mean()


def relative_mse(a: Tensor, b: Tensor) -> Tensor:
    """The mean over entries of mean((a - b)^2) / mean(b^2), a scalar; a, b (B, ...).

    It is 1 if `a` is zero. It is computed per entry, so that accumulating small batches equals one large batch.
    """
    error, power = ((x.float().square()).flatten(1).mean(1) for x in (a.float() - b.float(), b))
    return (error / power.clamp(min=torch.finfo(torch.float32).tiny)).mean()


FEATURE_LOSSES = {"mse": mse, "relative": relative_mse}


def distillation_losses(
    student_pred: Tensor,
    target: Tensor,
    teacher_pred: Tensor | None,
    student_features: dict[str, Tensor],
    teacher_features: dict[str, Tensor],
    pairs: tuple[tuple[str, str], ...],
    feature_loss: str = "mse",
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """The terms by name, each a float32 scalar: `task`, `output`, and `feature/<student tap>` per pair.

    student_pred, target, teacher_pred (B, C, H, W); features by module path, with equal shapes in a pair. Without
    `teacher_pred` there is no `output`, and without pairs there are no features. `feature_loss` is a key of
    FEATURE_LOSSES: the papers' `mse`, which the taps with the largest values dominate, or `relative`, which measures
    each tap's error against its own power. `weights` (B,) apply to `task` and `output`.
    """
    terms = {"task": mse(student_pred, target, weights)}
    if teacher_pred is not None:
        terms["output"] = mse(student_pred, teacher_pred, weights)
    for student_tap, teacher_tap in pairs:
        term = FEATURE_LOSSES[feature_loss](student_features[student_tap], teacher_features[teacher_tap])
        terms[f"feature/{student_tap}"] = term
    return terms


def total_loss(terms: dict[str, Tensor], output_weight: float, feature_weight: float) -> Tensor:
    """task + output_weight * output + feature_weight * sum of the feature terms."""
    features = [term for name, term in terms.items() if name.startswith("feature/")]
    total = terms["task"]
    if "output" in terms:
        total = total + output_weight * terms["output"]
    return total + feature_weight * sum(features) if features else total

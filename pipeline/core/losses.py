"""The losses of distillation (BK-SDM, eq. 1 to 4; weights as in distill-sd), each term in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mse(a: Tensor, b: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean square error over everything, a scalar; with `weights` (B,), each entry's counts that many times.

    Half precision would overflow over |a - b| of 255.
    """
    if weights is None:
        return F.mse_loss(a.float(), b.float())
    return (weights * (a.float() - b.float()).square().flatten(1).mean(1)).mean()


def relative_mse(a: Tensor, b: Tensor) -> Tensor:
    """Each entry's mean square error as a share of the mean square of `b`, (B, ...); their mean, a scalar.

    It is 1 when `a` is zero. Entry by entry, so that accumulation over small batches equals a large one.
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
    """The terms by name, each a float32 scalar: `task`, `output`, and `feature/<student tap>` a pair.

    student_pred, target, teacher_pred (B, C, H, W); features by module path, equal shapes in a pair.
    `teacher_pred` None leaves `output` out, and no pairs leave the features out. `feature_loss` is a key of
    FEATURE_LOSSES: the papers' `mse`, in which the taps of the largest values rule, or `relative`, in which
    each tap counts by the share of its power that is missed. `weights` (B,) are the entries', in `task` and `output`.
    """
    terms = {"task": mse(student_pred, target, weights)}
    if teacher_pred is not None:
        terms["output"] = mse(student_pred, teacher_pred, weights)
    for student_tap, teacher_tap in pairs:
        term = FEATURE_LOSSES[feature_loss](student_features[student_tap], teacher_features[teacher_tap])
        terms[f"feature/{student_tap}"] = term
    return terms


def total_loss(terms: dict[str, Tensor], output_weight: float, feature_weight: float) -> Tensor:
    """task + output_weight * output + feature_weight * sum of the features' terms."""
    features = [term for name, term in terms.items() if name.startswith("feature/")]
    total = terms["task"]
    if "output" in terms:
        total = total + output_weight * terms["output"]
    return total + feature_weight * sum(features) if features else total

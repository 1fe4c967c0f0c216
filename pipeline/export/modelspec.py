"""What a single file says of its model besides the weights: a header that model browsers read, and the noise schedule.

The header's keys are those of ModelSpec 1.0.0, and one that kohya's scripts write. It states no date, so the same model
gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.models.families.sd_configs import V_MARK, ZERO_SNR_MARK

IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
LENGTH_BYTES = 8


def header(
    architecture: str, title: str, size: tuple[int, int], schedule: Mapping[str, Any], licence: str | None
) -> dict[str, str]:
    """The header's fields. `size` is (height, width) in pixels, and `schedule` the config of the model's scheduler."""
    height, width = size
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": IMPLEMENTATION,
        "modelspec.title": title,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": "v" if predicts_v(schedule) else schedule["prediction_type"],
        **({"modelspec.license": licence} if licence else {}),
        "ss_zero_terminal_snr": str(has_zero_snr(schedule)),
    }


def schedule_marks(schedule: Mapping[str, Any]) -> dict[str, Tensor]:
    """The empty tensors by which ComfyUI, Forge and others recognise v-prediction and zero terminal SNR."""
    marks = {V_MARK: predicts_v(schedule), ZERO_SNR_MARK: has_zero_snr(schedule)}
    return {name: torch.zeros(0) for name, is_set in marks.items() if is_set}


def schedule_advice(schedule: Mapping[str, Any]) -> str | None:
    """What to set in programs that take the noise schedule from their own settings, if it is not the usual one."""
    unusual = [
        *(["v-prediction"] if predicts_v(schedule) else []),
        *(["zero terminal SNR"] if has_zero_snr(schedule) else []),
    ]
    if not unusual:
        return None
    return f"The model uses {' and '.join(unusual)}, which many programs do not read from the file: set it there."


def predicts_v(schedule: Mapping[str, Any]) -> bool:
    return schedule["prediction_type"] == "v_prediction"


def has_zero_snr(schedule: Mapping[str, Any]) -> bool:
    return bool(schedule.get("rescale_betas_zero_snr"))


def sort_header(path: Path) -> None:
    """Bring the header's fields into an order: safetensors writes them in another one each time."""
    with open(path, "r+b") as stream:
        length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        written = json.loads(stream.read(length))
        written["__metadata__"] = dict(sorted(written["__metadata__"].items()))
        text = json.dumps(written, separators=(",", ":"), ensure_ascii=False).encode()
        stream.seek(LENGTH_BYTES)
        stream.write(text.ljust(length))

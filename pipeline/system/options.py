"""Options that several commands share. A command's settings inherit them."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.system.device import DEVICES, DTYPES
from pipeline.system.settings import Settings, option


@dataclass(frozen=True, kw_only=True)
class HubOptions(Settings):
    """Which files of a model to load."""

    revision: str | None = option(None, "Revision of the model on the hub.")
    variant: str | None = option(None, "Variant of the model's weight files, such as fp16.")


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Settings):
    device: str = option("auto", "Device to run on; auto uses the GPU if there is one.", choices=DEVICES)


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions(DeviceOptions):
    dtype: str = option("auto", "Precision; auto is fp16 on a CUDA GPU, else fp32.", choices=("auto", *DTYPES))

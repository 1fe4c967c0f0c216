"""The options of `export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.system.errors import UserError
from pipeline.system.options import DTYPE_NAMES, HubOptions
from pipeline.system.settings import REQUIRED, option

# Of a single file.
SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class ExportSettings(HubOptions):
    """Export a pipeline in a format for other programs."""

    command: ClassVar[str] = "export"
    work_module: ClassVar[str] = "pipeline.commands.export"

    model: str = option(REQUIRED, "Pipeline to export: a folder, a name on the hub, demo or demo-xl.", place=True)
    format: str = option(REQUIRED, "Format to write.", choices=("single-file", "onnx", "int8"))
    out: Path = option(REQUIRED, f"New folder, or for single-file a new {SUFFIX} file.")
    dtype: str = option(
        "fp32", "Precision of the weights; for int8, of the layers that are not quantised.", choices=DTYPE_NAMES
    )

    layout: str = option(
        "dense",
        "Names of the tensors of a single file: dense, which diffusers, ComfyUI and Forge read, or those of "
        "stable-diffusion.cpp.",
        choices=("dense", "sdcpp"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format == "onnx" and self.dtype == "bf16":
            raise UserError("--dtype bf16 does not work with --format onnx. Use fp32 or fp16.")
        if self.format != "single-file" and self.layout != "dense":
            raise UserError(f"--layout {self.layout} is one of --format single-file. Leave it out.")
        if self.format == "single-file" and self.out.suffix != SUFFIX:
            raise UserError(f"--out {self.out} does not end in {SUFFIX}, as a single file must. Add it.")

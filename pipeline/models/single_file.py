"""A checkpoint in one file, as other programs keep it: converted once to a folder in diffusers' layout.

The folder lies in the hub's cache, so that the stages read it like a downloaded pipeline. diffusers converts; the
configs are this package's, so that nothing is downloaded. Afterwards each tensor is compared with the file's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import load_single_file_checkpoint
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from safetensors import safe_open
from torch import Tensor

from pipeline.models.families import FAMILIES, Family
from pipeline.models.tokenizer import write_tokenizer
from pipeline.system.disk import require_space
from pipeline.system.echo import say
from pipeline.system.errors import UserError, failing_with, first_line
from shards.files import atomic_directory

SAFETENSORS = ".safetensors"
# What files hold that are of no family, by the beginning of a name.
OTHERS = {
    "model.diffusion_model.joint_blocks.": "a checkpoint of SD3",
    "model.diffusion_model.double_blocks.": "a checkpoint of Flux",
    "double_blocks.": "a checkpoint of Flux",
    "lora_": "a LoRA, which changes a checkpoint and is none",
    "unet.": "a LoRA or a network of diffusers, not a checkpoint",
    "down_blocks.": "a network of diffusers, not a checkpoint",
    "input_blocks.": "a U-Net without a VAE and a text encoder",
    "encoder.down.": "a VAE alone",
}
SINGLE_FILES = (SAFETENSORS, ".ckpt", ".pt", ".bin")
CONVERTED = Path(HF_HOME) / "distill-sd"


def converted(file: Path, named: str) -> Path:
    """The folder of a single file; `named` is how messages call it, such as `--teacher x.safetensors`.

    Raises UserError for a file that cannot be read safely or holds no complete pipeline of a known family.
    """
    state = file.stat()
    key = json.dumps([str(file.resolve()), state.st_size, state.st_mtime_ns])
    folder = CONVERTED / f"{file.stem[:40]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    CONVERTED.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            convert(file, folder, named)
    return folder


def convert(file: Path, folder: Path, named: str) -> None:
    weights, stated = read_weights(file, named)
    family, what, configs = identify(weights, stated, named)
    dtype = precision(weights)
    require_space(folder, sum(t.nbytes for t in weights.values()), "use another HF_HOME, where it is kept")
    say(f"converting {file} ({what}) once, to {folder}", err=True)
    with atomic_directory(folder) as out:
        for name, config in configs.items():
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for tokenizer in family.tokenizers:
            write_tokenizer(out / tokenizer)
        made = getattr(diffusers, configs["model_index.json"]["_class_name"])
        try:
            pipe = made.from_single_file(str(file), config=str(out), local_files_only=True, torch_dtype=dtype)
        except (ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"{named} cannot be converted by diffusers: {first_line(error)}") from None
        refuse_other_weights(family.single_file(pipe), weights, dtype, named)
        pipe.save_pretrained(out)


def read_weights(file: Path, named: str) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors of a file by name, and what its header states. They are read from disk as they are used."""
    if file.suffix not in SINGLE_FILES:
        raise UserError(f"{named} is a file, but not a checkpoint: its name does not end in {', '.join(SINGLE_FILES)}.")
    safe = file.suffix == SAFETENSORS
    instead = "" if safe else ", or use a .safetensors file: code in a pickle is not run"
    stated: Mapping[str, str] = {}
    with failing_with(f"{named} cannot be read as a checkpoint", f"Download it again{instead}."):
        # diffusers turns whatever its readers raise into an OSError or a ValueError.
        weights = load_single_file_checkpoint(str(file), local_files_only=True)
        if not isinstance(weights, Mapping):
            raise ValueError(f"it holds a {type(weights).__name__}, not tensors by name")
        if safe:
            with safe_open(file, "pt") as opened:
                stated = opened.metadata() or {}
    return {name: value for name, value in weights.items() if isinstance(value, Tensor)}, stated


def identify(
    weights: Mapping[str, Tensor], stated: Mapping[str, str], named: str
) -> tuple[Family, str, dict[str, dict[str, Any]]]:
    """The family of a file, what it is in words, and the configs of its parts, by their files."""
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    other = next((what for start, what in OTHERS.items() if any(name.startswith(start) for name in shapes)), None)
    for family in FAMILIES.values() if other is None else ():
        try:
            found = family.single_file_configs(shapes, stated)
        except ValueError as error:
            raise UserError(f"{named}: {error}") from None
        if found:
            return family, *found
    titles = " or ".join(family.title.replace(" and ", " or ") for family in FAMILIES.values())
    raise UserError(f"{named}: it is {other or 'not a checkpoint of Stable Diffusion'}. Use one of {titles}.")


def precision(weights: Mapping[str, Tensor]) -> torch.dtype:
    """What the converted networks are kept in: the file's own precision if it has only one, else float32."""
    dtypes = {value.dtype for value in weights.values() if value.is_floating_point() and value.numel()}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= {torch.float16, torch.bfloat16} else torch.float32


def refuse_other_weights(
    converted: Mapping[str, Tensor], weights: Mapping[str, Tensor], dtype: torch.dtype, named: str
) -> None:
    """Raise UserError unless each tensor of the converted networks, under the file's names, is the file's own."""
    for name, value in converted.items():
        if not torch.equal(value, weights[name].to(dtype)):
            raise UserError(f"{named}: diffusers reads another {name} than the file holds. Use a folder instead.")

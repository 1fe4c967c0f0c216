"""LoRA adapters on a U-Net (Hu et al. 2021), with peft, saved in the form that diffusers' pipelines load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file

from pipeline.system.errors import UserError
from pipeline.system.extras import install_command
from pipeline.training.transform import Transform
from shards.files import atomic_file

ADAPTER = "adapter.safetensors"
WEIGHTS = "pytorch_lora_weights.safetensors"
# The projections of every attention layer, as in diffusers' own LoRA training.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Lora(Transform):
    """Trains adapters of `rank` instead of the student, and saves only them, in a format of LORA_FORMATS."""

    rank: int
    seed: int
    format: str = "diffusers"

    def prepare(self, student: UNet2DConditionModel) -> None:
        """Attach new adapters, which change nothing yet; nothing else requires gradients.

        Raises UserError if peft is not installed.
        """
        try:
            from peft import LoraConfig
        except ImportError:
            raise UserError(f"--lora-rank needs the package peft. Install it: {install_command('lora')}") from None
        torch.manual_seed(self.seed)
        student.requires_grad_(False)
        config = LoraConfig(
            r=self.rank, lora_alpha=self.rank, init_lora_weights="gaussian", target_modules=list(TARGETS)
        )
        student.add_adapter(config)

    def save_weights(self, student: UNet2DConditionModel, folder: Path) -> None:
        from peft.utils import get_peft_model_state_dict

        folder.mkdir(parents=True, exist_ok=True)
        save_file(get_peft_model_state_dict(student), folder / ADAPTER)

    def load_weights(self, initial: Callable[[], UNet2DConditionModel], folder: Path) -> UNet2DConditionModel:
        """Raises RuntimeError if the checkpoint's adapters have another rank."""
        from peft.utils import set_peft_model_state_dict

        student = initial()
        self.prepare(student)
        set_peft_model_state_dict(student, load_file(folder / ADAPTER))
        return student

    def convert(self, student: UNet2DConditionModel, base: Path, out: Path, prediction_type: str) -> None:
        """Write the adapters as pytorch_lora_weights.safetensors, for `load_lora_weights`.

        The file has no place for the prediction type. The format kohya has the names of kohya's scripts, which ComfyUI
        and web UIs read as well.
        """
        from peft.utils import get_peft_model_state_dict

        adapters = get_peft_model_state_dict(student)
        if self.format == "diffusers":
            adapters = convert_state_dict_to_diffusers(adapters)
        tensors = {f"unet.{name}": tensor.contiguous() for name, tensor in adapters.items()}
        if self.format == "kohya":
            tensors = convert_state_dict_to_kohya(tensors)
        out.mkdir(parents=True, exist_ok=True)
        with atomic_file(out / WEIGHTS) as stream:
            # safetensors wants a path: this is the temporary file next to the final one.
            save_file(tensors, stream.name, metadata={"format": "pt"})


def refuse_other_format(out: Path, wanted: str) -> None:
    """Raise UserError if the finished LoRA weights in `out` have the names of another format of LORA_FORMATS."""
    names = load_file(out / WEIGHTS)
    found = "kohya" if all(name.startswith("lora_") for name in names) else "diffusers"
    if found != wanted:
        raise UserError(
            f"{out}/{WEIGHTS} is finished, with the names of {found}. For --lora-format {wanted}, train it further "
            "(--max-train-steps), or choose another --out."
        )

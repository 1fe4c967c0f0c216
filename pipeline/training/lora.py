"""LoRA adapters on a U-Net (Hu et al. 2021), by peft, and saved as diffusers' pipelines load them."""

from __future__ import annotations

from pathlib import Path

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.torch import load_file, save_file

from pipeline.system.errors import UserError

# The projections of every attention layer, as in diffusers' own LoRA training.
ADAPTER = "adapter.safetensors"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def add_lora(unet: UNet2DConditionModel, rank: int) -> None:
    """Attach fresh adapters of `rank`, which change nothing yet, and let nothing else require gradients.

    Raises UserError if peft is not there.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError("--lora-rank needs the package peft: pip install 'distill-sd[lora]'") from None
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(TARGETS)))


def save_adapter(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write the adapters as they are, for `load_adapter`."""
    from peft.utils import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    save_file(get_peft_model_state_dict(unet), folder / ADAPTER)


def load_adapter(unet: UNet2DConditionModel, folder: Path) -> None:
    """Fill the attached adapters with what `save_adapter` wrote. Raises RuntimeError for another rank's."""
    from peft.utils import set_peft_model_state_dict

    set_peft_model_state_dict(unet, load_file(folder / ADAPTER))


def save_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write the adapters as pytorch_lora_weights.safetensors, for `load_lora_weights`."""
    from peft.utils import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)

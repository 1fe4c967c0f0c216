"""Small random models and images. Nothing here needs a network or a GPU."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


SD21 = {**SD15, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}


SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

# SDXL's topology with fewer transformer blocks. 18 is the width of both text encoders, 12 that of the pooled prompts,
# and 6 times 4 that of an image's numbers.
TINY_XL = {
    **SDXL,
    "sample_size": 16,
    "block_out_channels": (8, 12, 16),
    "transformer_layers_per_block": [1, 2, 3],
    "cross_attention_dim": 18,
    "attention_head_dim": [2, 2, 4],
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 36,
    "norm_num_groups": 4,
}

# Where SD has attention.
SD_BLOCKS = {key: SD15[key] for key in ("down_block_types", "up_block_types")}

# Stages narrower towards the outside, as in SD, so that a wrong key map shows in the shapes. Only one stage and the mid
# block have attention, which takes most of the time at this size.
TINY = {
    **SD15,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "sample_size": 16,
    "block_out_channels": (8, 12, 16, 16),
    "cross_attention_dim": 10,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


RESOLUTION = 32


def tiny_unet(seed: int = 0, **changes) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(**{**TINY, **changes})


def tiny_pipeline(seed: int = 0, prediction_type: str = "epsilon", **unet_changes) -> StableDiffusionPipeline:
    """A complete Stable Diffusion in miniature: 32 px images, 4 x 16 x 16 latents, 8 tokens of width 10."""
    unet = tiny_unet(seed, **unet_changes)
    torch.manual_seed(seed + 1)
    vae, tokenizer = tiny_vae(), tiny_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=unet.config.cross_attention_dim,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).eval()
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )


def tiny_vae(**changes) -> AutoencoderKL:
    """A VAE for 32 px images and 4 x 16 x 16 latents."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=RESOLUTION,
        **changes,
    )


def tiny_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Letters are tokens. A prompt has 8."""
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(vocabulary)},
        merges=[],
        unk_token="<|endoftext|>",
        pad_token=pad_token,
        model_max_length=8,
    )


def tiny_xl_unet(seed: int = 0, **changes) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(**{**TINY_XL, **changes})


def tiny_xl_pipeline(
    seed: int = 0, prediction_type: str = "epsilon", zero_snr: bool = False, **unet_changes
) -> StableDiffusionXLPipeline:
    """A complete SDXL in miniature: 32 px images, 4 x 16 x 16 latents, 8 tokens of widths 10 and 8 side by side."""
    unet = tiny_xl_unet(seed, **unet_changes)
    torch.manual_seed(seed + 1)
    vae, tokenizer, tokenizer_2 = tiny_vae(scaling_factor=0.13025), tiny_tokenizer(), tiny_tokenizer("a")
    common = {
        "vocab_size": len(tokenizer),
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    first = CLIPTextModel(CLIPTextConfig(hidden_size=10, projection_dim=10, **common))
    second = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=8, projection_dim=12, hidden_act="gelu", **common))
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing" if zero_snr else "leading",
    )
    return StableDiffusionXLPipeline(
        vae, first.eval(), second.eval(), tokenizer, tokenizer_2, unet, scheduler, add_watermarker=False
    )


# (width, height) in pixels.
SIZES = tuple((side, 40) for side in range(36, 56, 4))


def write_images(folder: Path, count: int, seed: int = 0, sizes: Sequence[tuple[int, int]] = SIZES) -> Path:
    """Pictures of several sizes with their metadata.jsonl, listed out of order."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        size = sizes[i % len(sizes)]
        Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
        rows.append({"file_name": f"{i:03d}.png", "text": f"picture {i}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    return folder

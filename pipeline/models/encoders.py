"""Images to latents, with a VAE."""

from __future__ import annotations

from diffusers import AutoencoderKL
from torch import Tensor

from pipeline.system.errors import UserError


def encode_images(vae: AutoencoderKL, pixels: Tensor, standard_normal: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> latents (B, 4, H/f, W/f) float32, sampled and scaled.

    `standard_normal`, of the latents' shape, is the noise of the posterior's sample: mean + std * standard_normal.
    """
    images = pixels.to(vae.device).permute(0, 3, 1, 2).to(vae.dtype) / 127.5 - 1.0
    posterior = vae.encode(images).latent_dist
    sampled = posterior.mean.float() + posterior.std.float() * standard_normal.to(vae.device)
    return sampled * vae.config.scaling_factor


def latents_shape(vae: AutoencoderKL, height: int, width: int | None = None) -> tuple[int, int, int]:
    """(C, H, W) of the latents of an image, a square without `width`. Raises UserError for sides that the VAE cannot
    divide."""
    factor, width = 2 ** (len(vae.config.block_out_channels) - 1), height if width is None else width
    for side in (height, width):
        if side % factor:
            raise UserError(f"--resolution {side} is not a multiple of {factor}, the VAE's downscaling")
    return vae.config.latent_channels, height // factor, width // factor

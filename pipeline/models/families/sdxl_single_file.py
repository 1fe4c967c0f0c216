"""A pipeline's weights under the names of Stability's own SDXL code, as in a single file.

    model.diffusion_model.*                              the U-Net
    first_stage_model.*                                  the VAE
    conditioner.embedders.0.transformer.text_model.*     the first text encoder (CLIP)
    conditioner.embedders.1.model.*                      the second text encoder (OpenCLIP)

U-Net, VAE and text encoders are named as in SD-1.x and SD-2.x, apart from their prefixes.
"""

from __future__ import annotations

from diffusers import DiffusionPipeline
from torch import Tensor

from pipeline.models.families.sd_single_file import clip_weights, open_clip_weights, unet_weights, vae_weights

FIRST, SECOND = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
PROJECTION = "text_projection.weight"


def pipeline_weights(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """All tensors of a pipeline's single file. Raises ValueError if the layout has no place for one of them."""
    widths = [encoder.config.hidden_size for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    if widths[0] == widths[1]:
        raise ValueError(
            f"both text encoders have width {widths[0]}, by which diffusers tells them apart in a single file"
        )
    return {
        **unet_weights(pipe.unet.state_dict()),
        **vae_weights(pipe.vae.state_dict()),
        **clip_weights(pipe.text_encoder.state_dict(), FIRST),
        **second_weights(pipe.text_encoder_2.state_dict()),
    }


def second_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The second text encoder's tensors. OpenCLIP's projection multiplies from the right, so it is transposed."""
    encoder = {name: tensor for name, tensor in weights.items() if name != PROJECTION}
    named = open_clip_weights(encoder, SECOND)
    return {**named, f"{SECOND}text_projection": weights[PROJECTION].T.contiguous()}

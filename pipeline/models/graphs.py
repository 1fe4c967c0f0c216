"""A pipeline as ONNX graphs: a folder like diffusers', with a graph in place of each network's weights.

    unet/           sample (B, C, H, W), timestep () float32, encoder_hidden_states (B, L, D), and for SDXL text_embeds
                    (B, P) and time_ids (B, 6) -> out_sample like sample
    text_encoder/   input_ids (B, L) int64 -> last_hidden_state and pooler_output, or for an encoder with a projection
                    text_embeds and last_hidden_state; and hidden_states.0, hidden_states.1, ...
    vae_encoder/    sample (B, 3, H, W) -> latent_parameters: means and logarithms of variances
    vae_decoder/    latent_sample (B, C, H, W) -> sample

These are the names of optimum's ORTStableDiffusionPipeline. Where no dtype is given, it is that of the graph's weights.
"""

from __future__ import annotations

from pathlib import Path

GRAPH, WEIGHTS = "model.onnx", "model.onnx_data"
UNET, VAE_ENCODER, VAE_DECODER = "unet", "vae_encoder", "vae_decoder"
# Outputs.
DENOISED, LATENTS, PIXELS, HIDDEN = "out_sample", "latent_parameters", "sample", "hidden_states"


def holds_graphs(folder: Path) -> bool:
    """Whether a folder is a pipeline of ONNX graphs."""
    return (folder / UNET / GRAPH).is_file()

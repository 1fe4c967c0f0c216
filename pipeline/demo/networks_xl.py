"""The networks of the demo's SDXL teacher, untrained: SDXL in everything but size.

Images, latents, captions and tokenizer are those of the other demo teacher, and so are the widths of the U-Net's three
stages. So most of its U-Net can start from the other's, as far as the two families have the same layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from pipeline.demo.networks import TEXT_WIDTH, text_config, unet_of

TEXT_WIDTH_2, POOLED_WIDTH = 48, 64
# Of each of an image's six numbers.
NUMBER_WIDTH = 16


def make_text_encoders(tokenizer: CLIPTokenizer) -> dict[str, nn.Module]:
    """Token ids (B, 24) -> hidden states (B, 24, TEXT_WIDTH); and (B, 24, TEXT_WIDTH_2) with pooled (B, POOLED_WIDTH).

    SDXL takes the states before the last layer, so each has one layer more than are used for these.
    """
    first = text_config(tokenizer, TEXT_WIDTH, layers=4)
    second = text_config(tokenizer, TEXT_WIDTH_2, layers=3)
    second.projection_dim = POOLED_WIDTH
    return {"text_encoder": CLIPTextModel(first), "text_encoder_2": CLIPTextModelWithProjection(second)}


def make_unet() -> UNet2DConditionModel:
    """Noisy latents (B, 4, 16, 16), timesteps (B,), prompt_embeds (B, 24, 144), pooled_prompt_embeds (B, 64) and
    time_ids (B, 6) -> noise (B, 4, 16, 16).

    Depths that grow inwards, as SDXL's (1, 2, 10) do, so that SSD-1B and Segmind-Vega leave out blocks of both stages.
    """
    return unet_of(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 80),
        transformer_layers_per_block=(1, 2, 3),
        cross_attention_dim=TEXT_WIDTH + TEXT_WIDTH_2,
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=NUMBER_WIDTH,
        projection_class_embeddings_input_dim=POOLED_WIDTH + 6 * NUMBER_WIDTH,
    )


def take_over(unet: UNet2DConditionModel, other: Mapping[str, Tensor]) -> None:
    """Fill the U-Net with the weights of another, or from those of the other demo teacher's, to begin by doing much the
    same.

    The other's innermost stage and the attentions of its outermost are left out. Transformer blocks that it lacks begin
    by changing nothing, and so do the second text encoder and an image's numbers. Raises KeyError or RuntimeError for
    weights of another architecture.
    """
    own = unet.state_dict()
    alike = own.keys() == other.keys()
    unet.load_state_dict(other if alike else {name: initial(name, tensor, other) for name, tensor in own.items()})


def initial(name: str, tensor: Tensor, other: Mapping[str, Tensor]) -> Tensor:
    """What a tensor of the U-Net starts from: one of the other's weights, or its own random values, or zeros."""
    if name.startswith("add_embedding."):
        return torch.zeros_like(tensor) if "linear_2" in name else tensor
    added = re.search(r"transformer_blocks\.([1-9])\.(.*)", name)
    if added:
        closes = added[2].startswith(("attn1.to_out", "attn2.to_out", "ff.net.2"))
        return torch.zeros_like(tensor) if closes else tensor
    source = other[re.sub(r"^up_blocks\.(\d)", lambda match: f"up_blocks.{int(match[1]) + 1}", name)]
    if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
        return torch.cat((source, source.new_zeros(len(source), TEXT_WIDTH_2)), dim=1)
    return source.reshape(tensor.shape)

"""A pipeline's weights under the names of the original Stable Diffusion code (CompVis, "LDM"), as in a single file.

    model.diffusion_model.*               the U-Net
    first_stage_model.*                   the VAE
    cond_stage_model.transformer.*        the text encoder of SD-1.x (CLIP)
    cond_stage_model.model.*              the text encoder of SD-2.x (OpenCLIP)

Each function renames the state dict of one network of diffusers or transformers. A block of
N layers takes N + 1 places in the LDM's list of blocks, so pruned U-Nets have fewer places and need no special rule.
"""

from __future__ import annotations

import re

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import CLIPTextModel

# SD-2.x uses 23 of OpenCLIP's 24 layers, and diffusers loads no more than that.
OPEN_CLIP_LAYERS = 23
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def pipeline_weights(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """All tensors of a pipeline's single file. Raises ValueError if the layout has no place for one of them."""
    text_encoder = pipe.text_encoder
    if not isinstance(text_encoder, CLIPTextModel):
        kind = type(text_encoder).__name__
        raise ValueError(f"the text encoder is a {kind}, for which the single-file layout has no place")
    open_clip = is_open_clip(text_encoder)
    layers = text_encoder.config.num_hidden_layers
    if open_clip and layers > OPEN_CLIP_LAYERS:
        raise ValueError(
            f"the text encoder has {layers} layers, of which diffusers would load only {OPEN_CLIP_LAYERS} from a "
            "single file"
        )
    return single_file_weights(pipe.unet.state_dict(), pipe.vae.state_dict(), text_encoder.state_dict(), open_clip)


def is_open_clip(text_encoder: CLIPTextModel) -> bool:
    """Whether a text encoder is OpenCLIP's, as SD-2.x has; OpenAI's, of SD-1.x, has quick_gelu."""
    return text_encoder.config.hidden_act == "gelu"


def single_file_weights(
    unet: dict[str, Tensor], vae: dict[str, Tensor], text_encoder: dict[str, Tensor], open_clip: bool
) -> dict[str, Tensor]:
    """All tensors of the file. With `open_clip` the text encoder gets SD-2.x's layout, otherwise SD-1.x's.

    Raises ValueError, naming the tensor, if the layout has no place for one.
    """
    text = open_clip_weights(text_encoder) if open_clip else clip_weights(text_encoder)
    return {**unet_weights(unet), **vae_weights(vae), **text}


def unet_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The U-Net's tensors. The number of layers per block is counted from their names."""
    places = 1 + _count(weights, r"down_blocks\.0\.resnets\.(\d+)\.")
    with_attention = {int(m[1]) for key in weights if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", key))}
    return {UNET + _unet_key(key, places, with_attention): tensor for key, tensor in weights.items()}


def vae_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The VAE's tensors.

    The LDM numbers the decoder's blocks from the output side, and its attention layers are 1 x 1 convolutions, so
    (C, C) becomes (C, C, 1, 1).
    """
    blocks = _count(weights, r"decoder\.up_blocks\.(\d+)\.")
    named = {}
    for key, tensor in weights.items():
        is_projection = ".attentions." in key and tensor.ndim == 2
        named[VAE + _vae_key(key, blocks)] = tensor[:, :, None, None].contiguous() if is_projection else tensor
    return named


def clip_weights(weights: dict[str, Tensor], prefix: str = CLIP) -> dict[str, Tensor]:
    """The text encoder's tensors under SD-1.x's names, which are those of transformers with a prefix."""
    return {prefix + key.removeprefix("text_model."): tensor for key, tensor in weights.items()}


def open_clip_weights(weights: dict[str, Tensor], prefix: str = OPEN_CLIP) -> dict[str, Tensor]:
    """The text encoder's tensors under SD-2.x's names. Queries, keys and values are stacked in that order."""
    bare = {key.removeprefix("text_model."): tensor for key, tensor in weights.items()}
    named = {}
    for key, tensor in bare.items():
        matched = re.match(r"encoder\.layers\.(\d+)\.(.*)", key)
        if key in _OPEN_CLIP_ENDS:
            named[prefix + _OPEN_CLIP_ENDS[key]] = tensor
        elif not matched:
            raise ValueError(f"the single-file layout has no place for the text encoder's {key}")
        elif projected := re.fullmatch(r"self_attn\.[qkv]_proj\.(weight|bias)", matched[2]):
            projections = [bare[f"encoder.layers.{matched[1]}.self_attn.{name}_proj.{projected[1]}"] for name in "qkv"]
            named[f"{prefix}transformer.resblocks.{matched[1]}.attn.in_proj_{projected[1]}"] = torch.cat(projections)
        else:
            named[f"{prefix}transformer.resblocks.{matched[1]}.{_renamed(matched[2], _OPEN_CLIP_LAYER)}"] = tensor
    return named


def _unet_key(key: str, places: int, with_attention: set[int]) -> str:
    """`places` is the number of places per block in the LDM's list; `with_attention` holds the up blocks' numbers."""
    module, _, parameter = key.rpartition(".")
    if module in _UNET_ENDS:
        return f"{_UNET_ENDS[module]}.{parameter}"
    matched = re.match(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", key)
    if matched:
        half, block, kind, layer, rest = matched.groups()
        down = half == "down_blocks"
        place = int(block) * places + int(layer) + (1 if down else 0)
        stem = f"{'input_blocks' if down else 'output_blocks'}.{place}"
        return f"{stem}.0.{_renamed(rest, _RESNET)}" if kind == "resnets" else f"{stem}.1.{rest}"
    matched = re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", key)
    if matched:
        return f"input_blocks.{(int(matched[1]) + 1) * places}.0.op.{matched[2]}"
    matched = re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.*)", key)
    if matched:
        block = int(matched[1])
        return f"output_blocks.{(block + 1) * places - 1}.{2 if block in with_attention else 1}.conv.{matched[2]}"
    matched = re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", key)
    if matched:
        kind, layer, rest = matched.groups()
        if kind == "resnets":
            return f"middle_block.{2 * int(layer)}.{_renamed(rest, _RESNET)}"
        return f"middle_block.{2 * int(layer) + 1}.{rest}"
    raise ValueError(f"the single-file layout has no place for the U-Net's {key}")


def _vae_key(key: str, blocks: int) -> str:
    if re.match(r"(quant_conv|post_quant_conv|(encoder|decoder)\.conv_(in|out))\.", key):
        return key
    matched = re.match(r"(encoder|decoder)\.(.*)", key)
    half, rest = matched.groups() if matched else ("", key)
    if rest.startswith("conv_norm_out."):
        return f"{half}.{rest.replace('conv_norm_out', 'norm_out')}"
    matched = re.match(r"(down|up)_blocks\.(\d+)\.(?:(?:resnets\.(\d+)|(?:down|up)samplers\.0)\.)(.*)", rest)
    if matched:
        direction, block, layer, inner = matched.groups()
        number = int(block) if direction == "down" else blocks - 1 - int(block)
        part = f"{direction}sample" if layer is None else f"block.{layer}"
        return f"{half}.{direction}.{number}.{part}.{inner.replace('conv_shortcut', 'nin_shortcut')}"
    matched = re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", rest)
    if matched:
        kind, layer, inner = matched.groups()
        if kind == "resnets":
            return f"{half}.mid.block_{int(layer) + 1}.{inner.replace('conv_shortcut', 'nin_shortcut')}"
        return f"{half}.mid.attn_{int(layer) + 1}.{_renamed(inner, _VAE_ATTENTION)}"
    raise ValueError(f"the single-file layout has no place for the VAE's {key}")


def _renamed(key: str, names: dict[str, str]) -> str:
    """`key`, a module's name and a parameter's, with the module's name replaced."""
    module, _, parameter = key.rpartition(".")
    if module not in names:
        raise ValueError(f"the single-file layout has no place for {key}")
    return f"{names[module]}.{parameter}"


def _count(weights: dict[str, Tensor], pattern: str) -> int:
    return len({m[1] for key in weights if (m := re.match(pattern, key))})

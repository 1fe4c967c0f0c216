"""The demo teacher's networks, untrained: Stable Diffusion 1.x in everything but size.

A 64 x 64 image becomes latents of 4 x 16 x 16. The U-Net has the four down blocks, the middle block and the four
up blocks of SD-1.x with two layers each, so code that works with it also works with SD-1.x.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pipeline.demo.scenes import BACKGROUNDS, COUNT_WORDS, OBJECT_COLOURS, RELATIONS, SHAPES, SIDE, SIZES

LATENT_CHANNELS = 4
LATENT_SIDE = SIDE // 4
TEXT_WIDTH = 96
MAXIMUM_TOKENS = 24
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer, with merges that turn every word of a caption into one token.

    Other words are split into letters, as rare words are with CLIP's own vocabulary.
    """
    alphabet = _byte_alphabet()
    merges = _learn_merges(_caption_words())
    tokens = [*alphabet, *(letter + WORD_END for letter in alphabet), *map("".join, merges), START, END]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=MAXIMUM_TOKENS,
    )


def _caption_words() -> list[str]:
    shapes = [word for name, shape in SHAPES.items() for word in (name, shape.plural)]
    relations = [word for relation in RELATIONS for word in relation.split()]
    sizes = [size for size in SIZES if size]
    words = {*shapes, *relations, *sizes, *OBJECT_COLOURS, *BACKGROUNDS, *COUNT_WORDS.values()}
    return sorted(words | {"a", "an", "on", "background"})


def _byte_alphabet() -> list[str]:
    """The 256 printable characters by which byte-level BPE (GPT-2, CLIP) represents bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that turn every one of the words into a single token."""
    split = [[*word[:-1], word[-1] + WORD_END] for word in words]
    merges = []
    while pairs := [pair for pieces in split for pair in zip(pieces, pieces[1:], strict=False)]:
        best = max(sorted(set(pairs)), key=pairs.count)
        merges.append(best)
        split = [_merge(pieces, best) for pieces in split]
    return merges


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAXIMUM_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_text_encoders(tokenizer: CLIPTokenizer) -> dict[str, nn.Module]:
    """Token ids (B, 24) -> hidden states (B, 24, TEXT_WIDTH)."""
    return {"text_encoder": CLIPTextModel(text_config(tokenizer, TEXT_WIDTH, layers=3))}


def make_autoencoder() -> AutoencoderKL:
    """Images (B, 3, 64, 64) in [-1, 1] <-> latents (B, 4, 16, 16)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIDE,
        force_upcast=False,
    )


def make_unet() -> UNet2DConditionModel:
    """Noisy latents (B, 4, 16, 16), timesteps (B,), prompt_embeds (B, 24, TEXT_WIDTH) -> noise (B, 4, 16, 16).

    The two innermost widths are equal, as in SD. Otherwise a student without the innermost stage could not take over
    the teacher's weights.
    """
    return unet_of(
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(32, 64, 80, 80),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
    )


def unet_of(**config: Any) -> UNet2DConditionModel:
    """A U-Net for the latents of the demo, with what its `config` says besides."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=2,
        norm_num_groups=8,
        **config,
    )


def make_noise_scheduler() -> DDIMScheduler:
    """The noise schedule of SD-1.x."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def take_over(unet: UNet2DConditionModel, other: Mapping[str, Tensor]) -> None:
    """Fill the U-Net with the weights of another. Raises RuntimeError for those of another architecture."""
    unet.load_state_dict(other)

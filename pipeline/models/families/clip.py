"""CLIP's tokenizers and text encoders, which several families use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import CLIPTextConfig, CLIPTokenizer

from pipeline.models.reading import read_json

MODEL_TYPES = (None, "clip_text_model", "clip")
TRAINED_WITH = "Use the text encoder that the U-Net was trained with"


def prompt_length(tokenizer: CLIPTokenizer, text: CLIPTextConfig) -> int:
    """The tokens of a prompt, start and end included. A tokenizer without a limit has that of the text encoder."""
    return min(tokenizer.model_max_length, text.max_position_embeddings)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Any:
    """`input_ids` and `attention_mask` (B, L) int64, padded or cut to the tokenizer's length."""
    return tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )


def count_truncated(tokenizers: Sequence[CLIPTokenizer], captions: list[str]) -> int:
    """How many captions have more tokens than one of the tokenizers gives, start and end tokens included."""
    truncated = 0
    for first in range(0, len(captions), 1000):
        chosen = captions[first : first + 1000]
        tokens = [tokenizer(chosen, truncation=False, verbose=False).input_ids for tokenizer in tokenizers]
        limits = [tokenizer.model_max_length for tokenizer in tokenizers]
        truncated += sum(
            any(len(ids) > limit for ids, limit in zip(each, limits, strict=True)) for each in zip(*tokens, strict=True)
        )
    return truncated


def kind_problems(folder: Path, part: str, advice: str) -> Iterator[tuple[bool, str]]:
    """Whether a text encoder is CLIP's: (whether it holds, the problem and its remedy)."""
    kind = read_json(folder / part / "config.json").get("model_type")
    yield kind in MODEL_TYPES, f"its {spoken(part)} is a {kind!r}, not a CLIP text encoder. {advice}."


def width_problems(text: str, width: int, unet: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """Whether the U-Net takes prompt embeddings of this width. `text` is the beginning of the message."""
    stated = unet["encoder_hid_dim"] or unet["cross_attention_dim"]
    widths = list(stated) if isinstance(stated, list | tuple) else [stated]
    yield set(widths) == {width}, f"{text} have width {width}, but its U-Net takes {widths[0]}. {TRAINED_WITH}."


def config_problems(folder: Path, part: str) -> Iterator[tuple[bool, str]]:
    """Whether the config of the tokenizer `part` names its special tokens, as `kind_problems` gives it."""
    path = folder / part / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    for key in ("bos_token", "eos_token", "pad_token"):
        yield config.get(key, "") is not None, f"{path} has null for {key}. Name the token there, as CLIP's does."


def tokenizer_problems(
    tokenizer: CLIPTokenizer, part: str, text: CLIPTextConfig, encoder: str
) -> Iterator[tuple[bool, str]]:
    """Whether a tokenizer and a text encoder fit together, which are called `part` and `encoder` in their pipeline."""
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    named = f"its {spoken(part)}"
    yield (
        number < text.vocab_size,
        f"{named} has the token {token!r} with number {number}, but its {spoken(encoder)} knows only "
        f"{text.vocab_size} tokens. Remove the token, or save the pipeline after "
        f"{encoder}.resize_token_embeddings(len({part})) and training.",
    )
    limit = tokenizer.model_max_length
    yield type(limit) is int, f"{named}'s model_max_length is {limit!r}, not an integer. Correct it."
    length = prompt_length(tokenizer, text)
    yield length > 2, f"{named}'s model_max_length is {length}, which leaves no room for a prompt. Correct it."


def spoken(part: str) -> str:
    return part.replace("_", " ")

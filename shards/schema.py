"""The words of the format: versions, names of shards and members, and the error that readers raise."""

from __future__ import annotations

from typing import Any

FORMAT_VERSION = 1

MANIFEST = "manifest.json"
# Beside the latents: the (L, D) fp16 embedding of the empty prompt.
EMPTY_PROMPT = "empty_prompt_embeds.npy"
LATENTS = "latents"
PROMPT_EMBEDS = "prompt_embeds"
NOISE = "noise"
# With input perturbation: what is added to the latents in place of the noise.
INPUT_NOISE = "input_noise"
TEACHER_PRED = "teacher_pred"
TAP_PREFIX = "tap."


# The unit of a tar: a header takes one block, and data whole ones.
BLOCK = 512
# The columns of a sidecar's table: where a member's data lies in the tar, and what it must turn out to be.
COLUMNS = ("offset", "length", "raw_bytes", "crc32")


class ShardError(ValueError):
    """Something in a shard set that its owner can mend: the message names the file and the remedy."""


def image_key(index: int) -> str:
    """The key of an image's latents: its place in the sorted input.

    Keys hold no dots, because WebDataset cuts a member's name at the first one.
    """
    return f"{index:09d}"


def entry_key(image: str, round_index: int) -> str:
    """The key of one image's entry of one round."""
    return f"{image}-r{round_index:04d}"


def shard_names(entries: int, entries_per_shard: int, rounds: int | None = None) -> list[str]:
    """Every shard that a finished set holds, in order; each round has shards of its own.

    The plan follows from the counts alone, so any process, after any crash, knows the same one.
    """
    shards = range(-(-entries // entries_per_shard))
    if rounds is None:
        return [f"s{shard:05d}.tar" for shard in shards]
    return [f"r{round_index:04d}-s{shard:05d}.tar" for round_index in range(rounds) for shard in shards]


def round_of(shard: str) -> int | None:
    """The round of a shard by its name; None for latents."""
    return int(shard[1:].split("-")[0]) if shard.startswith("r") else None


def sidecar_name(shard: str) -> str:
    return shard.removesuffix(".tar") + ".json"


def added_noise(spec: dict[str, Any]) -> str:
    """The tensor that is added to the latents of a cache with that spec."""
    return INPUT_NOISE if spec.get("input_perturbation") else NOISE


def tap_member(tap: str) -> str:
    """The tensor name of a tap (`down_blocks.0` -> `tap.down_blocks.0`); a file ending follows it."""
    return TAP_PREFIX + tap

"""Latents as the later stages take them: opened, and held against the model that shall use them."""

from __future__ import annotations

from pathlib import Path

from diffusers import DiffusionPipeline

from pipeline.models.hashing import weights_sha256
from pipeline.system.errors import UserError
from shards.reader import ShardSet


def open_latents(directory: Path) -> ShardSet:
    """Finished latents. Raises ShardError for others, and UserError if there are none."""
    latents = ShardSet(directory, "latents")
    if not len(latents):
        raise UserError(f"{directory} holds no images: all were skipped, see its skipped.jsonl")
    return latents


def check_encoders(latents: ShardSet, base: DiffusionPipeline, model: str) -> None:
    """Raise UserError if the latents come from another VAE or text encoder than `model`'s pipeline has."""
    spec = latents.manifest.spec
    for name, module in (("VAE", base.vae), ("text encoder", base.text_encoder)):
        stated = spec[f"{name.lower().replace(' ', '_')}_sha256"]
        if weights_sha256(module) != stated:
            raise UserError(
                f"{latents.directory} was encoded with another {name} than {model} has: "
                "give the one that encode had, or encode again"
            )

"""The README.md in the folder of a finetuned model: what was trained, on what, and under which licence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.cache.latents import size_in_words
from pipeline.evaluation.model_card import (
    inline,
    integers_text,
    licence_fields,
    licence_text,
    settings_table,
    training_losses,
)
from pipeline.models.provenance import CARD
from shards.files import write_bytes

TRAINING = (
    "max_train_steps",
    "global_batch_size",
    "learning_rate",
    "lr_scheduler",
    "lr_warmup_steps",
    "lora_rank",
    "lora_format",
    "snr_gamma",
    "noise_offset",
    "input_perturbation",
    "uncond_fraction",
    "use_ema",
    "qat",
    "mixed_precision",
    "seed",
)


@dataclass(frozen=True)
class FinetuneCard:
    """All that a card is made from.

    `settings` are finetune's settings with the `global_batch_size` of its spec, `latents` the spec of the latents,
    `model` and `data` their origins (see `provenance`), and `metrics` the last line of metrics.jsonl.
    """

    settings: dict[str, Any]
    latents: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    metrics: dict[str, Any]


def write_finetune_card(out: Path, card: FinetuneCard) -> None:
    write_bytes(out / CARD, finetune_card(card).encode())


def finetune_card(card: FinetuneCard) -> str:
    """The complete text of README.md."""
    rank, model = card.settings["lora_rank"], inline(card.model["name"])
    what = f"LoRA weights of rank {rank} for the U-Net of {model}" if rank else f"{model}, with its U-Net finetuned"
    data = inline(card.data.get("name", "images"))
    made = {
        "base model": model,
        "data": f"{data}: {card.latents['entries']:,} images at {size_in_words(card.latents)}",
        **{name.replace("_", " "): card.settings[name] for name in TRAINING if card.settings.get(name) is not None},
    }
    header = {
        **licence_fields(card.model),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        **({"base_model": card.model["name"]} if card.model.get("hub") else {}),
        **({"datasets": [card.data["name"]]} if card.data.get("hub") else {}),
        "tags": ["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "distill-sd"]
        + (["lora"] if rank else []),
    }
    sections = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---",
        f"# {what}",
        _usage(card) + integers_text(card.settings.get("qat")),
        f"## How it was made\n\n{settings_table(made)}",
        f"## Results\n\n{training_losses(card.metrics) or 'Nothing was measured.'}",
        f"## Licence\n\n{licence_text(card.model, 'base model', 'These weights are')}",
    ]
    return "\n\n".join(sections) + "\n"


def _usage(card: FinetuneCard) -> str:
    name = card.settings.get("push_to_hub") or "path/to/this/folder"
    if card.settings["lora_rank"]:
        load = f'DiffusionPipeline.from_pretrained("path/to/the/base/model")\npipe.load_lora_weights("{name}")'
    else:
        load = f'DiffusionPipeline.from_pretrained("{name}")'
    return (
        "## Usage\n\n```python\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = {load}\npipe("a lighthouse at dusk", num_inference_steps=25).images[0].save("image.png")\n```'
    )

"""The README.md in a student's folder: what the student is, how it was made, what it scores, under which licence.

The text follows the model hub's form: a YAML head that the hub reads, then Markdown. `model_card` is pure; what it is
told is gathered by `write_model_card`, from the student's folder and from the cache that it was trained on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import UNet2DConditionModel

from pipeline.evaluation.settings import EVALUATION
from pipeline.evaluation.table import markdown, rows_of
from pipeline.models.families.sd import LEVELS
from pipeline.models.provenance import CARD, read_origin
from shards.files import write_bytes, write_json
from shards.manifest import read_manifest
from shards.schema import MANIFEST

TAGS = ["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "distillation", "distill-sd"]
SOURCE = "https://github.com/segmind/distill-sd"
PAPER = "https://arxiv.org/abs/2305.15798"
# What of the settings says how a student was trained; the rest is where it was done.
TRAINING = (
    "max_train_steps",
    "global_batch_size",
    "learning_rate",
    "lr_scheduler",
    "lr_warmup_steps",
    "output_weight",
    "feature_weight",
    "feature_loss",
    "snr_gamma",
    "use_ema",
    "mixed_precision",
    "init_from",
    "seed",
)


@dataclass(frozen=True)
class CardInputs:
    """All that a card is made from.

    `settings` are distill's with the `global_batch_size` of its spec, `cache` the cache's spec, `rounds` how many of
    it were trained on, `parameters` the student's U-Net's, `origin` what `origin.json` says, `metrics` the last line
    of metrics.jsonl, and `evaluation` what evaluation.json says, each as far as there is one.
    """

    settings: dict[str, Any]
    cache: dict[str, Any]
    rounds: int
    parameters: int
    origin: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)


def write_model_card(out: Path, settings: dict[str, Any]) -> None:
    """Write README.md of the student in `out`, trained with `settings` on the cache that they name."""
    cache = Path(settings["cache"])
    manifest = read_manifest(cache, "cache")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(out, subfolder="unet"))
    spec = json.loads((out / "spec.json").read_text(encoding="utf-8"))
    settings = {**settings, "global_batch_size": spec["global_batch_size"]}
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evaluation = out / EVALUATION
    known = CardInputs(
        settings,
        manifest.spec,
        settings.get("rounds") or manifest.rounds,
        unet.num_parameters(),
        read_origin(cache),
        json.loads(lines[-1]) if lines else {},
        json.loads(evaluation.read_text(encoding="utf-8")) if evaluation.is_file() else {},
    )
    write_bytes(out / CARD, model_card(known).encode())


def add_evaluation(out: Path, evaluation: dict[str, Any]) -> bool:
    """Put figures on the card of the student that `distill` left in `out`; whether there is such a card.

    What is kept beside it names no folders. The card is made anew from the cache; without that there is none.
    """
    path = out / "distill.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not settings or not (Path(settings["cache"]) / MANIFEST).is_file():
        return False
    figures = {part: evaluation[part] for part in ("cost", "fidelity", "quality")}
    write_json(out / EVALUATION, {"student": {"level": evaluation["student"]["level"]}, **figures})
    write_model_card(out, settings)
    return True


def model_card(known: CardInputs) -> str:
    """The whole text of README.md."""
    sections = [
        f"---\n{yaml.safe_dump(head(known), sort_keys=False, allow_unicode=True)}---",
        f"# {known.settings['level']}, distilled from {_teacher_name(known)}",
        _lead(known),
        _usage(known),
        f"## How it was made\n\n{_table(_made(known))}",
        f"## Figures\n\n{_figures(known)}",
        f"## Licence\n\n{_licence(known)}",
    ]
    return "\n\n".join(sections) + "\n"


def head(known: CardInputs) -> dict[str, Any]:
    """The hub's fields. Without a known licence there is none, and without a hub's name no base model."""
    teacher, data = known.origin.get("teacher", {}), known.origin.get("data", {})
    licence = {key: value for key, value in teacher.items() if key.startswith("license")}
    return {
        **licence,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        **({"base_model": teacher["name"]} if teacher.get("hub") else {}),
        **({"datasets": [data["name"]]} if data.get("hub") else {}),
        "tags": TAGS,
    }


def _teacher_name(known: CardInputs) -> str:
    name = known.origin.get("teacher", {}).get("name", "a teacher without a name")
    return "the demo teacher of distill-sd" if name == "demo" else name


def _lead(known: CardInputs) -> str:
    return (
        f"A text-to-image pipeline whose U-Net, of {known.parameters:,} parameters, was distilled offline from "
        f"{_teacher_name(known)}: {_left_out(known.settings['level'])}. Its VAE, text encoder and tokenizer are the "
        f"teacher's. The levels and the loss are those of [distill-sd]({SOURCE}) and of [BK-SDM]({PAPER})."
    )


def _left_out(level: str) -> str:
    rule = LEVELS[level]
    parts = [
        "it has one layer in a block where the teacher has two",
        *(() if rule.mid_block else ("no mid block",)),
        *(() if rule.innermost_stage else ("no innermost stage",)),
    ]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _usage(known: CardInputs) -> str:
    name = known.settings.get("push_to_hub") or "path/to/this/folder"
    return (
        "## Usage\n\n```python\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{name}")\n'
        'pipe("a lighthouse at dusk", num_inference_steps=25).images[0].save("image.png")\n```'
    )


def _made(known: CardInputs) -> dict[str, Any]:
    """What the table of the making says, by name."""
    cache, latents = known.cache, known.cache["latents"]
    codec = cache["codec"]
    stored = f"{codec['name']}, {codec['snr_db']:g} dB" if "snr_db" in codec else codec["name"]
    settings = {name: known.settings[name] for name in TRAINING if known.settings.get(name) is not None}
    if "init_from" in settings:
        settings["init_from"] = Path(settings["init_from"]).name
    return {
        "teacher": _teacher_name(known),
        **_named("teacher's revision", known.origin.get("teacher", {}).get("revision")),
        "sha256 of the teacher's U-Net": cache["teacher_sha256"],
        "prediction type": cache["prediction_type"],
        **_named("data", known.origin.get("data", {}).get("name")),
        "pictures": f"{cache['entries']:,} of {latents['resolution']} px",
        "entries": f"{cache['entries'] * known.rounds:,} in {known.rounds} rounds",
        "empty captions": f"{cache['uncond_fraction']:.0%}",
        "features stored as": stored,
        "level": known.settings["level"],
        **{name.replace("_", " "): value for name, value in settings.items()},
        "libraries of the cache": ", ".join(f"{name} {version}" for name, version in cache["libraries"].items()),
    }


def _named(name: str, value: str | None) -> dict[str, str]:
    return {name: value} if value else {}


def _figures(known: CardInputs) -> str:
    """The evaluation where there is one, and the last losses."""
    losses = {name: value for name, value in known.metrics.items() if name in ("loss", "task", "output")}
    feature = sum(value for name, value in known.metrics.items() if name.startswith("feature/"))
    parts = []
    if known.evaluation:
        parts.append(markdown(rows_of(known.evaluation)))
    if losses:
        parts.append(
            f"Losses at step {known.metrics['step']:,}, of the pictures that were trained on (mean squares; `task` to "
            "the noise schedule's target, `output` to the teacher's prediction):"
        )
        parts.append(_table({**losses, **({"features, summed": feature} if feature else {})}))
    return "\n\n".join(parts) or "None were measured."


def _licence(known: CardInputs) -> str:
    teacher = known.origin.get("teacher", {})
    name = teacher.get("license_name") or teacher.get("license")
    if not name:
        return (
            "Which licence the teacher has is not known here. The student's weights come from the teacher's, so the "
            "teacher's licence applies to them: look it up before you hand them on."
        )
    link = teacher.get("license_link")
    return (
        f"The teacher's licence is {f'[{name}]({link})' if link else name}. The student's weights come from the "
        "teacher's, so it applies to them too."
    )


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())])


def _cell(value: Any) -> str:
    shown = f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
    return shown.replace("|", "\\|").replace("\n", " ")

"""The README.md in a student's folder: what the student is, how it was made, its results and its licence.

The text follows the model hub's format: a YAML header that the hub reads, then Markdown. `model_card` is pure;
`write_model_card` gathers its inputs from the student's folder and from the cache that the student was trained on.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.cache.latents import size_in_words
from pipeline.evaluation.table import markdown, rows_of
from pipeline.models.fake_quant import QUANTISERS
from pipeline.models.levels import LEVELS
from pipeline.models.provenance import CARD, read_origin
from pipeline.models.weights import stored_parameters
from pipeline.settings.evaluate import EVALUATION
from pipeline.system.echo import plural, printable
from pipeline.system.errors import UserError
from pipeline.system.jsonl import read_jsonl
from pipeline.system.options import QAT_BITS
from pipeline.system.output import DEMOS
from pipeline.system.text_files import read_text
from shards.files import write_bytes, write_json
from shards.manifest import Manifest

TAGS = ["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "distillation", "distill-sd"]
SOURCE = "https://github.com/segmind/distill-sd"
PAPER = "https://arxiv.org/abs/2305.15798"
STUDENTS = "The student's weights are"
# The characters that mean something within a line of Markdown.
MARKDOWN = re.compile(r"([\\`*_\[\]<>#&!~])")
# The settings that affect the student; the others are paths and matters of the machine.
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
    "qat",
    "mixed_precision",
    "init_from",
    "seed",
)


@dataclass(frozen=True)
class CardInputs:
    """All that a card is made from.

    `settings` are distill's settings with the `global_batch_size` of its spec. `cache` is the cache's spec, `rounds`
    the number of its rounds that were trained on, and `parameters` counts the student's U-Net. `origin` is origin.json,
    `metrics` the last line of metrics.jsonl and `evaluation` evaluation.json. Each of these is empty if it is missing.
    """

    settings: dict[str, Any]
    cache: dict[str, Any]
    rounds: int
    parameters: int
    origin: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)


def write_model_card(out: Path, settings: dict[str, Any], cache: Path, manifest: Manifest) -> None:
    """Write README.md for the student in `out`, which was trained with `settings` on the cache of this manifest, whose
    small files are in the folder `cache`."""
    spec = json.loads((out / "spec.json").read_text(encoding="utf-8"))
    settings = {**settings, "global_batch_size": spec["global_batch_size"]}
    evaluation = out / EVALUATION
    inputs = CardInputs(
        settings=settings,
        cache=manifest.spec,
        rounds=settings.get("rounds") or manifest.rounds or 0,
        parameters=stored_parameters(out / "unet"),
        origin=read_origin(cache),
        metrics=last_metrics(out),
        evaluation=json.loads(evaluation.read_text(encoding="utf-8")) if evaluation.is_file() else {},
    )
    write_bytes(out / CARD, model_card(inputs).encode())


def add_evaluation(out: Path, evaluation: dict[str, Any]) -> None:
    """Put the results into the card of the student in `out`; its other sections stay as they are.

    The results are also stored in `out`, without the names of any folders. Raises UserError as `split_card` does.
    """
    before, after = split_card(out)
    results = {part: evaluation[part] for part in ("cost", "fidelity", "quality")}
    write_json(out / EVALUATION, {"student": {"level": evaluation["student"]["level"]}, **results})
    section = results_text(evaluation, last_metrics(out))
    write_bytes(out / CARD, f"{before}{section}\n{after}".encode())


def last_metrics(out: Path) -> dict[str, Any]:
    """The last line of metrics.jsonl that belongs to a step; empty if there is none."""
    return next((line for line in reversed(read_jsonl(out / "metrics.jsonl")) if "step" in line), {})


def split_card(out: Path) -> tuple[str, str]:
    """A card's text up to the content of its section Results, and from the next section on.

    Raises UserError if there is no such card.
    """
    path = out / CARD
    try:
        text = read_text(path)
    except (OSError, ValueError):
        raise UserError(f"{path} cannot be read, so no results can be added to it. Leave out --update-card.") from None
    found = re.search(r"^## Results[ \t]*$", text, re.MULTILINE)
    if found is None:
        raise UserError(f"{path} has no section Results. Add a line `## Results` to it, or leave out --update-card.")
    following = re.compile(r"^## ", re.MULTILINE).search(text, found.end())
    return f"{text[: found.end()]}\n\n", f"\n{text[following.start() :]}" if following else ""


def model_card(inputs: CardInputs) -> str:
    """The complete text of README.md."""
    sections = [
        f"---\n{yaml.safe_dump(head(inputs), sort_keys=False, allow_unicode=True)}---",
        f"# {inputs.settings['level']}, distilled from {_teacher_name(inputs)}",
        _lead(inputs) + integers_text(inputs.settings.get("qat")),
        _usage(inputs),
        f"## How it was made\n\n{settings_table(_made(inputs))}",
        f"## Results\n\n{results_text(inputs.evaluation, inputs.metrics)}",
        f"## Licence\n\n{licence_text(inputs.origin.get('teacher', {}), 'teacher', STUDENTS)}",
    ]
    return "\n\n".join(sections) + "\n"


def head(inputs: CardInputs) -> dict[str, Any]:
    """The fields that the hub reads. Licence, base model and data sets are left out if they are not known."""
    teacher, data = inputs.origin.get("teacher", {}), inputs.origin.get("data", {})
    return {
        **licence_fields(teacher),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        **({"base_model": teacher["name"]} if teacher.get("hub") else {}),
        **({"datasets": [data["name"]]} if data.get("hub") else {}),
        "tags": TAGS,
    }


def licence_fields(origin: dict[str, Any]) -> dict[str, str]:
    return {key: value for key, value in origin.items() if key.startswith("license")}


def _teacher_name(inputs: CardInputs) -> str:
    name = inputs.origin.get("teacher", {}).get("name", "an unnamed teacher")
    return f"the {name} teacher of distill-sd" if name in DEMOS else inline(name)


def _lead(inputs: CardInputs) -> str:
    source, follows = LEVELS[inputs.settings["level"]].source, "The levels and the loss follow"
    if source:
        follows = f"The shape of its U-Net is that of [{source[0]}]({source[1]}), and the loss follows"
    return (
        f"A text-to-image pipeline whose U-Net ({inputs.parameters:,} parameters) was distilled offline from "
        f"{_teacher_name(inputs)}: it has {LEVELS[inputs.settings['level']].summary}. "
        "Its VAE, text encoder and tokenizer are the "
        f"teacher's. {follows} [distill-sd]({SOURCE}) and [BK-SDM]({PAPER})."
    )


def integers_text(qat: str | None) -> str:
    """What a card says of a model that was trained with --qat: a paragraph, or nothing without."""
    if not qat:
        return ""
    return (
        f"\n\nIts U-Net was trained for integers: weights of {QAT_BITS[qat]} bits, with a range for each output "
        f"channel, and inputs of layers of 8 bits, with the ranges in `unet/{QUANTISERS}`. The first and the last "
        "convolution and the timestep's embedding stay in floats. diffusers loads the weights as floats, without "
        "rounding them. `distill-sd sample` and `evaluate` round as integers would, and `distill-sd export --format "
        "onnx` writes the integers."
    )


def _usage(inputs: CardInputs) -> str:
    name = inputs.settings.get("push_to_hub") or "path/to/this/folder"
    return (
        "## Usage\n\n```python\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{name}")\n'
        'pipe("a lighthouse at dusk", num_inference_steps=25).images[0].save("image.png")\n```'
    )


def _made(inputs: CardInputs) -> dict[str, Any]:
    """The rows of the table under "How it was made"."""
    cache, latents = inputs.cache, inputs.cache["latents"]
    codec = cache["codec"]
    stored = f"{codec['name']}, {codec['snr_db']:g} dB" if "snr_db" in codec else codec["name"]
    settings = {name: inputs.settings[name] for name in TRAINING if inputs.settings.get(name) is not None}
    if "init_from" in settings:
        settings["init_from"] = Path(settings["init_from"]).name
    return {
        "teacher": _teacher_name(inputs),
        **_named("teacher revision", inline(inputs.origin.get("teacher", {}).get("revision", ""))),
        "teacher U-Net sha256": cache["teacher_sha256"],
        "prediction type": cache["prediction_type"],
        **_named("data", inline(inputs.origin.get("data", {}).get("name", ""))),
        "images": f"{cache['entries']:,} at {size_in_words(latents)}",
        "entries": f"{cache['entries'] * inputs.rounds:,} in {plural(inputs.rounds, 'round')}",
        "empty captions": f"{cache['uncond_fraction']:.0%}",
        "features stored as": stored,
        "level": inputs.settings["level"],
        **{name.replace("_", " "): value for name, value in settings.items()},
        "cache libraries": ", ".join(f"{name} {version}" for name, version in cache["libraries"].items()),
    }


def _named(name: str, value: str | None) -> dict[str, str]:
    return {name: value} if value else {}


def results_text(evaluation: dict[str, Any], metrics: dict[str, Any]) -> str:
    """The evaluation, if there is one, and the last losses."""
    parts = [markdown(rows_of(evaluation))] if evaluation else []
    if losses := training_losses(metrics):
        parts.append(losses)
    return "\n\n".join(parts) or "Nothing was measured."


def training_losses(metrics: dict[str, Any]) -> str:
    """The losses of the last line of metrics.jsonl, as a table with its heading; empty if there are none."""
    losses = {name: value for name, value in metrics.items() if name in ("loss", "task", "output")}
    feature = sum(value for name, value in metrics.items() if name.startswith("feature/"))
    if not losses:
        return ""
    against = "the noise schedule's target"
    against += ", `output` against the teacher's prediction" if "output" in losses else ""
    heading = f"Training losses at step {metrics['step']:,} (mean square errors: `task` against {against}):"
    return f"{heading}\n\n{settings_table({**losses, **({'features, summed': feature} if feature else {})})}"


def licence_text(origin: dict[str, Any], source: str, derived: str) -> str:
    """What applies to weights that are `derived`, "The student's weights are", from those of `source`, "teacher"."""
    name = origin.get("license_name") or origin.get("license")
    if not name:
        return (
            f"The {source}'s licence is not known. {derived} derived from the {source}'s, so the {source}'s licence "
            "applies to them: check it before redistributing them."
        )
    link = web_address(origin.get("license_link", ""))
    name = inline(name)
    return (
        f"The {source}'s licence is {f'[{name}]({link})' if link else name}. {derived} derived "
        f"from the {source}'s, so it applies to them too."
    )


def inline(text: str) -> str:
    """Text of somebody else's as Markdown that shows it and nothing more: no HTML, links, or lines of its own."""
    return MARKDOWN.sub(r"\\\1", " ".join(printable(text).split()))


def web_address(link: str) -> str | None:
    """A link that a reader may follow: http or https, in one piece. Others are left out."""
    return link if re.fullmatch(r"https?://[^\s<>()\"\\\x00-\x1f]+", link) else None


def settings_table(rows: dict[str, Any]) -> str:
    """A Markdown table without padding: one cell may be a long hash."""
    lines = [f"| {_escaped(name)} | {_escaped(_cell(value))} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)

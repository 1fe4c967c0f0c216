"""`distill-sd evaluate`: a student beside its teacher. What it costs, how near it is, how good its pictures are.

cost.json, fidelity.json and pictures/ are what a run measures and draws, each kept when the command is run again;
evaluation.json, the table that is printed and report.html are made of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image

from pipeline.cache import sizes
from pipeline.cache.latents import check_encoders, open_latents
from pipeline.cache.output import free_bytes, require_space, write_settings
from pipeline.evaluation.cost import (
    folder_bytes,
    forward_seconds,
    parameters,
    picture_costs,
    pipeline_bytes,
    sample_size,
    unet_macs,
)
from pipeline.evaluation.fidelity import fidelity, pairs_of, read_held_out
from pipeline.evaluation.model_card import add_evaluation
from pipeline.evaluation.pair import Opened, level_of, open_model, ready
from pipeline.evaluation.quality import (
    FILTERS,
    INCEPTION_SCORE_SPLITS,
    Clip,
    Inception,
    Missing,
    Statistics,
    clip_score,
    frechet_distance,
    inception_features,
    inception_score,
    open_clip,
    open_inception,
    open_reference,
    open_torchmetrics,
    read_batches,
)
from pipeline.evaluation.report import write_evaluation
from pipeline.evaluation.table import markdown, rows_of
from pipeline.models.families.sd import LEVELS
from pipeline.models.load import DEVICES, DTYPES, device_name, load_noise_scheduler, process_state, resolve_dtype
from pipeline.models.provenance import CARD
from pipeline.sampling.folder import draw_pictures, missing_pictures
from pipeline.sampling.generate import SCHEDULERS, Sampler, load_pipeline, score_scenes
from pipeline.system.command import stage_command
from pipeline.system.errors import UserError
from pipeline.system.prompts import read_prompts
from pipeline.system.settings import REQUIRED, Settings, option
from shards.files import remove_leftovers, write_json
from shards.manifest import refuse_other_spec, sha256_of_json
from shards.reader import ShardSet

EVALUATION, COST, FIDELITY = "evaluation.json", "cost.json", "fidelity.json"
PICTURES, PICTURES_INDEX = "pictures", "pictures.json"
# A PNG of a photograph takes about this share of its pixels' bytes.
PNG_SHARE = 0.7


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Settings):
    student: str = option(REQUIRED, "The student's pipeline: a folder or a hub's name.")
    teacher: str = option(REQUIRED, "Its teacher's pipeline: a folder, a hub's name, or demo.")
    out: Path = option(REQUIRED, "Directory to write the table, the report and the pictures to.")
    level: str | None = option(None, "The student's level; by default found from its layers.", choices=tuple(LEVELS))
    latents: Path | None = option(None, "Directory that `encode` wrote of held-out pictures; without it no fidelity.")
    entries: int = option(64, "Held-out pictures to compare on.", low=1)
    bins: int = option(10, "Equal parts of the noise schedule; each picture is compared once in each.", low=1, high=100)
    prompts: Path | None = option(None, "Text file of prompts, one a line, to draw; without it no quality.")
    num_inference_steps: int = option(25, "Steps of the sampler.", low=1)
    guidance_scale: float = option(7.5, "Classifier-free guidance; 1 is none.", low=1.0)
    scheduler: str = option("pndm", "The sampler.", choices=tuple(SCHEDULERS))
    picture_size: int = option(256, "Side that pictures are resized to before they are measured, in pixels.", low=8)
    resize_filter: str = option("bicubic", "Pillow's filter that resizes them.", choices=tuple(FILTERS))
    reference: Path | None = option(
        None, "For FID: a folder of pictures, or an .npz or .safetensors file with mu and sigma."
    )
    inception_weights: Path | None = option(
        None, "For FID and Inception score: torch-fidelity's weights file, where it cannot be downloaded."
    )
    clip: Path | None = option(None, "For the CLIP score: folder of a CLIP that transformers saved.")
    repeats: int = option(5, "Turns that student and teacher take when they are timed; the median counts.", low=1)
    timing_batch_size: int = option(1, "Pictures in one forward pass when they are timed.", low=1)
    batch_size: int = option(8, "Pictures in one forward pass otherwise.", low=1)
    seed: int = option(0, "Seed of the first picture, each next one has the next; and of the held-out noise.", low=0)
    dtype: str = option("auto", "Precision; auto is fp16 on a CUDA GPU, else fp32.", choices=("auto", *DTYPES))
    device: str = option("auto", "auto takes the GPU if there is one.", choices=DEVICES)
    revision: str | None = option(None, "Revision of the teacher on the hub.")
    variant: str | None = option(None, "Variant of the teacher's weight files, such as fp16.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, path in (("reference", self.reference), ("inception-weights", self.inception_weights),
                           ("clip", self.clip)):  # fmt: skip
            if path is not None and self.prompts is None:
                raise UserError(
                    f"--{name} measures pictures, and there are none without --prompts: give a prompts file"
                )
            if path is not None and not path.exists():
                raise UserError(f"--{name} {path} does not exist: give the path of what was downloaded")

    def sampler(self, batch_size: int) -> Sampler:
        return Sampler(self.num_inference_steps, self.guidance_scale, batch_size, self.scheduler, seed=self.seed)


@dataclass(frozen=True)
class Task:
    """All that a run was given, opened and checked before anything is computed."""

    teacher: Opened
    student: Opened
    level: str
    latents: ShardSet | None
    prompts: list[str]
    reference: Statistics | list[Path] | None = None
    specs: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def both(self) -> dict[str, Opened]:
        return {"teacher": self.teacher, "student": self.student}


def run(settings: EvaluateSettings) -> None:
    """A student beside its teacher: cost, fidelity on held-out latents, and quality of pictures of given prompts."""
    task = open_task(settings)
    device = task.teacher.model.device
    inception, clip = open_networks(settings, device)
    settings.out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(settings.out, *(settings.out / PICTURES / name for name in task.both))
    write_settings(settings.out, "evaluate", settings)
    cost = kept(settings.out / COST, task.specs["cost"], lambda: measure_cost(settings, task))
    if task.latents:
        near = kept(settings.out / FIDELITY, task.specs["fidelity"], lambda: measure_fidelity(settings, task))
    else:
        near = {"missing": "needs --latents DIR, which `distill-sd encode` writes of pictures not trained on"}
    quality = {"missing": "needs --prompts FILE, a text file with one prompt a line"}
    if task.prompts:
        files = {name: draw(settings, task, name) for name in task.both}
        quality = measure_quality(settings, task, files, inception, clip)
    evaluation = {
        "teacher": {"model": settings.teacher},
        "student": {"model": settings.student, "level": task.level},
        "cost": cost, "fidelity": near, "quality": quality, "settings": settings.as_json(),
    }  # fmt: skip
    write_json(settings.out / EVALUATION, evaluation)
    write_evaluation(settings.out, evaluation, task.prompts, {n: settings.out / PICTURES / n for n in task.both})
    click.echo(markdown(rows_of(evaluation)))
    card = add_evaluation(task.student.folder, evaluation)
    click.echo(f"{settings.out} holds this in {EVALUATION} and report.html"
               + (f"; the figures are on the card, {task.student.folder / CARD}" if card else ""))  # fmt: skip


def open_task(settings: EvaluateSettings) -> Task:
    """Raises UserError or ShardError for whatever of it cannot be used, or is of another run than what --out holds."""
    prompts = read_prompts(settings.prompts) if settings.prompts else []
    latents = open_latents(settings.latents) if settings.latents else None
    reference = open_reference(settings.reference) if settings.reference else None
    device = process_state(settings.device).device
    dtype = DTYPES[resolve_dtype(settings.dtype, device)]
    teacher = open_model(settings.teacher, "--teacher", settings.revision, settings.variant, device, dtype)
    student = open_model(settings.student, "--student", None, None, device, dtype)
    level = level_of(teacher, student, settings.level)
    if latents is not None:
        check_encoders(latents, teacher.pipe, f"--teacher {settings.teacher}")
    task = Task(teacher, student, level, latents, prompts, reference)
    task.specs.update(specs_of(settings, task))
    for name, path in stores(settings.out).items():
        if name in task.specs and path.is_file():
            refuse_other_spec(path, read_store(path)["spec"], task.specs[name])
    return task


def specs_of(settings: EvaluateSettings, task: Task) -> dict[str, dict[str, Any]]:
    """What decides each part, for a later run on the same --out: other settings of a part are refused."""
    own = {name: opened.spec for name, opened in task.both.items()}
    dtype = resolve_dtype(settings.dtype, task.teacher.model.device)
    drawn = {**asdict(settings.sampler(settings.batch_size)), "dtype": dtype}
    specs = {
        "cost": {
            **own, "dtype": dtype, "device": device_name(task.teacher.model.device), "repeats": settings.repeats,
            "sampler": asdict(settings.sampler(settings.timing_batch_size)),
        },
    }  # fmt: skip
    if task.latents is not None:
        specs["fidelity"] = {
            **own, "dtype": dtype, "level": task.level, "latents": task.latents.manifest.spec_sha256,
            "entries": settings.entries, "bins": settings.bins, "seed": settings.seed,
        }  # fmt: skip
    if task.prompts:
        given = {"prompts": len(task.prompts), "prompts_sha256": sha256_of_json(task.prompts)}
        specs |= {name: {**own[name], **given, "sampler": drawn} for name in own}
    return specs


def stores(out: Path) -> dict[str, Path]:
    """The file of each part that says what it was made for."""
    pictures = {name: out / PICTURES / name / PICTURES_INDEX for name in ("teacher", "student")}
    return {"cost": out / COST, "fidelity": out / FIDELITY, **pictures}


def read_store(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {"spec": dict(stored["spec"]), "result": stored["result"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): delete it, and it is made again") from None


def kept(path: Path, spec: dict[str, Any], measure: Callable[[], Any]) -> Any:
    """What an earlier run measured for the same `spec`, from `path`; else measured now, and written there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"spec": spec, "result": measure()})
    return read_store(path)["result"]


def open_networks(settings: EvaluateSettings, device: torch.device) -> tuple[Inception | Missing, Clip | Missing]:
    """What judges pictures, or what it lacks: looked at first, so that a mistake does not wait for the pictures."""
    if not settings.prompts:
        return Missing("there are no pictures"), Missing("there are no pictures")
    inception = open_torchmetrics() or open_inception(settings.inception_weights, device)
    return inception, open_clip(settings.clip, device)


def measure_cost(settings: EvaluateSettings, task: Task) -> dict[str, Any]:
    """Of each the figures that evaluation_table.COSTS names; timed in turns."""
    models_of = {name: opened.model for name, opened in task.both.items()}
    pictures = picture_costs(models_of, settings.sampler(settings.timing_batch_size), settings.repeats)
    tokens = task.teacher.pipe.tokenizer.model_max_length
    unets = {name: ready(opened).unet for name, opened in task.both.items()}
    seconds = forward_seconds(unets, settings.timing_batch_size, tokens, settings.repeats)
    device = f"{device_name(task.teacher.model.device)}, {str(task.teacher.model.dtype).removeprefix('torch.')}"
    cost: dict[str, Any] = {"device": device, "batch_size": settings.timing_batch_size}
    for name, opened in task.both.items():
        parts = [part for part in opened.pipe.components.values() if isinstance(part, torch.nn.Module)]
        cost[name] = {
            "unet_parameters": parameters(opened.pipe.unet),
            "pipeline_parameters": sum(map(parameters, parts)),
            "macs": unet_macs(dict(opened.pipe.unet.config), tokens),
            "forward_seconds": seconds[name],
            "picture_seconds": pictures[name]["seconds"],
            "peak_memory": pictures[name]["peak_memory"],
            "unet_bytes": folder_bytes(opened.folder / "unet"),
            "pipeline_bytes": pipeline_bytes(opened.folder),
        }
    return cost


def measure_fidelity(settings: EvaluateSettings, task: Task) -> dict[str, Any]:
    held_out = read_held_out(task.latents, settings.entries)
    alphas_cumprod = load_noise_scheduler(task.teacher.folder, None).alphas_cumprod
    teacher, student = (ready(opened).unet for opened in (task.teacher, task.student))
    return fidelity(
        held_out, teacher, student, pairs_of(task.level), alphas_cumprod, settings.bins, settings.batch_size,
        settings.seed,
    )  # fmt: skip


def draw(settings: EvaluateSettings, task: Task, name: str) -> list[Path]:
    """The files of one model's pictures, drawn where they are missing."""
    folder = settings.out / PICTURES / name
    require_space(folder, missing_bytes(settings, task, name), "give fewer prompts")
    kept(folder / PICTURES_INDEX, task.specs[name], lambda: {"model": task.both[name].name})
    sampler = settings.sampler(settings.batch_size)
    return draw_pictures(
        folder, lambda: load_pipeline(task.both[name].model), task.prompts, sampler, f"{name}'s pictures"
    )


def missing_bytes(settings: EvaluateSettings, task: Task, name: str) -> int:
    """About what the pictures still to draw take on disk."""
    pipe = task.both[name].pipe
    height, width = (side * pipe.vae_scale_factor for side in sample_size(pipe.unet.config))
    return int(missing_pictures(settings.out / PICTURES / name, len(task.prompts)) * 3 * height * width * PNG_SHARE)


def measure_quality(
    settings: EvaluateSettings, task: Task, files: dict[str, list[Path]], inception: Inception | Missing,
    clip: Clip | Missing,
) -> dict[str, Any]:  # fmt: skip
    """The scores of both, or of each what it lacks."""
    scores = {
        **inception_scores(settings, task, files, inception),
        "clip_score": clip_scores(settings, task, files, clip),
    }
    facts = {name: score_scenes(map(Image.open, own), task.prompts) for name, own in files.items()}
    if None not in facts.values():
        scores["facts"] = facts
    protocol = (
        f"{settings.num_inference_steps} {settings.scheduler.upper()} steps, guidance {settings.guidance_scale:g}, "
        f"measured at {settings.picture_size} px ({settings.resize_filter})"
    )
    return {"pictures": len(task.prompts), "protocol": protocol, "scores": scores}


def batches(settings: EvaluateSettings, files: list[Path]):
    return read_batches(files, settings.picture_size, settings.resize_filter, settings.batch_size)


def inception_scores(
    settings: EvaluateSettings, task: Task, files: dict[str, list[Path]], inception: Inception | Missing
) -> dict[str, Any]:
    """FID and Inception score."""
    if isinstance(inception, Missing):
        return dict.fromkeys(("fid", "inception_score"), {"missing": inception.reason})
    count, reference = len(task.prompts), task.reference
    seen = {n: inception_features(batches(settings, own), inception, count, n) for n, own in files.items()}
    if isinstance(reference, list) and count >= 2:
        reference, _ = inception_features(batches(settings, reference), inception, len(reference), "reference")
    if reference is None:
        fid = {"missing": "needs --reference, a folder of pictures or a file of their statistics"}
    elif count < 2:
        fid = {"missing": "needs at least two pictures; give more prompts"}
    else:
        fid = {name: frechet_distance(reference, features) for name, (features, _) in seen.items()}
    fewest = 2 * INCEPTION_SCORE_SPLITS
    if count < fewest:
        return {"fid": fid, "inception_score": {"missing": f"needs at least {fewest} pictures; give more prompts"}}
    return {"fid": fid, "inception_score": {name: inception_score(logits) for name, (_, logits) in seen.items()}}


def clip_scores(
    settings: EvaluateSettings, task: Task, files: dict[str, list[Path]], clip: Clip | Missing
) -> dict[str, Any]:
    if isinstance(clip, Missing):
        return {"missing": clip.reason}
    device = task.teacher.model.device
    return {n: clip_score(batches(settings, own), task.prompts, clip, device, n) for n, own in files.items()}


def plan(settings: EvaluateSettings) -> list[str]:
    """What a run would measure and draw."""
    task = open_task(settings)
    there = stores(settings.out)
    lines = [f"level: {task.level}", f"cost: {'measured already' if there['cost'].is_file() else 'to measure'}"]
    if task.latents is not None:
        passes = 2 * settings.bins * min(settings.entries, len(task.latents))
        lines.append(f"fidelity: {'measured already' if there['fidelity'].is_file() else f'{passes} U-Net forwards'}")
    if task.prompts:
        folders = {name: settings.out / PICTURES / name for name in task.both}
        left = sum(missing_pictures(folder, len(task.prompts)) for folder in folders.values())
        size = sizes.in_words(sum(missing_bytes(settings, task, name) for name in task.both))
        lines.append(f"pictures: {2 * len(task.prompts)}, {left} of them still to draw, about {size}")
    return [*lines, f"free where it goes: {sizes.in_words(free_bytes(settings.out))}"]


command = stage_command("evaluate", EvaluateSettings, plan, run)

if __name__ == "__main__":
    command()

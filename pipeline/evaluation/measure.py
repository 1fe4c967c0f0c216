"""What `evaluate` measures: cost, fidelity and quality of a student and its teacher."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pipeline.evaluation.cost import folder_bytes, forward_seconds, image_costs, parameters, pipeline_bytes, unet_macs
from pipeline.evaluation.fidelity import fidelity, pairs_of, read_held_out
from pipeline.evaluation.pair import LoadedPipeline, on_device
from pipeline.evaluation.quality import (
    INCEPTION_SCORE_SPLITS,
    Clip,
    Inception,
    Missing,
    Statistics,
    clip_score,
    frechet_distance,
    inception_features,
    inception_score,
    read_batches,
)
from pipeline.evaluation.settings import EvaluateSettings
from pipeline.models.load import load_noise_scheduler
from pipeline.sampling.generate import Scorer
from pipeline.system.device import device_name
from pipeline.system.errors import UserError
from shards.files import write_json
from shards.reader import ShardSet


@dataclass(frozen=True)
class Task:
    """All that a run was given, opened and checked before anything is computed."""

    teacher: LoadedPipeline
    student: LoadedPipeline
    level: str
    latents: ShardSet | None
    prompts: list[str]
    reference: Statistics | list[Path] | None = None
    specs: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def both(self) -> dict[str, LoadedPipeline]:
        return {"teacher": self.teacher, "student": self.student}


def read_store(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {"spec": dict(stored["spec"]), "result": stored["result"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): delete it, and it is made again") from None


def cached_result(path: Path, spec: dict[str, Any], measure: Callable[[], Any]) -> Any:
    """What an earlier run measured for the same `spec`, from `path`; else measured now, and written there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"spec": spec, "result": measure()})
    return read_store(path)["result"]


def measure_cost(settings: EvaluateSettings, task: Task) -> dict[str, Any]:
    """Of each the figures that evaluation_table.COSTS names; timed in turns."""
    models_of = {name: opened.model for name, opened in task.both.items()}
    pictures = image_costs(models_of, settings.sampler(settings.timing_batch_size), settings.repeats)
    tokens = task.teacher.pipe.tokenizer.model_max_length
    unets = {name: on_device(opened).unet for name, opened in task.both.items()}
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
    teacher, student = (on_device(opened).unet for opened in (task.teacher, task.student))
    return fidelity(
        held_out,
        teacher,
        student,
        pairs_of(task.level),
        alphas_cumprod,
        settings.bins,
        settings.batch_size,
        settings.seed,
    )


def measure_quality(
    settings: EvaluateSettings,
    task: Task,
    files: dict[str, list[Path]],
    inception: Inception | Missing,
    clip: Clip | Missing,
    scorer: Scorer,
) -> dict[str, Any]:
    """The scores of both, or of each what it lacks."""
    scores = {
        **inception_scores(settings, task, files, inception),
        "clip_score": clip_scores(settings, task, files, clip),
    }
    facts = {name: scorer(map(Image.open, own), task.prompts) for name, own in files.items()}
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

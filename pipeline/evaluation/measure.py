"""The measurements of `evaluate`: cost, fidelity and quality of a student and its teacher."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

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
from pipeline.models.schedule import load_noise_scheduler
from pipeline.models.weights import stored_precisions
from pipeline.sampling.generate import Sampler, Scorer
from pipeline.settings.evaluate import EvaluateSettings
from pipeline.system.device import device_name
from pipeline.system.errors import UserError
from shards.files import write_json
from shards.reader import ShardSet


@dataclass(frozen=True)
class Task:
    """The inputs of a run, loaded and checked before anything is computed; `specs` determine the results by name."""

    teacher: LoadedPipeline
    student: LoadedPipeline
    level: str
    latents: ShardSet | None
    prompts: list[str]
    reference: Statistics | list[Path] | None = None
    specs: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def pipelines(self) -> dict[str, LoadedPipeline]:
        return {"teacher": self.teacher, "student": self.student}


def sampler_of(settings: EvaluateSettings, batch_size: int) -> Sampler:
    return Sampler(
        settings.num_inference_steps, settings.guidance_scale, batch_size, settings.scheduler, seed=settings.seed
    )


def cached_result(path: Path, spec: dict[str, Any], measure: Callable[[], Any]) -> Any:
    """The result that an earlier run stored in `path`; without one, measure it and store it with its `spec`."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"spec": spec, "result": measure()})
    return read_result(path)["result"]


def read_result(path: Path) -> dict[str, Any]:
    """A stored `result` and its `spec`. Raises UserError if the file is corrupt."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {"spec": dict(stored["spec"]), "result": stored["result"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is corrupt ({error!r}). Delete it to measure it again.") from None


def measure_cost(settings: EvaluateSettings, task: Task) -> dict[str, Any]:
    """The costs of both that evaluation.table.COSTS lists. The two take turns while they are timed."""
    models = {name: loaded.model for name, loaded in task.pipelines.items()}
    images = image_costs(models, sampler_of(settings, settings.timing_batch_size), settings.repeats)
    family = task.teacher.family
    conditioning = family.conditioning_shapes(task.teacher.folder)
    unets = {name: on_device(loaded).unet for name, loaded in task.pipelines.items()}
    seconds = forward_seconds(unets, settings.timing_batch_size, conditioning, family, settings.repeats)
    device = f"{device_name(task.teacher.model.device)}, {str(task.teacher.model.dtype).removeprefix('torch.')}"
    cost: dict[str, Any] = {"device": device, "batch_size": settings.timing_batch_size}
    for name, loaded in task.pipelines.items():
        parts = [part for part in loaded.pipe.components.values() if isinstance(part, torch.nn.Module)]
        cost[name] = {
            "unet_parameters": parameters(loaded.pipe.unet),
            "pipeline_parameters": sum(map(parameters, parts)),
            "macs": unet_macs(dict(loaded.pipe.unet.config), conditioning, family),
            "forward_seconds": seconds[name],
            "picture_seconds": images[name]["seconds"],
            "peak_memory": images[name]["peak_memory"],
            "unet_bytes": folder_bytes(loaded.folder / "unet"),
            "precision": " and ".join(stored_precisions(loaded.folder / "unet")) or "unknown precision",
            "pipeline_bytes": pipeline_bytes(loaded.folder),
        }
    return cost


def measure_fidelity(settings: EvaluateSettings, task: Task) -> dict[str, Any]:
    """Errors of the student's output and taps against the teacher's, on held-out latents."""
    assert task.latents is not None
    held_out = read_held_out(task.latents, settings.entries)
    alphas_cumprod = load_noise_scheduler(task.teacher.folder, None).alphas_cumprod
    teacher, student = (on_device(loaded).unet for loaded in (task.teacher, task.student))
    return fidelity(
        held_out,
        teacher,
        student,
        pairs_of(task.level, task.teacher.family),
        task.teacher.family,
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
    """The scores of the images in `files`, by model, and for each score that cannot be measured the reason."""
    scores = {
        **inception_scores(settings, task, files, inception),
        "clip_score": clip_scores(settings, task, files, clip),
    }
    facts = {name: scorer(map(Image.open, images), task.prompts) for name, images in files.items()}
    if None not in facts.values():
        scores["facts"] = facts
    protocol = (
        f"{settings.num_inference_steps} {settings.scheduler.upper()} steps, guidance {settings.guidance_scale:g}, "
        f"measured at {settings.picture_size} px ({settings.resize_filter})"
    )
    return {"pictures": len(task.prompts), "protocol": protocol, "scores": scores}


def inception_scores(
    settings: EvaluateSettings, task: Task, files: dict[str, list[Path]], inception: Inception | Missing
) -> dict[str, Any]:
    """FID and Inception score."""
    if isinstance(inception, Missing):
        return dict.fromkeys(("fid", "inception_score"), {"missing": inception.reason})
    count, reference = len(task.prompts), task.reference
    outputs = {
        name: inception_features(_batches(settings, images), inception, count, name) for name, images in files.items()
    }
    fid: dict[str, Any]
    if reference is None:
        fid = {"missing": "needs --reference, a folder of images or a file with their statistics"}
    elif count < 2:
        fid = {"missing": "needs at least two images; pass more prompts"}
    else:
        if isinstance(reference, list):
            batches = _batches(settings, reference)
            known: Statistics | Tensor = inception_features(batches, inception, len(reference), "reference")[0]
        else:
            known = reference
        fid = {name: frechet_distance(known, features) for name, (features, _) in outputs.items()}
    fewest = 2 * INCEPTION_SCORE_SPLITS
    if count < fewest:
        return {"fid": fid, "inception_score": {"missing": f"needs at least {fewest} images; pass more prompts"}}
    return {"fid": fid, "inception_score": {name: inception_score(logits) for name, (_, logits) in outputs.items()}}


def clip_scores(
    settings: EvaluateSettings, task: Task, files: dict[str, list[Path]], clip: Clip | Missing
) -> dict[str, Any]:
    if isinstance(clip, Missing):
        return {"missing": clip.reason}
    device = task.teacher.model.device
    return {
        name: clip_score(_batches(settings, images), task.prompts, clip, device, name) for name, images in files.items()
    }


def _batches(settings: EvaluateSettings, files: list[Path]) -> Iterator[torch.Tensor]:
    return read_batches(files, settings.picture_size, settings.resize_filter, settings.batch_size)

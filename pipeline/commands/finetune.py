"""`distill-sd finetune`: trains a pipeline's U-Net on latents, without a teacher.

A step: latents and conditioning -> new noise and timestep -> U-Net -> task loss -> backward -> AdamW.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch.utils.data import Dataset

from pipeline.cache.latents import (
    captions_of,
    check_encoders,
    open_latents,
    sampling_size,
    size_in_words,
)
from pipeline.core import draws
from pipeline.demo.oracle import score_scenes
from pipeline.evaluation.finetune_card import FinetuneCard, write_finetune_card
from pipeline.models.families import family_of_spec
from pipeline.models.hashing import config_of, weights_sha256
from pipeline.models.load import find_pipeline, load_base, load_unet, unet_config
from pipeline.models.provenance import data_origin, teacher_origin
from pipeline.models.schedule import load_noise_scheduler, read_noise_scheduler, schedule_of, set_prediction_type
from pipeline.sampling.generate import Sampler, check_sampler
from pipeline.sampling.process import PipelineRef, generate_in_process
from pipeline.settings.finetune import FinetuneSettings
from pipeline.settings.training import resolve_steps_and_lr, resume_fingerprint
from pipeline.system.device import DTYPES, leave_processes, resolve_dtype
from pipeline.system.echo import plural
from pipeline.system.json_files import read_json
from pipeline.system.jsonl import read_jsonl
from pipeline.system.lock import OutputLock
from pipeline.system.names import public_name
from pipeline.system.page import GRID_PICTURES, REPORT
from pipeline.training.accelerator import make_accelerator, resolve_precision
from pipeline.training.ending import finish
from pipeline.training.held_out import held_out_of
from pipeline.training.loader import OneProcess, collated_batches, order_of
from pipeline.training.loop import Training, prepare_training, run_training, start
from pipeline.training.lora import Lora, refuse_other_format
from pipeline.training.objective import Objective
from pipeline.training.output import (
    METRICS,
    SPEC,
    SPEC_REMEDY,
    VALIDATION,
    check_out,
    checkpointed_step,
    claim,
    finished_step,
    has_extras,
    nothing_left,
    refuse_damaged_result,
)
from pipeline.training.qat import qat_of
from pipeline.training.report import Report, circumstances, write_report
from pipeline.training.transform import Transform
from pipeline.training.validation import planned_images, validation_images
from shards.cache import empty_prompt
from shards.dataset import Batch, stack_tensors
from shards.location import Location
from shards.reader import StoredEntry
from shards.schema import LATENTS, conditioning_shapes
from shards.store import at_once


class LatentsDataset(Dataset):
    """The latents and conditioning of every image, in order."""

    def __init__(self, latents: Location) -> None:
        self.shards = open_latents(latents)
        self.conditioning = list(conditioning_shapes(self.shards.manifest.spec))

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def rounds(self) -> int:
        return 1

    def counts(self) -> list[int]:
        """The images of each bucket. Batches are of one."""
        return self.shards.counts()

    def __getitem__(self, index: int) -> StoredEntry:
        return self.shards.read(index, [LATENTS, *self.conditioning])

    def __getitems__(self, indices: Sequence[int]) -> list[StoredEntry]:
        return list(at_once(self.shards.store, self.__getitem__, indices))

    @property
    def in_flight(self) -> int:
        return self.shards.store.in_flight

    def collate(self, entries: list[StoredEntry]) -> list[StoredEntry]:
        return entries


def run(settings: FinetuneSettings) -> None:
    """Train a pipeline's U-Net on latents. Ends with a complete pipeline, or with LoRA weights."""
    check_out(settings, inputs_of(settings))
    with OutputLock(settings.out) as lock:
        train_model(settings, lock)


def inputs_of(settings: FinetuneSettings) -> dict[str, Location | str | None]:
    return {"--model": settings.model, "--latents": settings.latents}


def lora_of(settings: FinetuneSettings) -> Transform:
    return Lora(settings.lora_rank, settings.seed, settings.lora_format) if settings.lora_rank else Transform()


def train_model(settings: FinetuneSettings, lock: OutputLock) -> None:
    """Claim --out and train what is left."""
    settings = resolve_precision(settings)
    accelerator = make_accelerator(settings)
    dataset = LatentsDataset(settings.latents)
    settings = resolve_steps_and_lr(settings, len(dataset), accelerator.num_processes)
    folder = find_pipeline(settings.model, settings.revision, settings.variant, "--model")
    unet = load_unet(folder, settings.variant)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            claim(settings, finetune_spec(settings, folder, unet, dataset, accelerator.num_processes), lock)
    done = finished_step(settings.out)
    if done >= (settings.max_train_steps or 0) and accelerator.is_main_process:
        refuse_damaged_result(settings.out)
        if settings.lora_rank:
            refuse_other_format(settings.out, settings.lora_format)
    if nothing_left(settings, accelerator, "model", has_extras(settings)):
        leave_processes(accelerator)
        return

    problems = []
    if done < (settings.max_train_steps or 0):
        training = prepare(settings, folder, unet, dataset, accelerator)
        # After a resume, the U-Net of the checkpoint is trained and not this one.
        del unet
        stream = batches(settings, dataset, accelerator, training.position, len(training.alphas_cumprod))
        with closing(stream):
            problems = run_training(
                settings, accelerator, training, stream, lambda: save(settings, training, folder, dataset)
            )
        # The report needs the memory that the model takes.
        del training, stream
    else:
        del unet
    leave_processes(accelerator)
    if accelerator.is_main_process:
        what = "LoRA weights" if settings.lora_rank else "a diffusers pipeline"
        finish(
            settings,
            "model",
            f"{what} of {plural(finished_step(settings.out), 'step')}",
            lambda: save_report(settings, folder, dataset, accelerator.device),
            lambda: None,
            problems,
            note=prediction_note(settings, folder),
        )


def prediction_note(settings: FinetuneSettings, folder: Path) -> str | None:
    """What the pipeline that loads these LoRA weights has to be told, since their file cannot state it."""
    trained = settings.prediction_type
    if not settings.lora_rank or trained in (None, read_noise_scheduler(folder).config.prediction_type):
        return None
    return (
        f"note: with these LoRA weights the model predicts {trained}, which their file cannot state. Set "
        f"prediction_type to {trained} in the scheduler of the pipeline that loads them."
    )


def save_report(settings: FinetuneSettings, folder: Path, dataset: LatentsDataset, device: torch.device) -> None:
    """report.html, with images of some captions by the model before and after."""
    prompts, dtype = captions_of(dataset.shards, GRID_PICTURES), DTYPES[resolve_dtype("auto", device)]
    before = PipelineRef(folder, folder / "unet", device, dtype, settings.variant, settings.variant)
    after = (
        replace(before, lora=settings.out, prediction_type=settings.prediction_type)
        if settings.lora_rank
        else PipelineRef(settings.out, settings.out / "unet", device, dtype)
    )
    sampler = Sampler(size=sampling_size(dataset.shards, unet_config(folder)))
    lines, origin = read_jsonl(settings.out / METRICS), teacher_origin(settings.model, folder, settings.revision)
    spec, data = dataset.shards.manifest.spec, data_origin(settings.latents).get("name", "not known")
    with_lora = f" with LoRA of rank {settings.lora_rank}" if settings.lora_rank else ""
    report = Report(
        title=f"{origin['name']}, finetuned{with_lora}",
        about={
            "model": origin["name"],
            "data": f"{data}: {plural(len(dataset), 'image')} at {size_in_words(spec)}",
            **circumstances(device, settings.mixed_precision, lines),
        },
        settings=settings.for_others(),
        metrics=lines,
        rows={
            name: generate_in_process(model, prompts, sampler, name)
            for name, model in {"before": before, "after": after}.items()
        },
        validation=validation_images(settings.out / VALIDATION),
        passes={},
        scorer=score_scenes,
    )
    write_report(settings.out, report)


def save_card(settings: FinetuneSettings, folder: Path, dataset: LatentsDataset) -> None:
    lines = [line for line in read_jsonl(settings.out / METRICS) if "loss" in line]
    spec = read_json(settings.out / SPEC, SPEC_REMEDY)
    card = FinetuneCard(
        settings={**settings.as_json(), "global_batch_size": spec["global_batch_size"]},
        latents=dataset.shards.manifest.spec,
        model=teacher_origin(settings.model, folder, settings.revision),
        data=data_origin(settings.latents),
        metrics=lines[-1] if lines else {},
    )
    write_finetune_card(settings.out, card)


def finetune_spec(
    settings: FinetuneSettings, folder: Path, unet: UNet2DConditionModel, dataset: LatentsDataset, processes: int
) -> dict[str, Any]:
    """What the training of the `unet` of the pipeline in `folder` is, for a later run that continues it."""
    spec = resume_fingerprint(settings, processes, free=("model", "latents", "revision", "variant", "lora_format"))
    return {
        "latents": dataset.shards.manifest.spec_sha256,
        "shards_sha256": dataset.shards.digest(),
        "model": weights_sha256(unet),
        "model_config": config_of(unet),
        "noise_scheduler": schedule_of(load_noise_scheduler(folder, settings.prediction_type)),
        **spec,
    }


def prepare(
    settings: FinetuneSettings,
    folder: Path,
    unet: UNet2DConditionModel,
    dataset: LatentsDataset,
    accelerator: Accelerator,
) -> Training:
    """The U-Net, as passed or from the newest checkpoint, and everything that trains it, on the device."""
    check_model(settings, folder, dataset)
    spec, noise_scheduler = dataset.shards.manifest.spec, load_noise_scheduler(folder, settings.prediction_type)
    family, train_timesteps = family_of_spec(spec), len(noise_scheduler.alphas_cumprod)
    transform = lora_of(settings)
    if settings.qat:
        transform = qat_of(
            settings,
            accelerator,
            family,
            noise_scheduler,
            lambda these, where: batches(these, dataset, where, 0, train_timesteps),
        )
    student, state = start(settings, transform, lambda: unet)
    return prepare_training(
        settings,
        accelerator,
        student,
        state,
        objective=Objective(snr_gamma=settings.snr_gamma),
        transform=transform,
        family=family,
        dataset=dataset,
        noise_scheduler=noise_scheduler,
        base=folder,
        held_out=held_out_of(settings, spec, train_timesteps),
    )


def check_model(settings: FinetuneSettings, folder: Path, dataset: LatentsDataset) -> None:
    """Raise UserError for a pipeline that cannot be trained on these latents, or cannot generate validation images."""
    base, model = load_base(folder, settings.variant), f"--model {settings.model}"
    check_encoders(dataset.shards, base, model)
    noise_scheduler = load_noise_scheduler(folder, settings.prediction_type)
    if settings.validation_prompts:
        set_prediction_type(base.scheduler, noise_scheduler.config.prediction_type)
        check_sampler(base.scheduler, Sampler(), model)


def batches(
    settings: FinetuneSettings,
    dataset: LatentsDataset,
    accelerator: Accelerator | OneProcess,
    position: int,
    train_timesteps: int,
) -> Generator[Batch, None, None]:
    """Batches of this process, endlessly, from entry `position` on, with timesteps in [0, `train_timesteps`).

    Noise and timestep belong to an image and its visit, so they depend neither on the batch nor on the processes.
    """
    empty = empty_prompt(dataset.shards)
    size = settings.train_batch_size
    order = order_of(settings, dataset, accelerator, position)
    read = collated_batches(settings, dataset, accelerator, position)
    for entries, (bucket, first) in zip(read, order.places(), strict=False):
        visits = [order.visit(bucket, first + place) for place in range(size)]
        drawn = [
            draw_inputs(settings, entry, visit, train_timesteps) for entry, visit in zip(entries, visits, strict=True)
        ]
        timesteps, noise, added, unconditional = zip(*drawn, strict=True)
        conditioning = {
            name: torch.from_numpy(
                np.stack(
                    [
                        empty[name] if drop and name in empty else entry.tensors[name].values
                        for entry, drop in zip(entries, unconditional, strict=True)
                    ]
                )
            )
            for name in dataset.conditioning
        }
        batch = Batch(
            keys=tuple(entry.key for entry in entries),
            timesteps=torch.tensor(timesteps),
            latents=stack_tensors(entries, [LATENTS])[LATENTS],
            noise=torch.from_numpy(np.stack(noise)),
            conditioning=conditioning,
            teacher_pred=None,
            features={},
            input_noise=torch.from_numpy(np.stack(added)) if settings.input_perturbation else None,
        )
        yield batch.to(accelerator.device)


def draw_inputs(
    settings: FinetuneSettings, entry: StoredEntry, visit: int, train_timesteps: int
) -> tuple[int, np.ndarray, np.ndarray, bool]:
    """The random draws of one visit to an image: timestep, noise (C, H, W), the noise to add, and whether the prompt
    is empty."""
    seed, source_id = settings.seed, entry.meta["source_id"]
    timestep = int(draws.generator(seed, source_id, visit, "timestep").integers(train_timesteps))
    noise = draws.noise(seed, source_id, visit, entry.tensors[LATENTS].values.shape, settings.noise_offset)
    unconditional = draws.is_unconditional(seed, source_id, visit, settings.uncond_fraction)
    added = noise
    if settings.input_perturbation:
        added = draws.perturbed(seed, source_id, visit, noise, settings.input_perturbation)
    return timestep, noise, added, unconditional


def save(settings: FinetuneSettings, training: Training, folder: Path, dataset: LatentsDataset) -> None:
    """The finished pipeline or LoRA weights, and their model card."""
    (settings.out / REPORT).unlink(missing_ok=True)
    training.student.register_to_config(_name_or_path=public_name(settings.model))
    training.transform.convert(training.student, training.base, settings.out, training.prediction_type)
    save_card(settings, folder, dataset)


def plan(settings: FinetuneSettings) -> list[str]:
    """What a run would do."""
    check_out(settings, inputs_of(settings))
    dataset = LatentsDataset(settings.latents)
    folder = find_pipeline(settings.model, settings.revision, settings.variant, "--model")
    settings = resolve_steps_and_lr(settings, len(dataset), 1)
    check_model(settings, folder, dataset)
    held_out_of(settings, dataset.shards.manifest.spec, 1000)
    unet = load_unet(folder, settings.variant)
    lora_of(settings).prepare(unet)
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    return [
        f"images: {len(dataset)}",
        f"parameters: {trained:,} trained of {sum(p.numel() for p in unet.parameters()):,}",
        f"steps: {settings.max_train_steps}, {checkpointed_step(settings.out)} of them done",
        *planned_images(settings),
    ]

"""Training a pipeline's U-Net on latents, without a teacher: a student's last polish, or a style of one's own.

A step: latents and prompt embeddings -> fresh noise and timestep -> U-Net -> task loss -> backward -> AdamW.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch.utils.data import Dataset

from pipeline.cache.latents import check_encoders, open_latents
from pipeline.core import draws
from pipeline.core.diffusion import PREDICTION_TYPES
from pipeline.models.hashing import weights_sha256
from pipeline.models.hub import upload
from pipeline.models.load import find_pipeline, load_base, load_noise_scheduler, load_unet
from pipeline.models.save import save_pipeline
from pipeline.system.command import stage_command
from pipeline.system.options import HubOptions
from pipeline.system.settings import REQUIRED, option
from pipeline.training.checkpoint import list_checkpoints, load_checkpoint
from pipeline.training.loop import (
    CHECKPOINTS,
    Training,
    claim,
    finished_step,
    make_accelerator,
    make_loader,
    nothing_left,
    prepare_training,
    run_training,
)
from pipeline.training.lora import add_lora, load_adapter, save_adapter, save_lora
from pipeline.training.settings import TrainingSettings, resolve_steps_and_lr, resume_fingerprint
from shards.codec import decode_npy
from shards.dataset import Batch
from shards.manifest import read_file
from shards.reader import StoredEntry
from shards.schema import EMPTY_PROMPT, LATENTS, PROMPT_EMBEDS


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(TrainingSettings, HubOptions):
    model: str = option(REQUIRED, "Pipeline whose U-Net is trained: a student's folder, a hub's name, or demo.")
    latents: Path = option(REQUIRED, "Directory that `encode` wrote, with the model's own VAE and text encoder.")
    lora_rank: int | None = option(None, "Train LoRA adapters of this rank instead of the whole U-Net.", ge=1)
    noise_offset: float = option(0.0, "Standard deviation of a shift of each channel's noise.", ge=0.0)
    input_perturbation: float = option(0.0, "Strength of noise in the input that is not to be predicted.", ge=0.0)
    uncond_fraction: float = option(0.1, "Share of the entries that get the empty prompt.", ge=0.0, le=1.0)
    prediction_type: str | None = option(
        None, "What the U-Net predicts, where its scheduler says it wrongly.", choices=PREDICTION_TYPES
    )

    command = "finetune"
    # The loss is the task's alone.
    output_weight, feature_weight, feature_loss = 0.0, 0.0, "mse"


class LatentsDataset(Dataset):
    """Latents and prompt embeddings of every picture, in order."""

    def __init__(self, directory: Path) -> None:
        self.shards = open_latents(directory)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> StoredEntry:
        return self.shards.read(index, [LATENTS, PROMPT_EMBEDS])

    def collate(self, samples: list[StoredEntry]) -> list[StoredEntry]:
        return samples


def run(settings: FinetuneSettings) -> None:
    """Train a pipeline's U-Net on latents; ends with a whole pipeline, or with LoRA weights."""
    accelerator = make_accelerator(settings)
    dataset = LatentsDataset(settings.latents)
    settings = resolve_steps_and_lr(settings, len(dataset), accelerator.num_processes)
    folder = find_pipeline(settings.model, settings.revision, settings.variant, "--model")
    unet = load_unet(folder, settings.variant)
    with accelerator.main_process_first():
        claim(settings, finetune_spec(settings, unet, dataset, accelerator.num_processes))
    done = finished_step(settings.out)
    if nothing_left(settings, accelerator, "model"):
        return

    if done < settings.max_train_steps:
        training = prepare(settings, folder, unet, dataset, accelerator)
        # After a stop it is the checkpoint's that trains.
        del unet
        stream = batches(settings, dataset, accelerator, training.position, len(training.alphas_cumprod))
        run_training(settings, accelerator, training, stream, lambda: save(settings, folder, training.student))
    if accelerator.is_main_process:
        what = "LoRA weights" if settings.lora_rank else "a diffusers pipeline"
        click.echo(f"{settings.out} holds {what} of {finished_step(settings.out)} steps")
        if settings.push_to_hub:
            click.echo(f"uploaded to {upload(settings.out, settings.push_to_hub)}")
    accelerator.wait_for_everyone()


def finetune_spec(
    settings: FinetuneSettings, unet: UNet2DConditionModel, dataset: LatentsDataset, processes: int
) -> dict[str, Any]:
    """What the training is, for whoever would go on with it."""
    spec = resume_fingerprint(settings, processes, free=("model", "latents", "revision", "variant"))
    return {"latents": dataset.shards.manifest.spec_sha256, "model": weights_sha256(unet), **spec}


def prepare(
    settings: FinetuneSettings,
    folder: Path,
    unet: UNet2DConditionModel,
    dataset: LatentsDataset,
    accelerator: Accelerator,
) -> Training:
    """The U-Net, as given or of the newest checkpoint, and what trains it, on the device."""
    check_encoders(dataset.shards, load_base(folder, settings.variant), f"--model {settings.model}")
    checkpoints = list_checkpoints(settings.out / CHECKPOINTS)
    state, save_weights = None, None
    if settings.lora_rank:
        torch.manual_seed(settings.seed)
        add_lora(unet, settings.lora_rank)
        if checkpoints:
            _, state = load_checkpoint(checkpoints[-1][1], functools.partial(load_adapter, unet))
        save_weights = functools.partial(save_adapter, unet)
    elif checkpoints:
        unet, state = load_checkpoint(checkpoints[-1][1])
    noise_scheduler = load_noise_scheduler(folder, settings.prediction_type)
    return prepare_training(
        settings, accelerator, unet, state, dataset, noise_scheduler, folder, save_weights=save_weights
    )


def batches(
    settings: FinetuneSettings, dataset: LatentsDataset, accelerator: Accelerator, position: int, train_timesteps: int
) -> Iterator[Batch]:
    """Batches of this process, without end, from sample `position` on; timesteps are of [0, `train_timesteps`).

    Noise and timestep belong to a picture and its visit, so they hang neither on the batch nor on the processes.
    """
    empty = decode_npy(read_file(settings.latents, dataset.shards.manifest, EMPTY_PROMPT))
    size = settings.train_batch_size
    first = position + accelerator.process_index * size
    for samples in make_loader(settings, dataset, accelerator, position):
        visits = [(first + place) // len(dataset) for place in range(size)]
        drawn = [
            draw(settings, sample, visit, train_timesteps, empty) for sample, visit in zip(samples, visits, strict=True)
        ]
        keys = tuple(sample.key for sample in samples)
        latents = torch.from_numpy(np.stack([sample.tensors[LATENTS].values for sample in samples]))
        timesteps, noise, added, embeds = (torch.from_numpy(np.stack(each)) for each in zip(*drawn, strict=True))
        yield Batch(keys, timesteps, latents, noise, embeds, None, {}, added).to(accelerator.device)
        first += size * accelerator.num_processes


def draw(
    settings: FinetuneSettings, sample: StoredEntry, visit: int, train_timesteps: int, empty: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Of one visit to a picture: timestep int64, noise (C, H, W), noise added to it and prompt embedding (L, D)."""
    seed, source_id = settings.seed, sample.meta["source_id"]
    timestep = draws.generator(seed, source_id, visit, "timestep").integers(train_timesteps)
    noise = draws.noise(seed, source_id, visit, sample.tensors[LATENTS].values.shape, settings.noise_offset)
    unconditional = draws.is_unconditional(seed, source_id, visit, settings.uncond_fraction)
    added = noise
    if settings.input_perturbation:
        added = draws.perturbed(seed, source_id, visit, noise, settings.input_perturbation)
    return np.asarray(timestep), noise, added, empty if unconditional else sample.tensors[PROMPT_EMBEDS].values


def save(settings: FinetuneSettings, folder: Path, unet: UNet2DConditionModel) -> None:
    if settings.lora_rank:
        save_lora(unet, settings.out)
    else:
        unet.register_to_config(_name_or_path=settings.model)
        save_pipeline(folder, unet, settings.out)


def plan(settings: FinetuneSettings) -> list[str]:
    """What a run would do."""
    dataset = LatentsDataset(settings.latents)
    folder = find_pipeline(settings.model, settings.revision, settings.variant, "--model")
    settings = resolve_steps_and_lr(settings, len(dataset), 1)
    unet = load_unet(folder, settings.variant)
    if settings.lora_rank:
        add_lora(unet, settings.lora_rank)
    done = max([step for step, _ in list_checkpoints(settings.out / CHECKPOINTS)], default=0)
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    return [
        f"pictures: {len(dataset)}",
        f"parameters: {trained:,} trained of {sum(p.numel() for p in unet.parameters()):,}",
        f"steps: {settings.max_train_steps}, {done} of them done",
    ]


command = stage_command("finetune", FinetuneSettings, plan, run)

if __name__ == "__main__":
    command()

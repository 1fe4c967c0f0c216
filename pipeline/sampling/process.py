"""Generating images in a process of its own, so that its peak memory is that of the pipeline alone."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from pipeline.models.load import load_base, open_unet
from pipeline.sampling.generate import GeneratedImages, Sampler, generate
from pipeline.system.memory import give_back_freed_memory, peak_memory


@dataclass(frozen=True)
class PipelineRef:
    """Where a whole pipeline is: the folder of `base`, a U-Net's folder to put in it, and how to run them.

    `variant` names the U-Net's weight files, `base_variant` those of the other parts.
    """

    base: Path
    unet: Path
    device: torch.device
    dtype: torch.dtype
    variant: str | None = None
    base_variant: str | None = None


def generate_in_process(model: PipelineRef, prompts: list[str], sampler: Sampler, description: str) -> GeneratedImages:
    """`generate` in a fresh process, whose peak memory is the drawing's alone."""
    with generating_process(model) as draw:
        return draw(prompts, sampler, description)


@contextmanager
def generating_process(model: PipelineRef) -> Iterator[Callable[[list[str], Sampler, str | None], GeneratedImages]]:
    """`generate` with a pipeline that is loaded once, in a process that lives as long as the block.

    What this process has freed is given back to the system for it.
    """
    give_back_freed_memory()
    context = multiprocessing.get_context("forkserver")
    # The imports take longer than many a drawing; the server has them ready for the next one.
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        yield lambda *request: pool.submit(_draw_here, model, *request).result()


def _draw_here(model: PipelineRef, prompts: list[str], sampler: Sampler, description: str | None) -> GeneratedImages:
    pipe, before = _loaded(model)
    samples = generate(pipe, prompts, sampler, description)
    return replace(samples, peak_memory=peak_memory(model.device) - before)


@functools.cache
def _loaded(model: PipelineRef) -> tuple[DiffusionPipeline, int]:
    """The pipeline, and the memory in bytes that the process had held before it."""
    before = peak_memory(model.device)
    return load_pipeline(model), before


def load_pipeline(model: PipelineRef) -> DiffusionPipeline:
    """The pipeline, ready to draw."""
    unet = open_unet(model.unet, model.variant, model.dtype)
    pipe = load_base(model.base, model.base_variant, unet)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.to(model.device) if part is unet else part.to(model.device, model.dtype)
    unet.to(memory_format=torch.channels_last)
    return pipe

"""Generating images in a separate process, so that its peak memory is the pipeline's alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from pipeline.models.load import load_base, load_deployed_unet
from pipeline.models.schedule import set_prediction_type
from pipeline.sampling.generate import GeneratedImages, Sampler, generate
from pipeline.system.children import bound_children, forkserver
from pipeline.system.memory import give_back_freed_memory, peak_memory


@dataclass(frozen=True)
class PipelineRef:
    """Where a complete pipeline is, and how to run it: the folders of `base` and of the U-Net that it is run with.

    `variant` names the U-Net's weight files and `base_variant` those of the other parts. `lora` is a folder of LoRA
    weights for the U-Net, and `prediction_type` what it predicts where that is not what the base states.
    """

    base: Path
    unet: Path
    device: torch.device
    dtype: torch.dtype
    variant: str | None = None
    base_variant: str | None = None
    lora: Path | None = None
    prediction_type: str | None = None


def generate_in_process(model: PipelineRef, prompts: list[str], sampler: Sampler, description: str) -> GeneratedImages:
    """`generate` in a new process, whose peak memory is that of the generation alone."""
    with generating_process(model) as generate_images:
        return generate_images(prompts, sampler, description)


@contextmanager
def generating_process(model: PipelineRef) -> Iterator[Callable[[list[str], Sampler, str | None], GeneratedImages]]:
    """`generate` with a pipeline that is loaded once, in a process that lives as long as the block.

    This process first returns its freed memory to the system, so that the new one can use it.
    """
    give_back_freed_memory()
    with bound_children() as (bound, end_child):
        # Importing often takes longer than generating; the server keeps the modules imported for the next process.
        pool = ProcessPoolExecutor(1, mp_context=forkserver(__name__), initializer=bound)
        try:
            yield lambda *request: pool.submit(_generate_here, model, *request).result()
        except BaseException:
            # It ignores Ctrl-C, and nobody wants what it generates any more.
            end_child()
            raise
        finally:
            pool.shutdown()


def load_pipeline(model: PipelineRef) -> DiffusionPipeline:
    """The pipeline with its U-Net, on its device and in its precision."""
    if model.device.type == "cuda" and model.device.index is not None:
        torch.cuda.set_device(model.device)
    unet = load_deployed_unet(model.unet, model.variant, model.dtype)
    pipe = load_base(model.base, model.base_variant, unet)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.to(model.device) if part is unet else part.to(model.device, model.dtype)
    unet.to(memory_format=torch.channels_last)
    if model.lora:
        pipe.load_lora_weights(model.lora)
    if model.prediction_type:
        set_prediction_type(pipe.scheduler, model.prediction_type)
    return pipe


def _generate_here(
    model: PipelineRef, prompts: list[str], sampler: Sampler, description: str | None
) -> GeneratedImages:
    is_cold = _cached_pipeline.cache_info().misses == 0
    pipe, memory_before = _cached_pipeline(model)
    if is_cold:
        # The first step of a process takes much longer than the others.
        generate(pipe, prompts[: sampler.batch_size], replace(sampler, steps=1, scheduler="dpm"), None)
    samples = generate(pipe, prompts, sampler, description)
    return replace(samples, peak_memory=peak_memory(model.device) - memory_before)


@functools.cache
def _cached_pipeline(model: PipelineRef) -> tuple[DiffusionPipeline, int]:
    """The pipeline, and the peak memory in bytes of this process before it was loaded."""
    memory_before = peak_memory(model.device)
    return load_pipeline(model), memory_before

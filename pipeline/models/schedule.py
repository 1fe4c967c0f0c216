"""The noise schedule that a teacher was trained with, from the config of its sampling scheduler."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DDPMScheduler

from pipeline.core.diffusion import PREDICTION_TYPES
from pipeline.models.reading import read_json, reading
from pipeline.system.errors import UserError

CONFIG = "scheduler_config.json"
# diffusers' schedulers that noise along a schedule of betas. Flow matching and EDM have none, although their configs
# share keys with these.
BETA_SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DDIMParallelScheduler",
    "DDPMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
# What decides how training noises latents and what the network predicts.
SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")


def load_noise_scheduler(folder: Path, prediction_type: str | None) -> DDPMScheduler:
    """The noise schedule of the pipeline in `folder`, to train with. `prediction_type` overrides its config.

    Keys of the schedule that the config leaves out have the defaults of the config's own class. Raises UserError for a
    scheduler without a schedule of betas, or with a prediction type that cannot be trained, on any schedule or on its
    own.
    """
    noise_scheduler = read_noise_scheduler(folder)
    if prediction_type:
        set_prediction_type(noise_scheduler, prediction_type)
    stated = noise_scheduler.config.prediction_type
    if stated not in PREDICTION_TYPES:
        raise UserError(
            f"{folder / 'scheduler' / CONFIG} has prediction type {stated!r}, which is not supported. "
            f"Set --prediction-type to one of {', '.join(PREDICTION_TYPES)}."
        )
    if stated == "epsilon" and noise_scheduler.alphas_cumprod[-1] == 0:
        raise UserError(
            f"{folder / 'scheduler' / CONFIG} has prediction type epsilon and a terminal SNR of zero "
            "(rescale_betas_zero_snr). Then the last timestep is noise alone, and a prediction of the noise says "
            "nothing of the image. Set --prediction-type v_prediction if the model predicts v, or else remove "
            "rescale_betas_zero_snr there."
        )
    return noise_scheduler


def schedule_of(noise_scheduler: DDPMScheduler) -> dict[str, Any]:
    """The keys of a noise schedule's config that decide how training noises latents and what is predicted."""
    return {key: noise_scheduler.config[key] for key in (*SCHEDULE, "rescale_betas_zero_snr")}


def stated_prediction_type(config: dict[str, Any]) -> str:
    """What a scheduler's config file says that the network predicts."""
    return config.get("prediction_type", "epsilon")


def set_prediction_type(scheduler: Any, prediction_type: str) -> None:
    """Have a scheduler's config state a prediction type, also where its file leaves it out."""
    defaults = [key for key in scheduler.config.get("_use_default_values", ()) if key != "prediction_type"]
    scheduler.register_to_config(prediction_type=prediction_type, _use_default_values=defaults)


def read_noise_scheduler(folder: Path) -> DDPMScheduler:
    """The noise schedule of the pipeline in `folder`, whatever it predicts."""
    path = folder / "scheduler" / CONFIG
    config = read_json(path)
    name = config.get("_class_name", "DDPMScheduler")
    if name not in BETA_SCHEDULERS:
        raise UserError(no_betas(name))
    return reading(path, lambda: DDPMScheduler.from_config({**default_schedule(name), **config}))


def default_schedule(name: str) -> dict[str, Any]:
    """The values that a scheduler class of diffusers gives to the keys of SCHEDULE."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    return {key: parameters[key].default for key in SCHEDULE if key in parameters}


def no_betas(name: Any, scheduler: str = "its scheduler") -> str:
    return (
        f"{scheduler} is a {name}, which has no schedule of betas, as flow matching and EDM have not. "
        "Use a teacher that was trained on one, such as with DDPM"
    )

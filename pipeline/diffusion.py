"""The maths of diffusion training, pure: noising, and what a network is asked to predict."""

from __future__ import annotations

from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction")


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise (Ho et al. 2020, eq. 4), in float32.

    latents, noise (B, C, H, W) of any float type; timesteps (B,) int64; alphas_cumprod (T,) float32.
    """
    signal, sigma = _scales(timesteps, alphas_cumprod)
    return signal * latents.float() + sigma * noise.float()


def target(latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, prediction_type: str) -> Tensor:
    """What the network should output, float32 (B, C, H, W).

    epsilon: the noise. v_prediction: sqrt(a_t) noise - sqrt(1 - a_t) x_0 (Salimans & Ho 2022, app. D).
    """
    if prediction_type == "epsilon":
        return noise.float()
    if prediction_type == "v_prediction":
        signal, sigma = _scales(timesteps, alphas_cumprod)
        return signal * noise.float() - sigma * latents.float()
    raise ValueError(f"prediction type {prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}")


def _scales(timesteps: Tensor, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    alpha = alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
    return alpha.sqrt(), (1 - alpha).sqrt()

"""The maths of diffusion training: adding noise, the prediction target, and Min-SNR weights. Pure functions."""

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


def min_snr_weights(timesteps: Tensor, alphas_cumprod: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Min-SNR weights (B,) float32 of a squared error in the network's output (Hang et al. 2023, sec. 3.4).

    With snr = a_t / (1 - a_t): min(snr, gamma) / snr for epsilon, and over snr + 1 for v_prediction, so that
    in both cases the error in x_0 has weight min(snr, gamma). At snr 0 that is 1 and 0.
    """
    alpha = alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alpha / (1 - alpha)
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    # Equal to min(snr, gamma) / snr, but without 0 / 0.
    return gamma / snr.clamp(min=gamma)


def _scales(timesteps: Tensor, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    alpha = alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
    return alpha.sqrt(), (1 - alpha).sqrt()

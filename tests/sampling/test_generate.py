"""Samplers: the noise schedule that they take from a pipeline, and which are refused before anything is computed."""

import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from support.tiny import tiny_pipeline

from pipeline.sampling.generate import SCHEDULERS, Sampler, check_sampler, generate, image_size, sampling_scheduler
from pipeline.system.errors import UserError

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def refusal(own, **sampler):
    with pytest.raises(UserError) as caught:
        check_sampler(own, Sampler(**sampler), "--model M")
    return str(caught.value)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    "own",
    [
        DEISMultistepScheduler(**BETAS),
        DDPMScheduler(beta_schedule="sigmoid"),
        PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
        DDIMScheduler(trained_betas=[0.001 + 0.00001 * i for i in range(1000)]),
    ],
    ids=lambda own: type(own).__name__,
)
def test_every_sampler_follows_the_pipelines_betas(own, name):
    check_sampler(own, Sampler(scheduler=name), "--model M")
    torch.testing.assert_close(sampling_scheduler(own, name).alphas_cumprod, own.alphas_cumprod)


def test_keys_of_another_solver_are_not_carried_over():
    own = DEISMultistepScheduler(**BETAS, solver_type="logrho", algorithm_type="deis", solver_order=3)
    own.register_to_config(final_sigmas_type=0)
    config, plain = sampling_scheduler(own, "dpm").config, DPMSolverMultistepScheduler().config
    for key in ("solver_type", "algorithm_type", "solver_order", "final_sigmas_type"):
        assert config[key] == plain[key]


def test_keys_of_the_same_solver_are_kept():
    own = DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True, solver_order=3)
    assert dict(sampling_scheduler(own, "dpm").config) == dict(own.config)


def test_latents_are_not_clipped():
    """DDIM clips by default, which is for pixels."""
    assert sampling_scheduler(EulerDiscreteScheduler(**BETAS), "ddim").config.clip_sample is False


def test_a_zero_terminal_snr_is_carried_over_or_the_sampler_refused():
    own = DDIMScheduler(**BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    for name in ("dpm", "ddim", "euler", "euler-ancestral", "unipc"):
        assert sampling_scheduler(own, name).config.rescale_betas_zero_snr
        check_sampler(own, Sampler(scheduler=name), "--model M")
    for name in ("heun", "pndm"):
        assert f"{name} does not reach a terminal SNR of zero" in refusal(own, scheduler=name)


@pytest.mark.parametrize("name", ["pndm", "euler-ancestral"])
def test_a_prediction_type_that_the_sampler_lacks_is_refused(name):
    own = DDIMScheduler(**BETAS, prediction_type="sample")
    assert f"the scheduler {name} cannot sample from --model M in 25 steps" in refusal(own, scheduler=name)
    check_sampler(own, Sampler(), "--model M")


def test_a_schedule_that_gives_nan_or_too_few_timesteps_is_refused():
    assert "it gives NaN or Inf" in refusal(DDIMScheduler(beta_start=0.0, beta_end=0.0))
    own = DDIMScheduler(num_train_timesteps=4)
    assert "cannot sample from --model M in 25 steps, but it can in 4." in refusal(own, scheduler="ddim")


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_sampler_that_needs_more_steps_says_how_many(steps):
    """PNDM begins with four Runge-Kutta steps, unless the pipeline says that it skips them."""
    assert refusal(DDIMScheduler(**BETAS), scheduler="pndm", steps=steps).endswith(
        ", but it can in 4. Choose another number of steps, or another scheduler."
    )
    check_sampler(PNDMScheduler(**BETAS, skip_prk_steps=True), Sampler(scheduler="pndm", steps=steps), "--model M")


@pytest.mark.parametrize("size", [16, [16, 24], None])
def test_an_image_has_the_size_of_the_u_net_or_else_of_the_vae(size):
    pipe = tiny_pipeline(sample_size=size)
    image = generate(pipe, ["a"], Sampler(steps=1), None).images[0]
    assert (image.height, image.width) == image_size(pipe) == ((32, 48) if size == [16, 24] else (32, 32))


def test_a_vae_may_state_two_sides_as_well():
    pipe = tiny_pipeline(sample_size=None)
    pipe.vae.register_to_config(sample_size=[32, 49])
    assert image_size(pipe) == (32, 48)


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [(torch.float32, "Check the weights and configs"), (torch.bfloat16, "Use --dtype fp32 or bf16, or another VAE")],
)
def test_images_of_nan_are_refused_and_not_saved_as_black(dtype, remedy):
    pipe = tiny_pipeline().to(dtype=dtype)
    pipe.vae.decoder.conv_out.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match=f"the image of 'a red cat' is NaN.*{remedy}"):
        generate(pipe, ["a red cat"], Sampler(steps=2), None)


def test_a_vae_that_cannot_decode_in_slices_decodes_at_once():
    pipe = tiny_pipeline()
    pipe.register_modules(
        vae=AsymmetricAutoencoderKL(
            down_block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_out_channels=(8, 8),
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        )
    )
    found = generate(pipe, ["a"], Sampler(steps=1, size=(16, 16)), None)
    assert found.images[0].size == (16, 16)

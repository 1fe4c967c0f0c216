"""A student is a Stable Diffusion pipeline like any other: what people use with one works with it."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from support.stages import pruned_pipeline

LEVELS = ("sd_small", "sd_tiny")


@pytest.fixture(scope="module", params=LEVELS)
def student(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    pruned_pipeline(request.param).save_pretrained(folder)
    return folder


def loaded(kind, student):
    pipe = kind.from_pretrained(student)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, prompt="a cat", **options):
    """One image (H, W, 3), or with output_type="latent" its latents, always of the same noise."""
    options = {"num_inference_steps": 3, "output_type": "np", **options}
    return np.asarray(pipe(prompt, generator=torch.Generator().manual_seed(0), **options).images[0])


def noise_image(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_text_to_image(student):
    pipe = loaded(StableDiffusionPipeline, student)
    cat, dog = drawn(pipe), drawn(pipe, "a dog")
    assert cat.shape == (32, 32, 3)
    assert np.isfinite(cat).all()
    assert not np.allclose(cat, dog)


def test_image_to_image(student):
    """Both the initial image and the prompt matter."""
    pipe = loaded(StableDiffusionImg2ImgPipeline, student)
    first = drawn(pipe, image=noise_image(1), strength=0.7)
    assert first.shape == (32, 32, 3)
    assert np.isfinite(first).all()
    assert not np.allclose(first, drawn(pipe, image=noise_image(2), strength=0.7))
    assert not np.allclose(first, drawn(pipe, "a dog", image=noise_image(1), strength=0.7))


def test_inpainting_paints_where_the_mask_is(student):
    """The right half is painted and hangs on the prompt, the left half stays as it was."""
    pipe = loaded(StableDiffusionInpaintPipeline, student)
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 255
    common = {"image": noise_image(1), "mask_image": Image.fromarray(mask), "height": 32, "width": 32}
    cat, dog = (drawn(pipe, prompt, output_type="latent", **common) for prompt in ("a cat", "a dog"))
    assert cat.shape == (4, 16, 16)
    np.testing.assert_array_equal(cat[..., :8], dog[..., :8])
    assert not np.allclose(cat[..., 8:], dog[..., 8:])


def with_adapter(student):
    """A pipeline with a LoRA adapter trained a few steps towards noise; and its U-Net's weights before."""
    pipe = loaded(StableDiffusionPipeline, student)
    pipe.unet.requires_grad_(False)
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    before = {name: parameter.detach().clone() for name, parameter in pipe.unet.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in pipe.unet.parameters() if p.requires_grad], lr=0.05)
    latents, prompts, aim = torch.randn(2, 4, 16, 16), torch.randn(2, 8, 10), torch.randn(2, 4, 16, 16)
    for _ in range(3):
        loss = (pipe.unet(latents, torch.tensor([900, 100]), prompts).sample - aim).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return pipe, before


def test_a_lora_is_trained_saved_loaded_and_fused(student, tmp_path):
    pipe, before = with_adapter(student)
    changed = {name for name, p in pipe.unet.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    plain = loaded(StableDiffusionPipeline, student)
    without = drawn(plain)
    plain.load_lora_weights(tmp_path)
    adapted = drawn(plain)
    np.testing.assert_array_equal(adapted, drawn(pipe))
    assert np.abs(adapted - without).max() > 1e-3

    plain.fuse_lora()
    plain.unload_lora_weights()
    assert not [name for name, _ in plain.unet.named_parameters() if "lora_" in name]
    np.testing.assert_allclose(drawn(plain), adapted, atol=1e-4)

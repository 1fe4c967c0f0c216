"""The configs that come with the package are those of the published checkpoints."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from pipeline.models.families.sd_configs import VERSIONS

# As published: of the U-Net, the VAE and the text encoder.
PARAMETERS = {"SD-1.x": (859_520_964, 83_653_863, 123_060_480), "SD-2.x": (865_910_724, 83_653_863, 340_387_840)}


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.title)
def test_the_networks_have_the_published_parameters(version):
    with torch.device("meta"):
        networks = (
            UNet2DConditionModel.from_config(version.configs["unet/config.json"]),
            AutoencoderKL.from_config(version.configs["vae/config.json"]),
            CLIPTextModel(CLIPTextConfig(**version.configs["text_encoder/config.json"])),
        )
    counts = tuple(sum(p.numel() for p in network.parameters()) for network in networks)
    assert counts == PARAMETERS[version.title]

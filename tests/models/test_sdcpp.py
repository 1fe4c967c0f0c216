"""Single files for stable-diffusion.cpp: the names that it looks for, by the rules of its own constructor."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from support.tiny import SD15, SD21
from support.tiny import SDXL as FULL_SDXL

from pipeline.models.families import FAMILIES, family_of_level
from pipeline.models.families.sd_single_file import UNET, unet_weights
from pipeline.models.students import meta_student

# With fewer transformer blocks, which have no part in the names that are compared.
SDXL = {**FULL_SDXL, "transformer_layers_per_block": [1, 2, 2]}
# Its versions: (attention at these reductions, multiples of 320 channels, layers per block, has no middle block).
TINY_UNET = ((4, 2, 1), (1, 2, 4), 1, True)
SDXL_STUDENT = ((4, 2), (1, 2, 4), 2, False)


def expected(attention, multiples, layers, is_tiny):
    """Names of modules, with the (input, output) channels of the ResNets: UnetModelBlock of its unet.hpp, in Python."""
    blocks = dict.fromkeys(("time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2"))
    place, channels, reduction, skips = 0, 320, 1, [320]
    for stage, multiple in enumerate(multiples):
        for _ in range(layers):
            place += 1
            blocks[f"input_blocks.{place}.0"] = (channels, 320 * multiple)
            channels = 320 * multiple
            if reduction in attention:
                blocks[f"input_blocks.{place}.1"] = None
            skips.append(channels)
            place += is_tiny
        if stage != len(multiples) - 1:
            place += 1
            blocks[f"input_blocks.{place}.0"] = None
            skips.append(channels)
            reduction *= 2
    if not is_tiny:
        blocks["middle_block.0"] = (channels, channels)
    place = 0
    for stage in reversed(range(len(multiples))):
        for layer in range(layers + 1):
            blocks[f"output_blocks.{place}.0"] = (channels + skips.pop(), 320 * multiples[stage])
            channels = 320 * multiples[stage]
            has_attention = reduction in attention
            if has_attention:
                blocks[f"output_blocks.{place}.1"] = None
            if stage > 0 and layer == layers:
                place += is_tiny
                upsampler = 1 if is_tiny and place == 2 else 1 + has_attention
                blocks[f"output_blocks.{place}.{upsampler}"] = None
                reduction //= 2
            place += 1
    return blocks


def modules(weights):
    found = {}
    for name, tensor in weights.items():
        parts = name.removeprefix(UNET).split(".")
        module = ".".join(parts[: 3 if parts[0].endswith("put_blocks") else 2])
        found.setdefault(module, None)
        if name.endswith("in_layers.2.weight"):
            found[module] = tensor.shape[1], tensor.shape[0]
    return {name: channels for name, channels in found.items() if not name.startswith("label_emb")}


def dense(config, level):
    with torch.device("meta"):
        teacher = dict(UNet2DConditionModel(**config).config)
    return unet_weights(meta_student(teacher, level).state_dict())


def sdcpp(config, level):
    return family_of_level(level).sdcpp(dense(config, level))


@pytest.mark.parametrize(
    ("config", "level", "version"),
    [
        (SD15, "sd_tiny", TINY_UNET),
        (SD21, "bk_tiny", TINY_UNET),
        (SDXL, "ssd_1b", SDXL_STUDENT),
        (SDXL, "vega", SDXL_STUDENT),
    ],
)
def test_the_names_are_those_that_stable_diffusion_cpp_looks_for(config, level, version):
    assert modules(sdcpp(config, level)) == expected(*version)


def test_no_tensor_is_lost_and_other_parts_keep_their_names():
    weights = dense(SD15, "sd_tiny") | {"first_stage_model.x": None}
    renamed = FAMILIES["sd"].sdcpp(weights)
    assert len(renamed) == len(weights)
    assert "first_stage_model.x" in renamed


@pytest.mark.parametrize("level", ["sd_small", "bk_small"])
def test_other_students_of_sd_are_refused_with_what_reads_them(level):
    with pytest.raises(ValueError, match=r"of the shape of sd_tiny alone\. Leave out --layout: diffusers, ComfyUI and"):
        sdcpp(SD15, level)


def test_other_students_of_sdxl_are_refused_with_what_reads_them():
    with pytest.raises(ValueError, match=r"reads ssd_1b and vega alone\. Leave out --layout: diffusers reads the"):
        sdcpp(SDXL, "koala_700m")

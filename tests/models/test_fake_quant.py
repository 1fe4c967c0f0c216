"""Fake quantisers on a U-Net, and the file that keeps them."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from support.tiny import TINY, TINY_XL

from pipeline.models import fake_quant
from pipeline.models.fake_quant import (
    QUANTISERS,
    add_quantisers,
    bake,
    has_quantisers,
    layers_to_quantise,
    load_quantisers,
    measuring_ranges,
    quantised_layers,
    save_unet,
    state_of_quantisers,
    weight_bits,
)
from pipeline.system.errors import UserError
from pipeline.system.options import QAT_BITS

FLOAT = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}


@pytest.fixture(scope="module")
def bare():
    with torch.device("meta"):
        return UNet2DConditionModel(**TINY)


def state_for(unet, **changes):
    return {"qat": "int8", "ranges": dict.fromkeys(layers_to_quantise(unet), 1.0), **changes}


@pytest.mark.parametrize(
    ("config", "floats"),
    [(TINY, FLOAT), (TINY_XL, FLOAT | {"add_embedding.linear_1", "add_embedding.linear_2"})],
    ids=["sd", "sdxl"],
)
def test_all_layers_are_rounded_but_the_first_the_last_and_the_embeddings(config, floats):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    layers = {name for name, m in unet.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)}
    assert layers - set(layers_to_quantise(unet)) == floats


def test_a_plain_unet_has_no_quantisers(bare, tmp_path):
    assert weight_bits(bare) is None
    assert state_of_quantisers(bare) == {}
    assert not has_quantisers(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qat": "int2"}, "the format 'int2'"),
        ({"qat": ["int8"]}, "the format"),
        ({"ranges": {}}, "a range for each layer"),
        ({"ranges": None}, "a range for each layer"),
    ],
)
def test_a_damaged_file_of_ranges_is_refused(changes, message, bare, tmp_path):
    (tmp_path / QUANTISERS).write_text(json.dumps(state_for(bare, **changes)))
    with pytest.raises(UserError, match=message):
        load_quantisers(bare, tmp_path)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "1", True, None])
def test_a_range_that_is_no_number_is_refused(value, bare, tmp_path):
    state = state_for(bare)
    state["ranges"]["mid_block.resnets.0.conv1"] = value
    (tmp_path / QUANTISERS).write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"qat\.json has the range .* for mid_block\.resnets\.0\.conv1"):
        load_quantisers(bare, tmp_path)


def test_without_modelopt_the_message_says_how_to_install_it(bare, tmp_path, monkeypatch):
    monkeypatch.setattr(fake_quant, "find_spec", lambda name: None)
    (tmp_path / QUANTISERS).write_text(json.dumps(state_for(bare)))
    with pytest.raises(UserError, match=r"has the quantisers of --qat int8, needs nvidia-modelopt\. Run: pip install"):
        load_quantisers(bare, tmp_path)


def inputs():
    generator = torch.Generator().manual_seed(1)
    sample, text = (torch.randn(shape, generator=generator) for shape in ((2, 4, 16, 16), (2, 7, 10)))
    return sample, torch.tensor([20, 700]), text


@torch.no_grad()
def output_of(unet):
    return unet(*inputs()).sample


@pytest.fixture(params=QAT_BITS)
def quantised(request):
    """A plain U-Net's output, and the U-Net with quantisers."""
    pytest.importorskip("modelopt")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**TINY).eval()
    before = output_of(unet)
    add_quantisers(unet, request.param)
    with measuring_ranges(unet):
        # Ranges are those of floats.
        assert torch.equal(output_of(unet), before)
    return before, unet


def test_a_unet_that_rounds_has_the_weights_of_a_plain_one(quantised, tmp_path):
    before, unet = quantised
    rounded = output_of(unet)
    assert 0 < (rounded - before).square().mean() < 0.1 * before.square().mean()
    save_unet(unet, tmp_path)
    back = UNet2DConditionModel.from_pretrained(tmp_path).eval()
    assert torch.equal(output_of(back), before)
    load_quantisers(back, tmp_path)
    assert torch.equal(output_of(back), rounded)
    assert state_of_quantisers(back) == state_of_quantisers(unet) == json.loads((tmp_path / QUANTISERS).read_text())


def test_weights_have_as_many_values_as_their_bits_allow(quantised):
    _, unet = quantised
    layer = quantised_layers(unet)["mid_block.resnets.0.conv1"]
    rounded, bits = layer.weight_quantizer(layer.weight), weight_bits(unet)
    assert all(len(channel.unique()) <= 2**bits - 1 for channel in rounded)
    assert torch.allclose(rounded.abs().amax((1, 2, 3)), layer.weight.abs().amax((1, 2, 3)))


def test_every_parameter_gets_a_gradient(quantised):
    _, unet = quantised
    unet(*inputs()).sample.square().mean().backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_baking_changes_no_output(quantised):
    _, unet = quantised
    rounded = output_of(unet)
    bake(unet)
    # A value may be rounded to a neighbour where the last bit of a product decides.
    assert (output_of(unet) - rounded).square().mean() < 1e-3 * rounded.square().mean()


def test_nan_is_told_while_ranges_are_measured():
    pytest.importorskip("modelopt")
    unet = UNet2DConditionModel(**TINY)
    torch.nn.init.constant_(unet.conv_in.weight, float("nan"))
    add_quantisers(unet, "int8")
    with pytest.raises(UserError, match="ranges of the layers' inputs cannot be measured"), measuring_ranges(unet):
        output_of(unet)

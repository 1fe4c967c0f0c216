"""How the cost of a student is measured: arithmetic, parameters, bytes, and turns."""

import pytest
import torch
from support.tiny import SD15, TINY, tiny_pipeline, tiny_unet
from torch import nn

from pipeline.evaluation.cost import (
    count_macs,
    folder_bytes,
    forward_seconds,
    in_turns,
    parameters,
    pipeline_bytes,
    sample_size,
    unet_macs,
)
from pipeline.models.families.sd import SD
from pipeline.models.load import load_unet, unet_config
from pipeline.models.students import student_config


def test_the_macs_of_a_convolution_match_a_count_by_hand():
    with torch.device("meta"):
        # Each of the 5 x 16 x 20 outputs is a sum over 4 channels and 3 x 3 positions.
        macs = count_macs(nn.Conv2d(4, 5, 3, padding=1), torch.empty(2, 4, 16, 20))
    assert macs == 2 * 5 * 16 * 20 * 4 * 3 * 3


def test_the_macs_of_a_linear_layer_and_of_attention_match_a_count_by_hand():
    with torch.device("meta"):
        assert count_macs(nn.Linear(7, 11), torch.empty(3, 7)) == 3 * 7 * 11
        q, k = torch.empty(1, 2, 6, 4), torch.empty(1, 2, 10, 4)
        attention = nn.Module()
        attention.forward = lambda: nn.functional.scaled_dot_product_attention(q, k, k)
        # The weights of 6 queries over 10 keys, and their sums of values, in 2 heads of width 4.
        assert count_macs(attention) == 2 * (2 * 6 * 10 * 4)


def test_the_macs_of_a_unets_first_convolution_match_a_count_by_hand():
    with torch.device("meta"):
        unet = tiny_unet()
        macs = count_macs(unet.conv_in, torch.empty(1, 4, 16, 16))
    assert macs == TINY["block_out_channels"][0] * 16 * 16 * 4 * 9


def test_sd_1_5_has_its_published_macs():
    config = {**SD15, "_class_name": "UNet2DConditionModel"}
    assert unet_macs(config, {"prompt_embeds": (77, 768)}, SD) == pytest.approx(401.6e9, rel=1e-3)


def test_a_student_takes_fewer_macs(teacher):
    config = unet_config(teacher)
    macs = [
        unet_macs(unet, {"prompt_embeds": (8, 10)}, SD)
        for unet in (config, student_config(config, "sd_small"), student_config(config, "sd_tiny"))
    ]
    assert macs[0] > macs[1] > macs[2] > 0


def test_all_parameters_are_counted(teacher):
    unet = load_unet(teacher, None)
    assert parameters(unet) == sum(tensor.numel() for tensor in unet.state_dict().values())


def test_a_sample_size_may_be_one_side_or_two():
    assert sample_size({"sample_size": 64}) == (64, 64)
    assert sample_size({"sample_size": [64, 96]}) == (64, 96)


def test_the_bytes_of_a_pipeline_are_the_bytes_of_its_parts(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    (tmp_path / "unet" / "more").write_bytes(bytes(1000))
    before = pipeline_bytes(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "state").write_bytes(bytes(5000))
    assert pipeline_bytes(tmp_path) == before
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    assert before == sum(folder_bytes(tmp_path / part) for part in parts)
    assert folder_bytes(tmp_path / "unet") == sum(f.stat().st_size for f in (tmp_path / "unet").iterdir())


def test_actions_take_turns_and_the_first_turn_does_not_count(monkeypatch):
    now, turns = [0.0], []
    monkeypatch.setattr("pipeline.evaluation.cost.time.perf_counter", lambda: now[0])

    def action(name, seconds):
        def act():
            turns.append(name)
            now[0] += 100 if len(turns) <= 2 else seconds

        return act

    assert in_turns({"teacher": action("teacher", 3.0), "student": action("student", 2.0)}, 3, "") == {
        "teacher": pytest.approx(3.0),
        "student": pytest.approx(2.0),
    }
    assert turns == ["teacher", "student"] * 4


def test_a_larger_forward_pass_takes_longer():
    wide = tiny_unet(sample_size=64)
    seconds = forward_seconds({"wide": wide, "narrow": tiny_unet(sample_size=8)}, 1, {"prompt_embeds": (8, 10)}, SD, 3)
    assert seconds["wide"] > seconds["narrow"] > 0

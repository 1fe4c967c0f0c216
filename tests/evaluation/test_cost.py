"""What the cost of a student is counted by: arithmetic by hand, parameters, bytes, and turns."""

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
from pipeline.models.families.sd import student_config
from pipeline.models.load import load_unet, unet_config


def test_the_macs_of_a_convolution_are_those_counted_by_hand():
    with torch.device("meta"):
        # Each of 5 x 16 x 20 outputs is a sum over 4 channels and 3 x 3 places.
        macs = count_macs(nn.Conv2d(4, 5, 3, padding=1), torch.empty(2, 4, 16, 20))
    assert macs == 2 * 5 * 16 * 20 * 4 * 3 * 3


def test_the_macs_of_a_linear_layer_and_of_attention_are_those_counted_by_hand():
    with torch.device("meta"):
        assert count_macs(nn.Linear(7, 11), torch.empty(3, 7)) == 3 * 7 * 11
        q, k = torch.empty(1, 2, 6, 4), torch.empty(1, 2, 10, 4)
        attention = nn.Module()
        attention.forward = lambda: nn.functional.scaled_dot_product_attention(q, k, k)
        # The weights of 6 queries over 10 keys, and their sums of values, in 2 heads of width 4.
        assert count_macs(attention) == 2 * (2 * 6 * 10 * 4)


def test_the_first_convolution_of_a_unet_counts_as_by_hand():
    with torch.device("meta"):
        unet = tiny_unet()
        macs = count_macs(unet.conv_in, torch.empty(1, 4, 16, 16))
    assert macs == TINY["block_out_channels"][0] * 16 * 16 * 4 * 9


def test_sd_1_5_takes_the_macs_that_are_known_of_it():
    config = {**SD15, "_class_name": "UNet2DConditionModel"}
    assert unet_macs(config, 77) == pytest.approx(401.6e9, rel=1e-3)


def test_a_student_takes_fewer_macs_and_parameters(teacher):
    config = unet_config(teacher)
    macs = [
        unet_macs(each, 8) for each in (config, student_config(config, "sd_small"), student_config(config, "sd_tiny"))
    ]
    assert macs[0] > macs[1] > macs[2] > 0


def test_parameters_are_all_of_them(teacher):
    unet = load_unet(teacher, None)
    assert parameters(unet) == sum(tensor.numel() for tensor in unet.state_dict().values())


def test_a_sample_size_may_be_a_side_or_two():
    assert sample_size({"sample_size": 64}) == (64, 64)
    assert sample_size({"sample_size": [64, 96]}) == (64, 96)


def test_the_bytes_of_a_pipeline_are_those_of_its_parts(tmp_path):
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

    assert in_turns({"teacher": action("teacher", 3.0), "student": action("student", 2.0)}, 3) == {
        "teacher": pytest.approx(3.0),
        "student": pytest.approx(2.0),
    }
    assert turns == ["teacher", "student"] * 4


def test_a_forward_of_more_work_takes_longer():
    wide = tiny_unet(sample_size=64)
    seconds = forward_seconds({"wide": wide, "narrow": tiny_unet(sample_size=8)}, 1, 8, 3)
    assert seconds["wide"] > seconds["narrow"] > 0

"""Students against the seeds' parameter counts, and their weights against the teacher's, tensor by tensor."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from support.tiny import SD15, SD21, SD_BLOCKS, tiny_unet

from pipeline.core.taps import Taps
from pipeline.models.families.sd import check_teacher
from pipeline.models.levels.sd import LEVELS
from pipeline.models.students import student_config, student_weights, teacher_taps

PARAMETERS = {
    "sd_small": 579_384_964,
    "bk_base": 579_384_964,
    "bk_small": 482_346_884,
    "sd_tiny": 323_384_964,
    "bk_tiny": 323_384_964,
}


CONFIGS = {"SD-1.x": SD15, "SD-2.x": SD21}


def on_meta(config) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def count(unet) -> int:
    return sum(parameter.numel() for parameter in unet.parameters())


@pytest.fixture(scope="module")
def teachers():
    return {name: on_meta(config) for name, config in CONFIGS.items()}


@pytest.fixture
def sd15(teachers):
    return teachers["SD-1.x"]


def test_the_teacher_has_the_seeds_parameters(sd15):
    assert count(sd15) == 859_520_964


@pytest.mark.parametrize("level", LEVELS)
def test_a_student_has_the_seeds_parameters(sd15, level):
    assert count(on_meta(student_config(dict(sd15.config), level))) == PARAMETERS[level]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("config", CONFIGS)
def test_every_student_tensor_has_a_teacher_tensor_of_its_shape(teachers, config, level):
    teacher = teachers[config]
    student = on_meta(student_config(dict(teacher.config), level))
    shapes = {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}
    weights = student_weights(shapes, teacher.state_dict(), level)
    assert weights.keys() == shapes.keys()


def outputs(unet, names) -> dict[str, torch.Tensor]:
    """What the named modules put out for one 512 px image."""
    inputs = {
        "sample": torch.empty(1, 4, 64, 64, device="meta"),
        "timestep": torch.zeros(1, device="meta"),
        "encoder_hidden_states": torch.empty(1, 77, unet.config.cross_attention_dim, device="meta"),
    }
    with Taps(unet, names).recording() as recorded:
        unet(**inputs)
    return recorded


@pytest.fixture(scope="module")
def teacher_outputs(teachers):
    """What the taps of all levels put out, by config."""
    return {config: outputs(teacher, teacher_taps(tuple(LEVELS))) for config, teacher in teachers.items()}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("config", CONFIGS)
def test_tap_pairs_have_equal_shapes(teachers, teacher_outputs, config, level):
    student = on_meta(student_config(dict(teachers[config].config), level))
    pairs = LEVELS[level].taps
    of_teacher = teacher_outputs[config]
    of_student = outputs(student, [name for name, _ in pairs])
    assert {t: of_teacher[t].shape for _, t in pairs} == {t: of_student[s].shape for s, t in pairs}


# Written down by hand from the two module trees: what each kept up block's layers start from.
EXPECTED_SOURCES = {
    ("sd_small", "up_blocks.0.resnets.1.conv1.weight"): "up_blocks.0.resnets.2.conv1.weight",
    ("sd_small", "up_blocks.3.attentions.1.proj_in.weight"): "up_blocks.3.attentions.2.proj_in.weight",
    ("sd_small", "up_blocks.2.resnets.0.conv1.weight"): "up_blocks.2.resnets.0.conv1.weight",
    ("sd_small", "down_blocks.1.attentions.0.proj_in.weight"): "down_blocks.1.attentions.0.proj_in.weight",
    ("sd_small", "mid_block.resnets.1.conv1.weight"): "mid_block.resnets.1.conv1.weight",
    ("sd_tiny", "up_blocks.0.resnets.1.conv1.weight"): "up_blocks.1.resnets.2.conv1.weight",
    ("sd_tiny", "up_blocks.2.attentions.0.proj_in.weight"): "up_blocks.3.attentions.0.proj_in.weight",
    ("sd_tiny", "up_blocks.0.upsamplers.0.conv.weight"): "up_blocks.1.upsamplers.0.conv.weight",
    ("sd_tiny", "down_blocks.2.resnets.0.conv1.weight"): "down_blocks.2.resnets.0.conv1.weight",
}


@pytest.mark.parametrize(("level", "key"), EXPECTED_SOURCES)
def test_the_key_map_names_the_teacher_tensor(level, key):
    assert LEVELS[level].teacher_key(key) == EXPECTED_SOURCES[level, key]


@pytest.mark.parametrize("level", LEVELS)
def test_weights_are_copied_tensor_by_tensor(level):
    """Each student tensor equals the one that the key map names, and none keeps its random value."""
    teacher = tiny_unet(seed=1, **SD_BLOCKS)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.normal_()
    torch.manual_seed(2)
    student = UNet2DConditionModel.from_config(student_config(dict(teacher.config), level))
    random = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in random.items()}
    weights = teacher.state_dict()
    student.load_state_dict(student_weights(shapes, weights, level), strict=True)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, weights[LEVELS[level].teacher_key(name)]), name
        assert not torch.equal(tensor, random[name]), name


@pytest.mark.parametrize("level", LEVELS)
def test_no_teacher_tensor_is_used_twice(level):
    student = on_meta(student_config(dict(tiny_unet(**SD_BLOCKS).config), level))
    sources = [LEVELS[level].teacher_key(name) for name in student.state_dict()]
    assert len(sources) == len(set(sources))


def test_a_teacher_of_the_wrong_shape_is_refused_with_the_tensors_name():
    teacher = tiny_unet().state_dict()
    student = on_meta(student_config(dict(tiny_unet().config), "sd_small"))
    shapes = {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}
    name = "up_blocks.1.resnets.2.conv1.weight"
    with pytest.raises(ValueError, match=f"{name} has shape \\(1, 2\\); .*up_blocks.1.resnets.1.conv1.weight needs"):
        student_weights(shapes, {**teacher, name: torch.zeros(1, 2)}, "sd_small")
    with pytest.raises(ValueError, match=f"no tensor {name}"):
        student_weights(shapes, {k: v for k, v in teacher.items() if k != name}, "sd_small")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_block_types": ("DownBlock2D",) * 3}, "3 stages, not 4"),
        ({"layers_per_block": 1}, "layers_per_block is 1"),
        ({"mid_block_type": None}, "mid_block_type is None"),
        ({"in_channels": 9}, "9 input channels"),
        ({"addition_embed_type": "text_time"}, "as SDXL does"),
    ],
)
def test_a_teacher_of_another_family_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_teacher({**tiny_unet().config, **changes})


def test_the_taps_of_several_levels_are_listed_once_in_forward_order():
    assert teacher_taps(("sd_small",)) == [
        "down_blocks.0",
        "down_blocks.1",
        "down_blocks.2",
        "down_blocks.3",
        "mid_block",
        "up_blocks.0",
        "up_blocks.1",
        "up_blocks.2",
        "up_blocks.3",
    ]
    assert "mid_block" not in teacher_taps(("bk_base",))
    assert len(teacher_taps(tuple(LEVELS))) == 10


def test_configs_reach_the_disk_as_the_students_own(tmp_path):
    config = student_config(dict(tiny_unet().config), "sd_tiny")
    UNet2DConditionModel.from_config(config).save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert len(loaded.config.down_block_types) == 3
    assert loaded.mid_block is None

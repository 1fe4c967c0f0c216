"""SDXL's students: parameter counts, which of the teacher's tensors they start from, and shapes of taps."""

import itertools

import pytest
import torch
from diffusers import UNet2DConditionModel
from support.tiny import SDXL, tiny_xl_unet

from pipeline.core.taps import Taps
from pipeline.models.families import FAMILIES, denoise, family_of_level, random_conditioning
from pipeline.models.families.sdxl import check_teacher
from pipeline.models.levels.sdxl import LEVELS
from pipeline.models.students import student_config, student_weights, teacher_taps
from pipeline.models.tap_pairs import tap_pairs, taps_of_teacher

TEACHER = 2_567_463_684
PARAMETERS = {
    "ssd_1b": 1_331_334_404,
    "vega": 745_225_604,
    "koala_1b": 1_161_184_324,
    "koala_700m": 782_822_724,
    "sdxl_small": 1_717_277_764,
    "sdxl_tiny": 1_304_160_324,
}
# Transformer blocks of the whole U-Net.
TRANSFORMERS = {"ssd_1b": 34, "vega": 15, "koala_1b": 30, "koala_700m": 21}


def on_meta(config) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def count(unet) -> int:
    return sum(parameter.numel() for parameter in unet.parameters())


@pytest.fixture(scope="module")
def teacher():
    """SDXL without weights."""
    return on_meta(SDXL)


@pytest.fixture(scope="module")
def students(teacher):
    return {level: on_meta(student_config(dict(teacher.config), level)) for level in LEVELS}


def test_no_level_has_the_name_of_another_familys():
    names = [level for family in FAMILIES.values() for level in family.levels]
    assert len(names) == len(set(names))
    assert {family_of_level(level).name for level in LEVELS} == {"sdxl"}


def test_teacher_and_students_have_the_authors_parameters(teacher, students):
    assert count(teacher) == TEACHER
    assert {level: count(student) for level, student in students.items()} == PARAMETERS


@pytest.mark.parametrize("level", TRANSFORMERS)
def test_a_student_has_the_authors_transformer_blocks(students, level):
    blocks = [m for m in students[level].modules() if type(m).__name__ == "BasicTransformerBlock"]
    assert len(blocks) == TRANSFORMERS[level]


@pytest.mark.parametrize("level", LEVELS)
def test_every_student_tensor_has_a_teacher_tensor_of_its_shape(teacher, students, level):
    shapes = {name: tuple(tensor.shape) for name, tensor in students[level].state_dict().items()}
    assert student_weights(shapes, teacher.state_dict(), level).keys() == shapes.keys()


# Written down by hand from the two module trees.
EXPECTED_SOURCES = {
    ("ssd_1b", "up_blocks.0.resnets.1.conv1.weight"): "up_blocks.0.resnets.1.conv1.weight",
    ("ssd_1b", "up_blocks.0.attentions.2.transformer_blocks.9.norm1.weight"): (
        "up_blocks.0.attentions.2.transformer_blocks.9.norm1.weight"
    ),
    ("vega", "mid_block.resnets.0.conv1.weight"): "mid_block.resnets.0.conv1.weight",
    ("koala_700m", "up_blocks.0.resnets.1.conv1.weight"): "up_blocks.0.resnets.2.conv1.weight",
    ("koala_1b", "up_blocks.1.attentions.1.transformer_blocks.1.norm1.weight"): (
        "up_blocks.1.attentions.2.transformer_blocks.1.norm1.weight"
    ),
    ("sdxl_tiny", "down_blocks.2.attentions.0.transformer_blocks.9.norm1.weight"): (
        "down_blocks.2.attentions.0.transformer_blocks.9.norm1.weight"
    ),
    ("sdxl_small", "add_embedding.linear_1.weight"): "add_embedding.linear_1.weight",
}


@pytest.mark.parametrize(("level", "key"), EXPECTED_SOURCES)
def test_the_key_map_names_the_teacher_tensor(students, level, key):
    assert key in students[level].state_dict()
    assert LEVELS[level].teacher_key(key) == EXPECTED_SOURCES[level, key]


@pytest.mark.parametrize("level", LEVELS)
def test_weights_are_copied_tensor_by_tensor(level):
    """Each student tensor equals the one that the key map names, none is used twice, none keeps its random value."""
    teacher = tiny_xl_unet(seed=1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.normal_()
    torch.manual_seed(2)
    student = UNet2DConditionModel.from_config(student_config(dict(teacher.config), level))
    random = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    weights = teacher.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in random.items()}
    student.load_state_dict(student_weights(shapes, weights, level), strict=True)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, weights[LEVELS[level].teacher_key(name)]), name
        assert not torch.equal(tensor, random[name]), name
    assert len({LEVELS[level].teacher_key(name) for name in random}) == len(random)


def outputs(unet, names) -> dict[str, torch.Size]:
    """The shapes that the named modules put out for one image of 1024 px."""
    shapes = {"prompt_embeds": (77, 2048), "pooled_prompt_embeds": (1280,), "time_ids": (6,)}
    with torch.device("meta"), Taps(unet, names).recording() as recorded:
        inputs = torch.empty(1, 4, 128, 128), torch.zeros(1), random_conditioning(shapes, 1)
        denoise(unet, *inputs, FAMILIES["sdxl"])
    return {name: tensor.shape for name, tensor in recorded.items()}


# Taps, and their values for an image of 1024 px.
SETS = {
    ("ssd_1b", "resnets-attentions"): (26, 66_846_720),
    ("koala_1b", "self-attention"): (30, 47_185_920),
    ("koala_700m", "self-attention"): (21, 35_389_440),
}


@pytest.fixture(scope="module")
def all_outputs(teacher):
    """The shapes of all the teacher's taps, whatever the set."""
    names = [taps_of_teacher(dict(teacher.config), [level], taps) for level, taps in SETS]
    return outputs(teacher, dict.fromkeys(itertools.chain(teacher_taps(tuple(LEVELS)), *names)))


def test_tap_pairs_have_equal_shapes(all_outputs, students):
    blocks = teacher_taps(tuple(LEVELS))
    of_teacher = {name: shape for name, shape in all_outputs.items() if name in blocks}
    assert list(of_teacher) == [
        *(f"down_blocks.{i}" for i in range(3)),
        "mid_block",
        *(f"up_blocks.{i}" for i in range(3)),
    ]
    assert sum(shape.numel() for shape in of_teacher.values()) == 25_559_040
    for level, student in students.items():
        pairs = LEVELS[level].taps
        of_student = outputs(student, [name for name, _ in pairs])
        assert [of_student[name] for name, _ in pairs] == [of_teacher[name] for _, name in pairs], level
        assert ("mid_block" in of_student) == (student.mid_block is not None), level


@pytest.mark.parametrize(("level", "taps"), SETS)
def test_the_authors_sets_have_their_taps(teacher, all_outputs, level, taps):
    names = taps_of_teacher(dict(teacher.config), [level], taps)
    assert (len(names), sum(all_outputs[name].numel() for name in names)) == SETS[level, taps]


# Written down by hand.
EXPECTED_PAIRS = {
    ("ssd_1b", "resnets-attentions"): [
        ("mid_block", "mid_block"),
        ("up_blocks.0.resnets.1", "up_blocks.0.resnets.1"),
        ("up_blocks.1.attentions.2", "up_blocks.1.attentions.2"),
        ("down_blocks.0.resnets.1", "down_blocks.0.resnets.1"),
    ],
    ("koala_700m", "resnets-attentions"): [("up_blocks.2.resnets.1", "up_blocks.2.resnets.2")],
    ("koala_1b", "self-attention"): [
        (
            "up_blocks.0.attentions.1.transformer_blocks.2.attn1",
            "up_blocks.0.attentions.2.transformer_blocks.2.attn1",
        ),
        ("mid_block.attentions.0.transformer_blocks.0.attn1", "mid_block.attentions.0.transformer_blocks.0.attn1"),
    ],
}


@pytest.mark.parametrize(("level", "taps"), EXPECTED_PAIRS)
def test_a_module_is_compared_with_the_one_that_its_weights_start_from(level, taps):
    pairs = tap_pairs(student_config(dict(tiny_xl_unet().config), level), level, taps)
    assert set(EXPECTED_PAIRS[level, taps]) <= set(pairs)
    assert len({student for student, _ in pairs}) == len({teacher for _, teacher in pairs}) == len(pairs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"addition_embed_type": None}, "takes no sizes of images"),
        ({"down_block_types": ("DownBlock2D",) * 4}, "4 stages, not 3"),
        ({"layers_per_block": 1}, "layers_per_block is 1"),
        ({"mid_block_type": None}, "mid_block_type is None"),
        ({"transformer_layers_per_block": 1}, "transformer_layers_per_block is 1, not one number for each stage"),
        ({"transformer_layers_per_block": [1, [2, 2], [4, 4]]}, "not one number for each stage"),
        ({"reverse_transformer_layers_per_block": [4, 2, 1]}, "as in a student"),
        ({"in_channels": 9}, "9 input channels"),
    ],
)
def test_a_teacher_of_another_shape_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"not of the SDXL family: .*{message}"):
        check_teacher({**tiny_xl_unet().config, **changes})


def test_configs_reach_the_disk_as_the_students_own(tmp_path):
    config = student_config(dict(tiny_xl_unet().config), "ssd_1b")
    made = UNet2DConditionModel.from_config(config)
    made.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert loaded.config.reverse_transformer_layers_per_block == [[3, 3, 3], [2, 1, 1], 1]
    assert loaded.state_dict().keys() == made.state_dict().keys()

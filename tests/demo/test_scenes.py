"""The demo's scenes are reproducible, match their captions and are split by combination. The oracle knows the facts."""

import collections
import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageFilter

from pipeline.cli import main
from pipeline.data.source import DataSettings, open_source
from pipeline.demo import oracle
from pipeline.demo.scenes import (
    HELD_OUT,
    SHAPES,
    caption_of,
    draw_facts,
    generator,
    make_scene,
    parse_caption,
    render_image,
    shape_mask,
    write_folder,
)

COUNT = 150


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(11, index, "train" if index % 2 else "heldout") for index in range(COUNT)]


def test_a_scene_depends_only_on_its_seed_split_and_index():
    first = make_scene(3, 17)
    np.random.seed(5)
    make_scene(3, 18)
    again = make_scene(3, 17)
    assert first.caption == again.caption
    np.testing.assert_array_equal(first.image, again.image)
    assert not np.array_equal(first.image, make_scene(4, 17).image)


def test_a_caption_states_the_facts_and_nothing_more(scenes):
    for scene in scenes:
        assert parse_caption(scene.caption) == scene.facts
        assert caption_of(scene.facts) == scene.caption


def test_scenes_with_equal_captions_have_different_images():
    indices = collections.defaultdict(list)
    for index in range(3000):
        indices[caption_of(draw_facts(generator(0, index)))].append(index)
    repeated = [group[:2] for group in indices.values() if len(group) > 1]
    assert len(repeated) > 100
    for group in repeated[:30]:
        first, second = (make_scene(0, index) for index in group)
        assert first.caption == second.caption
        assert np.abs(first.image.astype(int) - second.image).mean() > 2


def test_held_out_combinations_never_appear_in_training():
    def combinations(split):
        facts = (draw_facts(generator(0, index, split), split) for index in range(1500))
        return {(item.colour, item.shape) for scene in facts for item in scene.objects}

    assert not combinations("train") & HELD_OUT
    assert combinations("heldout") >= HELD_OUT
    assert {shape for _, shape in HELD_OUT} == set(SHAPES)


@pytest.mark.parametrize(
    "caption",
    ["", "a photo of a cat", "a red circle", "a red cube on a white background", "red circle on a white background"],
)
def test_another_kind_of_caption_is_refused_and_quoted(caption):
    with pytest.raises(ValueError, match="caption"):
        parse_caption(caption)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'test'; it must be one of train, heldout"):
        make_scene(0, 0, "test")


def test_masks_are_antialiased_and_cover_the_shapes_area():
    mask = shape_mask("circle", 32, 32, 16)
    assert mask.sum() == pytest.approx(np.pi * 16**2, rel=0.01)
    assert ((mask > 0) & (mask < 1)).sum() > 50


def test_a_folder_of_scenes_is_read_like_any_image_folder(tmp_path):
    folder = write_folder(tmp_path / "scenes", 12, seed=2)
    source = open_source(DataSettings(data=str(folder)))
    assert [record.caption for record in source.records] == [make_scene(2, i).caption for i in range(12)]
    np.testing.assert_array_equal(np.asarray(Image.open(folder / source.records[5].location)), make_scene(2, 5).image)
    assert len((folder / "metadata.jsonl").read_text().splitlines()) == 12
    assert json.loads((folder / "metadata.jsonl").read_text().splitlines()[0]).keys() == {"file_name", "text"}


def test_the_command_makes_a_folder_once_and_refuses_one_with_other_scenes(tmp_path):
    def scenes(*more):
        return CliRunner().invoke(main, ["demo-scenes", "--out", str(tmp_path / "scenes"), "--count", "5", *more])

    assert scenes().exit_code == 0
    made = (tmp_path / "scenes" / "metadata.jsonl").stat().st_mtime_ns
    assert scenes().exit_code == 0
    assert (tmp_path / "scenes" / "metadata.jsonl").stat().st_mtime_ns == made
    folder = f"Error: --out {tmp_path / 'scenes'}"
    remedy = "To have others written, delete the folder or choose another one.\n"
    assert scenes("--count", "6").stderr == (
        f"{folder} holds 5 scenes, but --count is 6. To use them, give --count 5 (SCENES=5 with make). {remedy}"
    )
    for other in (["--seed", "1"], ["--split", "heldout"]):
        refused = scenes(*other)
        assert refused.exit_code == 2
        assert refused.stderr.startswith(f"{folder} holds other images than the scenes of --seed ")
        assert refused.stderr.endswith(remedy)
    (tmp_path / "scenes" / "metadata.jsonl").write_text("not json")
    assert scenes().exit_code == 2


def share(verdicts):
    facts = [fact for verdict in verdicts for fact in verdict.facts.values()]
    return sum(facts) / len(facts)


def test_the_oracle_finds_every_fact_of_a_rendered_image(scenes):
    verdicts = [oracle.score(scene.image, scene.caption) for scene in scenes]
    assert share(verdicts) >= 0.99
    assert np.mean([verdict.all for verdict in verdicts]) >= 0.98
    kinds = {name.split()[0] for verdict in verdicts for name in verdict.facts}
    assert kinds == {"background", "number", "colour", "shape", "count", "size", "relation"}


def test_the_oracle_finds_hardly_any_fact_of_another_scenes_image(scenes):
    verdicts = [
        oracle.score(scene.image, other.caption) for scene, other in zip(scenes, scenes[1:] + scenes[:1], strict=True)
    ]
    assert share(verdicts) < 0.3
    assert np.mean([verdict.all for verdict in verdicts]) < 0.02


def test_the_oracle_tolerates_blur_and_noise(scenes):
    draw = np.random.default_rng(0)

    def degraded(image):
        blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.8)), float)
        return np.clip(blurred + draw.normal(0, 5, blurred.shape), 0, 255).astype(np.uint8)

    assert share([oracle.score(degraded(scene.image), scene.caption) for scene in scenes]) >= 0.97


CHANGES = {
    "colour 1": ("a red circle on a gray background", "a blue circle on a gray background"),
    "shape 1": ("a red circle on a gray background", "a red star on a gray background"),
    "background": ("a red circle on a gray background", "a red circle on a white background"),
    "count 1": ("two red circles on a gray background", "three red circles on a gray background"),
    "size 1": ("a small red circle on a gray background", "a large red circle on a gray background"),
    "relation": (
        "a red circle above a blue star on a gray background",
        "a red circle below a blue star on a gray background",
    ),
}


@pytest.mark.parametrize("fact", CHANGES)
def test_the_oracle_finds_which_fact_is_wrong(fact):
    caption, rendered = CHANGES[fact]
    for index in range(10):
        image = render_image(parse_caption(rendered), generator(1, index))
        facts = oracle.score(image, caption).facts
        assert not facts[fact]
        assert facts["background"] == (fact != "background")
        assert oracle.score(image, rendered).all


def test_an_image_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(32, 32, 3\)\. A scene's image has shape \(64, 64, 3\)"):
        oracle.score(np.zeros((32, 32, 3), np.uint8), "a red circle on a gray background")

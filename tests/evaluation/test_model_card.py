"""The model card states what is known, in the format that the hub reads, and reveals no one's folders."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import yaml
from diffusers import UNet2DConditionModel
from markdown_it import MarkdownIt
from support.stages import run_distill, run_encode, run_teacher_cache
from support.tiny import RESOLUTION

from pipeline.evaluation.model_card import PAPER, SOURCE, CardInputs, model_card, split_card
from pipeline.models.provenance import licence, read_origin, teacher_origin, write_origin
from pipeline.system.errors import UserError

TEACHER_CARD = """---
license: other
license_name: tiny-license
license_link: https://example.org/licence
tags: [stable-diffusion]
---
# A tiny teacher
"""
CACHE = {
    "entries": 1300,
    "teacher_sha256": "ab12",
    "prediction_type": "epsilon",
    "codec": {"name": "dither", "snr_db": 10.0},
    "uncond_fraction": 0.1,
    "libraries": {"torch": "2.0"},
    "latents": {"resolution": 512},
}
SETTINGS = {
    "level": "sd_tiny",
    "cache": "/home/me/cache",
    "out": "/home/me/out",
    "max_train_steps": 15000,
    "use_ema": True,
    "snr_gamma": None,
    "init_from": "/home/me/earlier",
}
INPUTS = CardInputs(SETTINGS, CACHE, 4, 323384964)


def head_of(card):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


def rows_of(card):
    """The two-column rows of the card's tables, without their padding."""
    rows = re.findall(r"^\| ([^|]+) \| (.*) \|$", card, re.MULTILINE)
    return {name.strip(): value.strip() for name, value in rows}


@pytest.fixture(scope="module")
def student(teacher, images, tmp_path_factory):
    """A student of a teacher that has a model card, and the student's cache."""
    place = tmp_path_factory.mktemp("card")
    folder = shutil.copytree(teacher, place / "my-teacher")
    (folder / "README.md").write_text(TEACHER_CARD)
    latents = run_encode(folder, images, place / "latents")
    cache = run_teacher_cache(folder, latents, place / "cache")
    return run_distill(cache, place / "student"), cache, images


def test_a_distilled_students_card_says_how_it_was_made(student):
    out, _, images = student
    card = (out / "README.md").read_text()
    assert head_of(card)["license"] == "other"
    assert head_of(card)["license_name"] == "tiny-license"
    assert head_of(card)["library_name"] == "diffusers"
    assert card.count("# sd_small, distilled from my-teacher\n") == 1
    parameters = UNet2DConditionModel.from_pretrained(out, subfolder="unet").num_parameters()
    assert f"U-Net ({parameters:,} parameters)" in card
    assert "The teacher's licence is [tiny-license](https://example.org/licence)" in card
    rows = rows_of(card)
    assert rows["data"] == images.name
    assert rows["images"] == f"13 at {RESOLUTION} px"
    assert rows["entries"] == "26 in 2 rounds"
    assert (rows["max train steps"], rows["global batch size"]) == ("4", "3")
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert float(rows["task"]) == pytest.approx(last["task"], rel=1e-3)
    assert str(out.parent) not in card


def test_the_cards_snippet_generates_an_image(student, tmp_path, monkeypatch):
    out, _, _ = student
    (snippet,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    small = snippet.replace("path/to/this/folder", str(out)).replace("num_inference_steps=25", "num_inference_steps=1")
    exec(compile(small, "README.md", "exec"), {})
    assert (tmp_path / "image.png").is_file()


def test_a_cache_of_an_earlier_version_still_gives_a_student(student, tmp_path):
    _, cache, _ = student
    old = shutil.copytree(cache, tmp_path / "cache")
    (old / "origin.json").unlink()
    card = (run_distill(old, tmp_path / "out", max_train_steps=1) / "README.md").read_text()
    assert "an unnamed teacher" in card
    assert "license" not in head_of(card)


def test_a_card_states_only_what_is_known():
    card = model_card(INPUTS)
    assert not {"license", "base_model", "datasets"} & head_of(card).keys()
    assert "The teacher's licence is not known." in card
    assert "Nothing was measured." in card
    assert "no mid block and no innermost stage" in card
    assert "323,384,964" in card
    assert "/home/me" not in card
    assert "snr gamma" not in rows_of(card)


def test_names_on_the_hub_are_in_the_head():
    origin = {
        "teacher": {"name": "some/teacher", "hub": True, "license": "creativeml-openrail-m"},
        "data": {"name": "some/images", "hub": True},
    }
    card = model_card(replace(INPUTS, origin=origin, settings={**SETTINGS, "push_to_hub": "me/student"}))
    head = head_of(card)
    assert (head["base_model"], head["datasets"]) == ("some/teacher", ["some/images"])
    assert head["license"] == "creativeml-openrail-m"
    assert 'from_pretrained("me/student")' in card


def test_the_last_losses_are_shown():
    card = model_card(replace(INPUTS, metrics={"step": 10, "loss": 0.5, "feature/a": 1.0, "feature/b": 2.0}))
    assert rows_of(card)["features, summed"] == "3"


@pytest.mark.parametrize(
    "card",
    [
        "",
        "no head",
        *(
            f"---\n{head}\n---\n"
            for head in ("license: [unclosed", "- a list", "license: 3", "a: !!timestamp x", "a: " + "[" * 5000)
        ),
    ],
)
def test_a_card_that_cannot_be_read_has_no_licence(card):
    assert licence(card) == {}


def test_a_date_that_does_not_exist_hides_no_licence():
    assert licence("---\nlicense: mit\ndate: 2024-02-31\n---\n") == {"license": "mit"}


def test_the_origin_is_written_once_and_reveals_no_folders(teacher, tmp_path):
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "encode.json").write_text(json.dumps({"data": "/home/me/holiday"}))
    write_origin(tmp_path, str(teacher), teacher, None, tmp_path / "latents")
    assert read_origin(tmp_path) == {
        "teacher": {"name": teacher.name, "hub": False},
        "data": {"name": "holiday", "hub": False},
    }
    write_origin(tmp_path, "demo", teacher, None, tmp_path / "latents")
    assert read_origin(tmp_path)["teacher"]["name"] == teacher.name


def test_the_card_of_a_teacher_on_the_hub_is_downloaded(teacher, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("---\nlicense: openrail++\n---\n")
    downloads = []

    def download(name, file, revision):
        downloads.append((name, file, revision))
        return str(tmp_path / file)

    monkeypatch.setattr("pipeline.models.provenance.hf_hub_download", download)
    found = teacher_origin("some/teacher", teacher, "fp16")
    assert downloads == [("some/teacher", "README.md", "fp16")]
    assert found == {"name": "some/teacher", "hub": True, "revision": "fp16", "license": "openrail++"}


def test_a_teacher_in_one_file_is_named_without_its_folder(teacher, tmp_path):
    file = tmp_path / "secret.safetensors"
    file.write_bytes(b"")
    for name in (str(file), "/nowhere/secret.safetensors"):
        assert teacher_origin(name, teacher, None) == {"name": "secret.safetensors", "hub": False}


def test_names_and_licences_of_others_are_shown_as_plain_text():
    """A teacher's card is somebody else's text: it adds no HTML, heading, link or table cell to the student's."""
    origin = {
        "teacher": {
            "name": "sd](javascript:x)\n# <script>alert(1)</script>",
            "hub": False,
            "license_name": "<img src=x onerror=y> | [free](data:text/html,z)",
            "license_link": "javascript:alert(1)",
        },
        "data": {"name": "`photos` | ![x](http://tracker)", "hub": False},
    }
    card = model_card(replace(INPUTS, origin=origin))
    html = MarkdownIt("commonmark").enable("table").render(card.split("---\n", 2)[2])
    assert "<script" not in html
    assert "<img" not in html
    assert re.findall(r'href="([^"]*)"', html) == [SOURCE, PAPER]
    assert html.count("<h1>") == 1
    assert rows_of(card)["data"] == r"\`photos\` \| \!\[x\](http://tracker)"
    assert "\n#" not in card.split("## Licence")[1]


@pytest.mark.parametrize("link", ["LICENSE.md", "javascript:x", "https://a b", "https://x)](y", 'https://x"y', ""])
def test_a_licence_link_that_is_no_web_address_is_left_out(link):
    origin = {"teacher": {"name": "sd", "hub": False, "license": "other", "license_link": link}}
    assert "The teacher's licence is other. " in model_card(replace(INPUTS, origin=origin))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# A\n\n## Results\n\nold\n\n## Licence\n\nMIT\n", ("# A\n\n## Results\n\n", "\n## Licence\n\nMIT\n")),
        ("# A\n\n## Results\n\n## Licence\n", ("# A\n\n## Results\n\n", "\n## Licence\n")),
        ("# A\n\n## Results\n## Licence\n", ("# A\n\n## Results\n\n", "\n## Licence\n")),
        ("# A\n\n## Results", ("# A\n\n## Results\n\n", "")),
        ("## Results of others\n\n## Results \nold", ("## Results of others\n\n## Results \n\n", "")),
    ],
)
def test_the_results_of_a_card_are_a_section(tmp_path, text, expected):
    (tmp_path / "README.md").write_text(text)
    assert split_card(tmp_path) == expected


@pytest.mark.parametrize("text", [None, "", "# Results\n", "### Results\n"])
def test_a_card_without_that_section_is_named_with_the_remedy(tmp_path, text):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    with pytest.raises(UserError, match=r"README.md .*eave out --update-card"):
        split_card(tmp_path)

"""Captions in nested columns, and tags in a random order."""

import io
import json
import tarfile

import pytest
from PIL import Image

from pipeline.data.fields import field
from pipeline.data.source import open_source
from pipeline.settings.data import DataSettings
from pipeline.system.errors import UserError

NESTED = {"captions": {"en": "a red cat", "de.ch": "es Büsi"}, "a.b": "a key with a dot", "text": None}


def captions(data, **chosen):
    return [record.caption for record in open_source(DataSettings(data=str(data), **chosen)).records]


def png():
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("captions.en", "a red cat"),
        ("captions.de.ch", "es Büsi"),
        ("a.b", "a key with a dot"),
        ("captions.fr", None),
        ("captions.en.more", None),
        ("text.en", None),
        ("captions.", None),
        ("none", None),
    ],
)
def test_a_dotted_name_leads_to_a_field(name, found):
    assert field(NESTED, name) == found


def in_a_list(folder):
    (folder / "0.png").write_bytes(png())
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", **NESTED}))
    return folder


def in_a_tar(folder):
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, content in (("0.png", png()), ("0.json", json.dumps(NESTED).encode())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return folder


def in_a_table(folder):
    datasets = pytest.importorskip("datasets")
    row = {"image": png(), "captions": {"en": "a red cat"}}
    datasets.Dataset.from_list([row]).to_parquet(folder / "0.parquet")
    return folder / "0.parquet"


@pytest.mark.parametrize("write", [in_a_list, in_a_tar, in_a_table])
def test_a_nested_column_is_read_everywhere(tmp_path, write):
    assert captions(write(tmp_path), caption_column="captions.en") == ["a red cat"]


@pytest.mark.parametrize("write", [in_a_list, in_a_table])
def test_a_nested_column_that_is_not_there_is_named(tmp_path, write):
    with pytest.raises(UserError, match="'titles.en'|'titles'"):
        captions(write(tmp_path), caption_column="titles.en")


def test_tags_are_shuffled_by_image_and_view(tmp_path):
    tags = [f"tag {i}" for i in range(9)]
    for name in ("0", "1"):
        (tmp_path / f"{name}.png").write_bytes(png())
        (tmp_path / f"{name}.txt").write_text(" ,".join(tags) + ",")
    plain = captions(tmp_path)
    shuffled = captions(tmp_path, shuffle_tags=True, views=2)
    assert plain == [" ,".join(tags) + ","] * 2
    assert len(set(shuffled)) == 4
    assert all(sorted(caption.split(", ")) == tags for caption in shuffled)
    assert shuffled == captions(tmp_path, shuffle_tags=True, views=2)
    assert shuffled[::2] == captions(tmp_path, shuffle_tags=True)
    assert shuffled != captions(tmp_path, shuffle_tags=True, views=2, seed=1)

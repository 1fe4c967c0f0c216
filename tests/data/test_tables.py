"""Parquet, arrow and saved datasets as a source: columns, splits, names, and bad tables that are refused."""

import builtins

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value

from pipeline.data.source import DataSettings, open_source
from pipeline.system.errors import UserError


@pytest.fixture(autouse=True)
def cache_of_the_library(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "library")


def open_table(data, **chosen):
    return open_source(DataSettings(data=str(data), **chosen))


def rows(**columns):
    return Dataset.from_dict({"image": [b"zero", b"one"], "text": ["nought", "uno"], **columns})


def listed(source):
    return [(record.source_id, record.caption, source.read(record)) for record in source.records]


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_a_table_without_rows_is_refused_and_a_file_without_rows_passed_over(tmp_path, ending):
    schema = pyarrow.schema([("image", pyarrow.binary()), ("text", pyarrow.string())])
    (tmp_path / "data").mkdir()
    for name, values in (("0", []), ("1", [b"one"])):
        table = pyarrow.table({"image": values, "text": ["uno"] * len(values)}, schema)
        path = tmp_path / "data" / f"{name}.{ending}"
        if ending == "parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with pyarrow.ipc.new_stream(path, schema) as stream:
                stream.write_table(table)
    with pytest.raises(UserError, match=r"--data .*0\.\w+ has no rows"):
        open_table(tmp_path / "data" / f"0.{ending}")
    assert listed(open_table(tmp_path / "data")) == [("000000000", "uno", b"one")]


@pytest.mark.parametrize(
    ("image", "reason"),
    [({"bytes": 5, "path": "x"}, "the row has int in place of the image's bytes"), ({"bytes": None, "path": 5}, "")],
)
def test_an_image_of_another_type_has_a_reason(tmp_path, image, reason):
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": [image], "text": ["a caption"]}), path)
    source = open_table(path)
    with pytest.raises(OSError, match=reason or "the row has the path 5"):
        source.read(source.records[0])


PLAIN = [("000000000", "nought", b"zero"), ("000000001", "uno", b"one")]


@pytest.mark.parametrize("kind", ["parquet", "parquets", "arrow", "saved", "split"])
def test_bytes_in_every_kind_of_table(tmp_path, kind):
    data = tmp_path / "data"
    if kind == "parquet":
        data = tmp_path / "data.parquet"
        rows().to_parquet(data)
    elif kind == "parquets":
        data.mkdir()
        for i in range(2):
            rows().select([i]).to_parquet(data / f"{i}.parquet")
    elif kind == "arrow":
        rows().save_to_disk(tmp_path / "saved")
        data = tmp_path / "data.arrow"
        next((tmp_path / "saved").glob("*.arrow")).rename(data)
    elif kind == "saved":
        rows().save_to_disk(data)
    else:
        DatasetDict(train=rows(), test=rows().select([1])).save_to_disk(data)
    assert listed(open_table(data)) == PLAIN
    if kind == "split":
        assert listed(open_table(data, split="test")) == [("000000000", "uno", b"one")]
        with pytest.raises(UserError, match=r"has no split 'all'\. It has 'train', 'test': choose one with --split\."):
            open_table(data, split="all")


def test_the_librarys_own_images_keep_their_names(tmp_path):
    for name, data in (("a.png", b"zero"), ("b.png", b"one")):
        (tmp_path / name).write_bytes(data)
    files = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    features = Features(image=Image(), text=Value("string"))
    dataset = Dataset.from_dict({"image": files, "text": ["nought", "uno"]}, features=features)
    dataset.save_to_disk(tmp_path / "saved")
    (tmp_path / "a.png").unlink()
    expected = [("a.png", "nought", b"zero"), ("b.png", "uno", b"one")]
    assert listed(open_table(tmp_path / "saved")) == expected


@pytest.mark.parametrize("column", ["file_name", "key"])
def test_a_column_may_hold_the_names(tmp_path, column):
    rows(**{column: ["x.png", "y.png"]}).to_parquet(tmp_path / "data.parquet")
    assert [record.source_id for record in open_table(tmp_path / "data.parquet").records] == ["x.png", "y.png"]


def test_other_columns_and_several_captions(tmp_path):
    table = rows(jpg=[b"a", b"b"], generated_caption=[["one", "two"], []])
    table.to_parquet(tmp_path / "data.parquet")
    source = open_table(
        tmp_path / "data.parquet", image_column="jpg", caption_column="generated_caption", captions="all"
    )
    found = [(record.source_id, record.caption or record.problem) for record in source.records]
    assert found == [("000000000", "one"), ("000000000#2", "two"), ("000000001", "the caption is empty")]
    assert [source.read(record) for record in source.records] == [b"a", b"a", b"b"]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"image_column": "jpg"}, r"has no column 'jpg'\. It has 'image', 'text': choose one with --image-column\."),
        ({"caption_column": "label"}, "has no column 'label'.*--caption-column"),
        ({"image_column": "text"}, r"column 'text' holds .*, not images\. Choose another one with --image-column\."),
    ],
)
def test_columns_that_cannot_be_used(tmp_path, chosen, message):
    rows().to_parquet(tmp_path / "data.parquet")
    with pytest.raises(UserError, match=message):
        open_table(tmp_path / "data.parquet", **chosen)


def test_captions_in_several_fields_are_asked_for_by_name(tmp_path):
    table = rows(text=[{"short": "a", "long": "aa"}, {"short": "b", "long": "bb"}])
    table.to_parquet(tmp_path / "data.parquet")
    with pytest.raises(
        UserError, match="holds several fields.*--caption-column text.short, --caption-column text.long"
    ):
        open_table(tmp_path / "data.parquet")
    source = open_table(tmp_path / "data.parquet", caption_column="text.long")
    assert [record.caption for record in source.records] == ["aa", "bb"]


def test_a_table_with_a_column_twice_is_refused_with_the_library_s_reason(tmp_path):
    images, texts = pyarrow.array([b"a", b"b"]), pyarrow.array(["a", "b"])
    twice = pyarrow.table([images, images, texts], names=["image", "image", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "data.parquet")
    with pytest.raises(UserError, match="data.parquet cannot be read as a dataset: Multiple matches for .*image"):
        open_table(tmp_path / "data.parquet")


def test_a_table_from_elsewhere_cannot_name_local_files(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    images = [{"bytes": None, "path": str(tmp_path / "secret.png")}, {"bytes": None, "path": None}]
    Dataset.from_dict({"image": images, "text": ["a", "b"]}).to_parquet(tmp_path / "data.parquet")
    source = open_table(tmp_path / "data.parquet")
    for record, message in zip(source.records, ("has a path .*, not the image's bytes", "has no image"), strict=True):
        with pytest.raises(OSError, match=message):
            source.read(record)


@pytest.mark.parametrize("fields", [("bytes",), ("bytes", "other"), ("path", "bytes")])
def test_images_may_be_structs_with_or_without_paths_and_null(tmp_path, fields):
    image = pyarrow.struct([(name, pyarrow.binary() if name == "bytes" else pyarrow.string()) for name in fields])
    values = [{"bytes": b"zero"}, None, {"bytes": None}, {"bytes": b"three"}]
    table = pyarrow.table({"image": pyarrow.array(values, image), "text": ["a", "b", "c", "d"]})
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    source = open_table(tmp_path / "data.parquet")
    assert [(record.source_id, record.size) for record in source.records] == [
        ("000000000", 4),
        ("000000001", None),
        ("000000002", None),
        ("000000003", 5),
    ]
    assert [source.read(source.records[i]) for i in (0, 3)] == [b"zero", b"three"]
    for i in (1, 2):
        with pytest.raises(OSError, match="the row has no image"):
            source.read(source.records[i])


def test_a_small_file_that_unfolds_to_gigabytes_is_refused(tmp_path, monkeypatch):
    """2,000 times one caption of 100 kB, in a file of a few kB, with a limit of 100 MB. Short captions are taken."""
    monkeypatch.setattr("pipeline.data.tables.MAX_UNFOLDED_BYTES", 100_000_000)
    for name, caption in (("bomb", "x" * 100_000), ("data", "x" * 10)):
        columns = {"image": [b"zero"] * 2_000, "text": pyarrow.array([caption] * 2_000)}
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet", compression="zstd")
    with pytest.raises(UserError, match=r"bomb.parquet has \d+ bytes and unfolds to 2000\d+"):
        open_table(tmp_path / "bomb.parquet")
    assert len(open_table(tmp_path / "data.parquet").records) == 2_000


def test_text_that_is_not_utf8_is_refused(tmp_path):
    raw = pyarrow.array([b"\xff\xfe"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"zero"], "text": raw}), tmp_path / "data.parquet")
    with pytest.raises(UserError, match="holds text that is not UTF-8"):
        open_table(tmp_path / "data.parquet")


def test_an_unknown_name_is_asked_for_once(tmp_path, monkeypatch):
    asked = []

    def dataset_info(self, name, **more):
        asked.append(name)
        raise OSError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr("datasets.load_dataset", None)
    with pytest.raises(UserError, match=r"--data nope does not exist .*hub: no network\. Check the path or the name\."):
        open_table("nope")
    assert asked == ["nope"]


def test_a_damaged_file_and_an_unknown_name_are_refused(tmp_path, monkeypatch):
    (tmp_path / "data.parquet").write_bytes(b"PAR1 but not for long")
    with pytest.raises(UserError, match="data.parquet cannot be read as a dataset: "):
        open_table(tmp_path / "data.parquet")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError,
        match="--data no/such-dataset-anywhere does not exist and cannot be read as a dataset from the hub: ",
    ):
        open_table("no/such-dataset-anywhere")


def test_a_dataset_on_the_hub_is_opened_with_the_chosen_options(tmp_path, monkeypatch):
    calls = []

    def load_dataset(*names, **chosen):
        calls.append((*names, chosen))
        return rows()

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    source = open_table("owner/name", dataset_config_name="small", split="test[:10]", dataset_revision="abc")
    assert listed(source) == PLAIN
    assert calls == [("owner/name", "small", {"split": "test[:10]", "revision": "abc"})]


def test_without_the_library_the_message_says_how_to_install_it(tmp_path, monkeypatch):
    rows().to_parquet(tmp_path / "data.parquet")
    real = builtins.__import__

    def without(name, *arguments, **more):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install 'datasets"):
        open_table(tmp_path / "data.parquet")

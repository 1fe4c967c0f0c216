"""Tars and tables in a bucket list the images that they list in a directory."""

import pytest
from data.test_tars import listed, open_tars, write_tar
from datasets import Dataset
from support.buckets import fill

from pipeline.system.errors import UserError


def contents(source):
    return [(*line, source.read(record)) for line, record in zip(listed(source), source.records, strict=True)]


@pytest.fixture
def tars(bucket, tmp_path):
    (tmp_path / "tars").mkdir()
    for number in range(3):
        members = (f"{number}.jpg", b"image %d" % number), (f"{number}.txt", b"a caption"), (f"{number}b.png", b"x")
        write_tar(tmp_path / "tars" / f"{number}.tar", *members)
    fill("tars", tmp_path / "tars")
    bucket.requests.clear()
    return tmp_path / "tars"


@pytest.mark.parametrize("pattern", ["", "/1.tar", "/{0..1}.tar"])
def test_tars_in_a_bucket_are_those_of_a_directory(tars, pattern):
    assert contents(open_tars(f"s3://bucket/tars{pattern}")) == contents(open_tars(f"{tars}{pattern}"))


def test_what_is_wrong_with_a_tar_is_said_of_its_address(tars, bucket):
    with pytest.raises(UserError, match=r"s3://bucket/tars/3.tar does not exist \(1 of 2 files are missing\)"):
        open_tars("s3://bucket/tars/{2..3}.tar")
    (tars / "0.tar").write_bytes((tars / "0.tar").read_bytes()[:1024])
    fill("tars", tars)
    with pytest.raises(UserError, match="s3://bucket/tars/0.tar is truncated or not a tar"):
        open_tars("s3://bucket/tars")
    with pytest.raises(UserError, match="--data s3://bucket/nothing holds neither tars nor tables"):
        open_tars("s3://bucket/nothing")
    with pytest.raises(UserError, match="--data s3://bucket/tars was given with a password") as caught:
        open_tars("s3://me:secret@bucket/tars")
    assert "secret" not in str(caught.value)


def test_a_table_in_a_bucket_is_copied_once(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "library")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "tables").mkdir()
    Dataset.from_dict({"image": [b"0", b"1"], "text": ["a", "b"]}).to_parquet(tmp_path / "tables" / "0.parquet")
    fill("tables", tmp_path / "tables")
    here = contents(open_tars(tmp_path / "tables"))
    for reads in (1, 0):
        bucket.requests.clear()
        assert contents(open_tars("s3://bucket/tables")) == here
        assert len([request for request in bucket.requests if request.startswith("GET /bucket/tables/")]) == reads

"""Addresses: told from paths, joined with names, and shown without what may be secret."""

from pathlib import Path

import pytest

from shards.location import LocationError, Url, location_of

SIGNED = "https://user:pass@host.example/data/cache/?X-Amz-Signature=abc&sig=def"


def test_a_path_is_a_path_and_an_address_an_address():
    assert location_of("a/b") == Path("a/b")
    assert location_of(Path("a")) == Path("a")
    assert location_of("s3://bucket/a") == Url("s3://bucket/a")
    assert location_of(Url("gs://bucket/a")) == Url("gs://bucket/a")


def test_what_may_be_secret_is_used_and_never_shown():
    url = Url(SIGNED)
    assert (
        url / "s00000.tar"
    ).address == "https://user:pass@host.example/data/cache/s00000.tar?X-Amz-Signature=abc&sig=def"
    for text in (str(url), repr(url), f"{url}", url.name, repr({"cache": url})):
        assert not {"user", "pass", "abc", "def", "?"} & set(text.replace("/", " ").replace(":", " ").split())
        assert "Signature" not in text
    assert str(url) == "https://host.example/data/cache"
    assert url.name == "cache"


def test_names_are_joined():
    assert str(Url("s3://bucket") / "a" / "b") == "s3://bucket/a/b"
    assert str(Url("s3://bucket/a/") / "b") == "s3://bucket/a/b"
    assert str(Url("hf://datasets/user/name@main/cache")) == "hf://datasets/user/name@main/cache"


@pytest.mark.parametrize("text", ["ftp://host/a", "file:///a", "s3a://bucket/a"])
def test_an_unknown_kind_is_refused_with_those_that_are_known(text):
    with pytest.raises(LocationError, match=r"no known kind. Use a path, or one of s3://, gs://, hf://, https://"):
        location_of(text)


@pytest.mark.parametrize("text", ["s3://", "s3:///key", "https://"])
def test_an_address_of_no_place_is_refused(text):
    with pytest.raises(LocationError, match="names no place"):
        location_of(text)


@pytest.mark.parametrize("text", ["s3://key:secret@bucket/a", "gs://bucket/a?token=secret", "s3://a:secret@b"])
def test_credentials_in_a_bucket_s_address_are_refused_and_not_repeated(text):
    with pytest.raises(LocationError, match="with a password or a query. Leave them out") as caught:
        location_of(text)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("text", ["s3:/bucket/latents", "https:/host/latents"])
def test_an_address_with_one_slash_is_no_path(text):
    with pytest.raises(LocationError, match=f"{text} lacks a slash. Write {text.partition(':')[0]}://, or ./{text}"):
        location_of(text)

"""Settings made from Python and from the command line."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.settings.data import DataSettings
from pipeline.settings.distill import DistillSettings
from pipeline.settings.encode import EncodeSettings
from pipeline.settings.evaluate import EvaluateSettings
from pipeline.settings.finetune import FinetuneSettings
from pipeline.settings.sample import SampleSettings
from pipeline.system.errors import UserError
from pipeline.teacher_cache import TeacherCacheSettings

ENCODE = {"teacher": "demo", "data": "images", "out": "latents"}
SAMPLE = {"model": "demo", "prompts": ("a cat",), "out": "images"}


def test_paths_may_be_strings_and_tuples_lists():
    settings = TeacherCacheSettings(teacher="demo", latents="a/b", out="c", students=["sd_small"])
    assert settings == TeacherCacheSettings(teacher="demo", latents=Path("a/b"), out=Path("c"), students=("sd_small",))
    assert settings.teacher == "demo"
    with pytest.raises(UserError, match="--students 'sd_big' is not one of"):
        TeacherCacheSettings(teacher="demo", latents="a/b", out="c", students=["sd_big"])


@pytest.mark.parametrize(
    ("settings", "values", "flag"),
    [
        (EncodeSettings, ENCODE | {"data": "b\udcff"}, "--data"),
        (EncodeSettings, ENCODE | {"out": "b\udcff"}, "--out"),
        (EncodeSettings, ENCODE | {"out": Path("b\udcff")}, "--out"),
        (SampleSettings, SAMPLE | {"prompts": ["a cat", "a \ud83d"]}, "--prompts"),
        (SampleSettings, SAMPLE | {"negative_prompt": "\udcff"}, "--negative-prompt"),
    ],
)
def test_what_utf8_cannot_express_is_refused(settings, values, flag):
    """Otherwise a file that records it fails to be written, after others were."""
    with pytest.raises(UserError, match=f"^{flag} .* holds bytes that are not UTF-8. Rename the file"):
        settings(**values)


@pytest.mark.parametrize("name", ["teacher", "data", "out"])
@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_value_is_not_the_current_directory(name, value):
    with pytest.raises(UserError, match=f"^--{name} is empty. Give a value"):
        EncodeSettings(**ENCODE | {name: value})
    options = [text for key, given in (ENCODE | {name: value}).items() for text in (f"--{key}", given)]
    result = CliRunner().invoke(main, ["encode", *options, "--dry-run"])
    assert result.exit_code == 2
    assert f"Error: --{name} is empty" in result.stderr


def test_an_empty_optional_path_is_refused_and_an_empty_prompt_is_not():
    with pytest.raises(UserError, match="^--prompts is empty"):
        EvaluateSettings(student="s", teacher="demo", out="out", prompts="")
    SampleSettings(**SAMPLE | {"prompts": ("",), "negative_prompt": ""})


def test_a_nul_is_refused():
    with pytest.raises(UserError, match="^--data .* holds a NUL. Remove it"):
        EncodeSettings(**ENCODE | {"data": "a\0b"})


@pytest.mark.parametrize("name", ["validation_prompts", "latents", "out"])
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_a_path_to_what_could_be_read_for_ever_is_refused(tmp_path, name, kind):
    path = tmp_path / kind
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    values = {"model": "demo", "latents": "latents", "out": "out", name: path}
    flag = "--" + name.replace("_", "-")
    with pytest.raises(UserError, match=f"^{flag} .*{kind} is neither a regular file nor a directory. Choose another"):
        FinetuneSettings(**values)
    with pytest.raises(UserError, match=f"^{flag} "):
        FinetuneSettings(**values | {name: str(path)})


@pytest.mark.parametrize(
    ("settings", "values", "name"),
    [
        (DataSettings, {"data": "images"}, "views"),
        (EncodeSettings, ENCODE, "batch_size"),
        (EncodeSettings, ENCODE, "workers"),
        (SampleSettings, SAMPLE, "num_inference_steps"),
        (SampleSettings, SAMPLE, "width"),
        (FinetuneSettings, {"model": "demo", "latents": "l", "out": "o"}, "train_batch_size"),
        (EvaluateSettings, {"student": "s", "teacher": "demo", "out": "o"}, "timing_batch_size"),
    ],
)
def test_a_number_that_would_fill_the_memory_is_refused(settings, values, name):
    with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} is 1000000000; it must be at most"):
        settings(**values, **{name: 10**9})


def test_settings_for_others_hold_no_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alice").mkdir()
    (tmp_path / "alice" / "secret.safetensors").write_bytes(b"")
    for teacher, student, shown in (
        (str(tmp_path / "alice" / "secret.safetensors"), "alice/../alice", ("secret.safetensors", "alice")),
        ("owner/name", "demo", ("owner/name", "demo")),
        ("/nowhere/any more", "./alice", ("any more", "alice")),
    ):
        values = {"student": student, "teacher": teacher, "out": tmp_path / "out", "latents": tmp_path / "latents"}
        published = EvaluateSettings(**values).for_others()
        assert (published["teacher"], published["student"]) == shown
        assert (published["out"], published["latents"]) == ("out", "latents")
        assert str(tmp_path) not in str(published)


def test_an_address_is_refused_where_a_path_belongs_without_what_may_be_secret():
    with pytest.raises(UserError, match="--out s3://bucket/out is an address, and this option takes only") as caught:
        DistillSettings(cache="cache", level="sd_small", out="s3://key:secret@bucket/out?token=secret")
    assert "secret" not in str(caught.value)


def test_an_address_keeps_what_is_secret_to_itself():
    settings = DistillSettings(cache="https://me:secret@host/cache?token=secret", level="sd_small", out="out")
    assert settings.cache.address == "https://me:secret@host/cache?token=secret"
    assert settings.as_json()["cache"] == "https://host/cache"
    assert settings.for_others()["cache"] == "cache"
    assert "secret" not in repr(settings)
    with pytest.raises(UserError, match="--cache s3://bucket/cache was given with a password or a query") as caught:
        DistillSettings(cache="s3://key:secret@bucket/cache", level="sd_small", out="out")
    assert "secret" not in str(caught.value)
    with pytest.raises(UserError, match=r"--cache ftp://host/cache is of no known kind"):
        DistillSettings(cache="ftp://host/cache", level="sd_small", out="out")

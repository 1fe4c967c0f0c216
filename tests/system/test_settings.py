"""Settings made from Python."""

from pathlib import Path

import pytest

from pipeline.system.errors import UserError
from pipeline.teacher_cache import TeacherCacheSettings


def test_paths_may_be_strings_and_tuples_lists():
    settings = TeacherCacheSettings(teacher="demo", latents="a/b", out="c", students=["sd_small"])
    assert settings == TeacherCacheSettings(teacher="demo", latents=Path("a/b"), out=Path("c"), students=("sd_small",))
    assert settings.teacher == "demo"
    with pytest.raises(UserError, match="--students 'sd_big' is not one of"):
        TeacherCacheSettings(teacher="demo", latents="a/b", out="c", students=["sd_big"])

"""The remedy for a missing package."""

from pathlib import Path

import pytest

from pipeline.system.extras import install_command

tomllib = pytest.importorskip("tomllib", reason="new in Python 3.11")
EXTRAS = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("extra", [extra for extra in EXTRAS if extra != "dev"])
def test_the_command_names_the_packages_of_the_extra(extra):
    command, *packages = install_command(extra).replace("pip install", "pip-install").replace("'", "").split(" ")
    assert command == "pip-install"
    assert sorted(packages) == sorted(EXTRAS[extra])

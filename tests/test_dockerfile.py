"""The Dockerfile copies what is there and runs a command that the package installs."""

import json
import re
import shlex
from pathlib import Path

import pytest

from pipeline.cli import main

ROOT = Path(__file__).parent.parent
tomllib = pytest.importorskip("tomllib")
LINES = (ROOT / ".github" / "Dockerfile").read_text().splitlines()


def instructions(name):
    return [line.removeprefix(f"{name} ") for line in LINES if line.startswith(f"{name} ")]


def test_every_file_that_is_copied_exists():
    copied = [shlex.split(line)[:-1] for line in instructions("COPY")]
    assert copied
    assert all((ROOT / name).exists() for names in copied for name in names)


def test_extras_and_command_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"'\.\[(.*)\]'", "\n".join(instructions("RUN")))
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    (entry,) = instructions("ENTRYPOINT")
    assert json.loads(entry)[0] in project["scripts"]


def test_its_python_is_one_that_the_package_takes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    least = tuple(map(int, project["requires-python"].removeprefix(">=").split(".")))
    (image,) = instructions("FROM")
    assert tuple(map(int, re.fullmatch(r"python:(\d+)\.(\d+)-slim", image).groups())) >= least


def test_the_command_in_its_comment_is_taken():
    (line,) = [line for line in LINES if "docker run" in line]
    _, name, *arguments = shlex.split(line[line.index("distill-sd ") :])
    main.commands[name].make_context(name, arguments)

"""Options of earlier versions are refused with what is used in their place."""

import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.cli import main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", ["teacher-cache", "plan"])
@pytest.mark.parametrize("old", ["--token-stride", "--token-min"])
def test_on_the_command_line(command, old):
    result = CliRunner().invoke(main, [command, old, "4"])
    assert result.exit_code == 2
    assert f"{old} was replaced by --tokens N" in result.output
    assert old not in CliRunner().invoke(main, [command, "--help"]).output


@pytest.mark.parametrize("old", ["token_stride", "token-min"])
def test_in_a_file(old, tmp_path):
    (tmp_path / "run.yaml").write_text(f"{old}: 4\n")
    result = CliRunner().invoke(main, ["teacher-cache", "--config", str(tmp_path / "run.yaml")])
    assert result.exit_code == 2
    assert f"{old} was replaced by --tokens N" in " ".join(result.output.split())


@pytest.mark.parametrize("old", ["STRIDE", "TOKEN_MIN"])
def test_as_a_variable_of_make(old):
    result = subprocess.run(["make", "-n", "help", f"{old}=4"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert f"{old}= was replaced by TOKENS=" in result.stderr

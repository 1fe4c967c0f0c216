"""Errors on the way out of a command: what the user can fix is one sentence and status 2."""

import errno
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.fake_command import command_doing

from pipeline.cli import main
from pipeline.system.settings import Settings, option

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class BatchSettings(Settings):
    batch_size: int = option(1, "Images per forward pass.")


def failing(error: BaseException, settings=Settings):
    """A command whose run ends in `error`."""

    def run(settings):
        raise error

    return CliRunner().invoke(command_doing(run, settings=settings))


@pytest.mark.parametrize(
    "number", [errno.EIO, errno.ESTALE, errno.ENOSPC, errno.ENAMETOOLONG, errno.EFBIG, errno.EMFILE]
)
def test_what_the_system_refuses_is_a_sentence_that_names_the_file(number):
    result = failing(OSError(number, os.strerror(number), "out/s00000.tar"))
    assert result.exit_code == 2
    assert result.stderr == f"Error: out/s00000.tar: {os.strerror(number)}. Fix this and rerun the same command.\n"


def test_a_path_that_vanishes_while_a_command_runs_is_a_sentence(tmp_path):
    def run(settings):
        (tmp_path / "gone" / "file").write_bytes(b"")

    result = CliRunner().invoke(command_doing(run))
    assert (result.exit_code, "gone/file: No such file or directory" in result.stderr) == (2, True)


def test_an_error_without_a_file_that_the_user_cannot_fix_keeps_its_traceback():
    result = failing(OSError(errno.EBADF, "Bad file descriptor"))
    assert result.exit_code == 1
    assert isinstance(result.exception, OSError)


def allocate_in_torch():
    torch.empty(1 << 60)


def allocate_in_numpy():
    np.ones(1 << 60, np.uint8)


@pytest.mark.parametrize("allocate", [allocate_in_torch, allocate_in_numpy])
def test_out_of_memory_names_the_options_that_help(allocate):
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        allocate()
    result = failing(raised.value, BatchSettings)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: out of memory (")
    assert result.stderr.endswith("Lower --batch-size, or free memory on this machine.\n")
    assert "--batch-size" not in failing(raised.value).stderr


def test_a_dry_run_that_fails_prints_the_error_alone():
    def plan(settings):
        raise OSError(errno.EACCES, "Permission denied", "data")

    result = CliRunner().invoke(command_doing(print, plan), ["--dry-run"])
    assert (result.exit_code, result.stdout) == (2, "")


def test_check_looks_at_the_options_and_starts_nothing():
    assert CliRunner().invoke(command_doing(None, settings=BatchSettings), ["--check"]).exit_code == 0
    result = CliRunner().invoke(
        main, ["distill", "--cache", "c", "--out", "o", "--level", "sd_tiny", "--seed", "-1", "--check"]
    )
    assert (result.exit_code, result.stderr) == (2, "Error: --seed is -1; it must be at least 0\n")


def test_a_mistyped_command_is_answered_with_the_nearest_one():
    result = CliRunner().invoke(main, ["distil"])
    assert result.exit_code == 2
    assert "No such command 'distil'. Did you mean 'distill'?" in result.stderr


def test_help_is_also_h():
    assert CliRunner().invoke(main, ["-h"]).output == CliRunner().invoke(main, ["--help"]).output


def test_ctrl_c_while_the_work_is_imported_ends_in_status_130(monkeypatch, tmp_path):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "pipeline.commands.verify", raising=False)
    monkeypatch.setattr("importlib.import_module", interrupted)
    result = CliRunner().invoke(main, ["verify", str(tmp_path)])
    assert result.exit_code == 130
    assert result.stderr == "verify: loading libraries\nInterrupted. Rerun the same command to resume.\n"


def test_help_and_mistakes_load_no_torch():
    """They are answered at once."""
    lines = [["--help"], ["distil"], ["encode", "--batch-size", "0"], *([name, "--help"] for name in main.commands)]
    program = f"""
import sys
from click.testing import CliRunner
from pipeline.cli import main
for line in {lines!r}:
    result = CliRunner().invoke(main, line)
    assert result.exit_code == (0 if "--help" in line else 2), result.output
print(sorted({{"torch", "diffusers", "transformers", "accelerate"}} & sys.modules.keys()))
"""
    printed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout == "[]\n"

"""Errors on the way out of a command: what the user can fix is one sentence and status 2."""

import errno
import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.system.command import stage_command
from pipeline.system.settings import Settings, option


@dataclass(frozen=True, kw_only=True)
class BatchSettings(Settings):
    batch_size: int = option(1, "Images per forward pass.")


def failing(error: BaseException, settings=Settings):
    """A command whose run ends in `error`."""

    def run(settings):
        raise error

    return CliRunner().invoke(stage_command("fail", settings, None, run))


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

    result = CliRunner().invoke(stage_command("fail", Settings, None, run))
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

    result = CliRunner().invoke(stage_command("fail", Settings, plan, print), ["--dry-run"])
    assert (result.exit_code, result.stdout) == (2, "")


def test_a_mistyped_command_is_answered_with_the_nearest_one():
    result = CliRunner().invoke(main, ["distil"])
    assert result.exit_code == 2
    assert "No such command 'distil'. Did you mean 'distill'?" in result.stderr


def test_help_is_also_h():
    assert CliRunner().invoke(main, ["-h"]).output == CliRunner().invoke(main, ["--help"]).output


def test_ctrl_c_while_a_command_is_imported_ends_in_status_130(monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    result = CliRunner().invoke(main, ["verify", "--help"])
    assert (result.exit_code, result.stderr) == (130, "Interrupted.\n")

"""A stage as a click command: its settings become options, its errors become exit statuses."""

from __future__ import annotations

import errno
import gc
import importlib
import inspect
import json
import os
import re
import sys
from dataclasses import fields
from types import ModuleType
from typing import Any, NoReturn

import click

from pipeline.system.config_file import config_options
from pipeline.system.echo import is_first_process, say
from pipeline.system.errors import UserError, first_line
from pipeline.system.settings import Settings, click_options, flag
from shards.schema import ShardError

USER_STATUS = 2
# As a shell reports a process that Ctrl-C ended.
INTERRUPTED_STATUS = 130
# What the system says about a disk, a path or a limit. An error that names a file is the user's in any case.
USER_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.ENODEV,
    errno.ENXIO,
    errno.EBUSY,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
}
# torch says it in three ways, by device and allocator.
OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory", re.IGNORECASE)


def stage_command(settings_class: type[Settings]) -> click.Command:
    """The command of a stage: its options, and its work, which is imported when it starts.

    A command that writes nothing has no plan and no --dry-run. An error that the user can fix ends with one message
    and exit status 2. A bug keeps its traceback and ends with exit status 1.
    """

    def callback(dry_run: bool = False, check: bool = False, **values: Any) -> None:
        try:
            settings = settings_class(**values)
            if check:
                return
            work = work_of(settings_class)
            if dry_run:
                lines = work.plan(settings)
                say(json.dumps(settings.as_json(), indent=2, ensure_ascii=False))
                # As comments: the output is a file for --config.
                say("\n".join(f"# {line}" for line in [*lines, "dry run: nothing was written"]))
            else:
                work.run(settings)
        except (UserError, ShardError) as error:
            _stop(f"Error: {error}", USER_STATUS)
        except KeyboardInterrupt as stop:
            _stop(str(stop) or "Interrupted. Rerun the same command to resume.", INTERRUPTED_STATUS)
        except Exception as error:
            os_error = fixable_os_error(error)
            if os_error is not None:
                where = os_error.filename or "a file or directory that this command uses"
                _stop(f"Error: {where}: {os_error.strerror}. Fix this and rerun the same command.", USER_STATUS)
            if is_out_of_memory(error):
                _stop(f"Error: out of memory ({first_line(error)}). {memory_remedy(settings_class)}", USER_STATUS)
            raise

    params = [*click_options(settings_class), *config_options(settings_class)]
    params.append(click.Option(["--check"], is_flag=True, help="Check the options alone, and start nothing."))
    if settings_class.has_plan:
        params.append(
            click.Option(["--dry-run"], is_flag=True, help="Print the settings and the plan without writing anything.")
        )
    return click.Command(
        settings_class.command,
        callback=callback,
        params=params,
        help=inspect.getdoc(settings_class),
        context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
    )


def work_of(settings_class: type[Settings]) -> ModuleType:
    """The module of a command's work. The first import of its libraries takes seconds, so that is said.

    Collections of garbage would look through all that the libraries make, and all of it stays.
    """
    if settings_class.work_module in sys.modules:
        return sys.modules[settings_class.work_module]
    if is_first_process():
        say(f"{settings_class.command}: loading libraries", err=True)
    gc.disable()
    try:
        return importlib.import_module(settings_class.work_module)
    finally:
        gc.freeze()
        gc.enable()


def fixable_os_error(error: BaseException) -> OSError | None:
    """The failure to read or write that caused `error`, if the user can fix it.

    safetensors gives the error number only in its message, and torch.save raises another error in its place.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno and (cause.filename or cause.errno in USER_ERRNOS):
            return cause
        match = re.search(r"\(os error (\d+)\)", str(cause))
        if match and int(match[1]) in USER_ERRNOS:
            return OSError(int(match[1]), os.strerror(int(match[1])))
        cause = cause.__cause__ or cause.__context__
    return None


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None
    )


def memory_remedy(settings_class: type[Settings]) -> str:
    """What the user of a command can do when memory runs out: lower the options that it has for that."""
    names = {field.name for field in fields(settings_class)}
    lower = [flag(name) for name in ("batch_size", "train_batch_size", "workers") if name in names]
    more = ["add --gradient-checkpointing"] if "gradient_checkpointing" in names else []
    remedies = [*([f"lower {' or '.join(lower)}"] if lower else []), *more, "free memory on this machine"]
    sentence = ", or ".join(remedies)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _stop(message: str, status: int) -> NoReturn:
    say(message, err=True)
    sys.exit(status)

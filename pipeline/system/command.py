"""A stage as a click command: its settings become options, its errors become exit statuses."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from pipeline.system.errors import UserError
from pipeline.system.settings import Settings, click_options
from shards.schema import ShardError

USER_STATUS = 2
# A full disk or a path that cannot be written: the user can fix these.
USER_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
}
INTERRUPTED_STATUS = 130


def stage_command(
    name: str, settings_class: type[Settings], plan: Callable[[Any], list[str]] | None, run: Callable[[Any], None]
) -> click.Command:
    """The command of a stage: `run(settings)` does the work, and `plan(settings)` returns the lines of --dry-run.

    A command that writes nothing has no plan and no --dry-run. An error that the user can fix ends with one message
    and exit status 2. A bug keeps its traceback and ends with exit status 1.
    """

    def callback(dry_run: bool = False, **values: Any) -> None:
        try:
            settings = settings_class(**values)
            if plan and dry_run:
                click.echo(json.dumps(settings.as_json(), indent=2, ensure_ascii=False))
                click.echo("\n".join(plan(settings)))
                click.echo("dry run: nothing was written")
            else:
                run(settings)
        except (UserError, ShardError) as error:
            _stop(f"Error: {error}", USER_STATUS)
        except KeyboardInterrupt:
            _stop("Interrupted. Rerun the same command to resume.", INTERRUPTED_STATUS)
        except Exception as error:
            os_error = fixable_os_error(error)
            if os_error is not None:
                where = os_error.filename or "the output directory"
                _stop(f"Error: {where}: {os_error.strerror}. Fix this and rerun the same command.", USER_STATUS)
            if isinstance(error, RuntimeError) and "out of memory" in str(error):
                _stop(f"Error: {str(error).splitlines()[0]} Try a smaller batch size.", USER_STATUS)
            raise

    params = click_options(settings_class)
    if plan:
        params.append(
            click.Option(["--dry-run"], is_flag=True, help="Print the settings and the plan without writing anything.")
        )
    help = run.__doc__ or ""
    return click.Command(
        name,
        callback=callback,
        params=params,
        help=help,
        context_settings={"max_content_width": 110},
    )


def fixable_os_error(error: BaseException) -> OSError | None:
    """The failure to read or write that caused `error`, if the user can fix it.

    safetensors gives the error number only in its message, and torch.save raises another error in its place.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in USER_ERRNOS:
            return cause
        match = re.search(r"\(os error (\d+)\)", str(cause))
        if match and int(match[1]) in USER_ERRNOS:
            return OSError(int(match[1]), os.strerror(int(match[1])))
        cause = cause.__cause__ or cause.__context__
    return None


def _stop(message: str, status: int) -> NoReturn:
    click.echo(message, err=True)
    sys.exit(status)

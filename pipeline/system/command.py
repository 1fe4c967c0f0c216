"""A stage as a click command: options from its settings, `--dry-run`, and errors as exit statuses."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import click

from pipeline.system.errors import UserError
from pipeline.system.settings import Settings, click_options
from shards.schema import ShardError

USER_STATUS = 2
# A disk that is full, or a place that cannot be written: for the user to mend.
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
    """The command of a stage. `plan(settings)` gives the lines of --dry-run, `run(settings)` does it.

    A command that makes nothing has no plan, and no --dry-run.

    What the user can mend ends in one message and status 2; a fault of ours keeps its traceback and
    ends in status 1.
    """

    def callback(dry_run: bool = False, **values: Any) -> None:
        try:
            settings = settings_class(**values)
            if dry_run:
                click.echo(json.dumps(settings.as_json(), indent=2, ensure_ascii=False))
                click.echo("\n".join(plan(settings)))
                click.echo("dry run: nothing was written")
            else:
                run(settings)
        except (UserError, ShardError) as error:
            _stop(f"Error: {error}", USER_STATUS)
        except KeyboardInterrupt:
            _stop("Interrupted. Run the same command again to go on.", INTERRUPTED_STATUS)
        except Exception as error:
            refusal = refusal_of_the_system(error)
            if refusal is not None:
                where = refusal.filename or "the output directory"
                _stop(f"Error: {where}: {refusal.strerror}; mend that and run the same command again", USER_STATUS)
            if isinstance(error, RuntimeError) and "out of memory" in str(error):
                _stop(f"Error: {str(error).splitlines()[0]} Try a smaller batch size.", USER_STATUS)
            raise

    params = click_options(settings_class)
    if plan:
        params.append(click.Option(["--dry-run"], is_flag=True, help="Print the settings and the plan, write nothing."))
    help = run.__doc__ or ""
    return click.Command(
        name,
        callback=callback,
        params=params,
        help=help,
        context_settings={"max_content_width": 110},
    )


def refusal_of_the_system(error: BaseException) -> OSError | None:
    """The refusal to read or write that is behind `error`, if the user can mend it.

    safetensors tells it in words alone, and torch.save meets it and raises an error of its own.
    """
    seen = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in USER_ERRNOS:
            return seen
        told = re.search(r"\(os error (\d+)\)", str(seen))
        if told and int(told[1]) in USER_ERRNOS:
            return OSError(int(told[1]), os.strerror(int(told[1])))
        seen = seen.__cause__ or seen.__context__
    return None


def _stop(message: str, status: int) -> None:
    click.echo(message, err=True)
    sys.exit(status)

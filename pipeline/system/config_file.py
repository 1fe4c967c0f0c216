"""--config and --preset: options from a YAML file. Those on the command line win.

A file holds the options of one command, as --dry-run prints them, or of several, each under the command's name:

    encode: {teacher: checkpoint/, data: images/, out: latents/}
    distill: {cache: cache/, out: student/, level: sd_small}
"""

from __future__ import annotations

import functools
import reprlib
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from pipeline.system.errors import did_you_mean
from pipeline.system.settings import Settings, flag, kind_of
from pipeline.system.text_files import read_text
from pipeline.system.yaml_file import parse_yaml

# Lists of lists by aliases can be without end.
SHORT = reprlib.Repr()
SHORT.maxlevel = 2
PRESETS = Path(__file__).parents[1] / "presets"


def config_options(settings: type[Settings]) -> list[click.Parameter]:
    """--config, and --preset where there are any for the command."""
    command = settings.command

    def read(context: click.Context, option: click.Parameter, value: str | None) -> None:
        if value is None:
            return
        file = PRESETS / f"{value}.yaml" if option.name == "preset" else Path(value)
        context.meta[f"{__name__}.{option.name}"] = section_of(file, settings)
        given = [context.meta.get(f"{__name__}.{name}", {}) for name in ("preset", "config")]
        context.default_map = {**given[0], **given[1]}

    eager: dict[str, Any] = {"is_eager": True, "expose_value": False, "callback": read}
    options: list[click.Parameter] = [
        click.Option(["--config"], metavar="FILE", help="YAML file of options, as --dry-run prints them.", **eager)
    ]
    presets = [name for name, commands in commands_of_presets().items() if command in commands]
    if presets:
        options.append(
            click.Option(["--preset"], type=click.Choice(presets), help="Options of a published recipe.", **eager)
        )
    return options


@functools.cache
def commands_of_presets() -> dict[str, list[str]]:
    """The commands that each preset has options for."""
    return {file.stem: list(parse_yaml(file.read_text())) for file in sorted(PRESETS.glob("*.yaml"))}


def section_of(file: Path, settings: type[Settings]) -> dict[str, Any]:
    """The options of a command that a file holds, by the names of its settings. Raises click.UsageError."""
    command = settings.command
    try:
        content = parse_yaml(read_text(file)) or {}
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise click.UsageError(f"--config {file} cannot be read: {reason}") from None
    if not isinstance(content, dict):
        raise click.UsageError(f"--config {file} is not a list of options. Write lines such as `seed: 0`.")
    known = [setting.name for setting in fields(settings)]
    sections = [key for key, value in content.items() if isinstance(value, dict) or (key == command and value is None)]
    if sections and not any(str(key).replace("-", "_") in known for key in content):
        if command not in content:
            raise click.UsageError(f"--config {file} has no section {command}. It has {', '.join(map(str, content))}.")
        content = content[command] or {}
    hints = typing.get_type_hints(settings)
    repeated = {setting.name for setting in fields(settings) if setting.metadata.get("repeated")}
    found = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in settings.replaced:
            raise click.UsageError(f"--config {file}: {key} was replaced by {settings.replaced[name]}.")
        if name not in known:
            meant = did_you_mean(name.replace("_", "-"), [flag(setting)[2:] for setting in known])
            raise click.UsageError(f"--config {file}: {command} has no option {key!r}.{meant}")
        if value is not None:
            expected = mismatch(value, kind_of(hints[name]))
            if expected:
                raise click.UsageError(f"--config {file}: {key} is {SHORT.repr(value)}; write {expected}.")
            found[name] = [value] if name in repeated and isinstance(value, str) else value
    return found


def mismatch(value: Any, kind: Any) -> str | None:
    """What to write for an option of this kind in place of a value that is none of its values, or None if it is one."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool:
        return None if isinstance(value, bool) else "true or false"
    if kind is int:
        return None if is_number and isinstance(value, int) else "a whole number"
    if kind is float:
        return None if is_number else "a number"
    if typing.get_origin(kind) is tuple:
        items = value if isinstance(value, list) else [value]
        return None if all(isinstance(item, str) for item in items) else "text, or a list of texts, each in quotes"
    return None if isinstance(value, str) else "text, in quotes"

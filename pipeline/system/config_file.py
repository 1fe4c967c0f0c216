"""--config and --preset: options from a YAML file. Those on the command line win.

A file holds the options of one command, as --dry-run prints them, or of several, each under the command's name:

    encode: {teacher: checkpoint/, data: images/, out: latents/}
    distill: {cache: cache/, out: student/, level: sd_small}
"""

from __future__ import annotations

import difflib
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import yaml

from pipeline.system.settings import Settings, flag

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
    presets = [file.stem for file in sorted(PRESETS.glob("*.yaml")) if command in yaml.safe_load(file.read_text())]
    if presets:
        options.append(
            click.Option(["--preset"], type=click.Choice(presets), help="Options of a published recipe.", **eager)
        )
    return options


def section_of(file: Path, settings: type[Settings]) -> dict[str, Any]:
    """The options of a command that a file holds, by the names of its settings. Raises click.UsageError."""
    command = settings.command
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise click.UsageError(f"--config {file} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise click.UsageError(f"--config {file} is not a list of options. Write lines such as `seed: 0`.")
    if content and all(isinstance(value, dict) for value in content.values()):
        if command not in content:
            raise click.UsageError(f"--config {file} has no section {command}. It has {', '.join(map(str, content))}.")
        content = content[command]
    known = [setting.name for setting in fields(settings)]
    found = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            meant = f" Did you mean {flag(close[0])[2:]}?" if close else ""
            raise click.UsageError(f"--config {file}: {command} has no option {key!r}.{meant}")
        if isinstance(value, dict):
            raise click.UsageError(f"--config {file}: {key} is a list of options, not a value.")
        if value is not None:
            found[name] = value
    return found

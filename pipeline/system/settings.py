"""Settings of a stage: a frozen dataclass whose fields carry their help text and limits.

The same fields check values at construction, become the click options of the stage's command, and are
written as JSON next to the output.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import click

from pipeline.system.errors import UserError, did_you_mean
from pipeline.system.names import public_name
from pipeline.system.text_files import is_unicode
from shards.location import Location, LocationError, Url, is_url, without_secrets
from shards.regular import is_special
from shards.store import open_store, write_json

REQUIRED = dataclasses.MISSING
# numpy and torch hold counts and seeds in 64 bits with a sign.
LARGEST_INT = 2**63 - 1


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    ge: float | None = None,
    le: float | None = None,
    gt: float | None = None,
    lt: float | None = None,
    argument: bool = False,
    repeated: bool = False,
    place: bool = False,
) -> Any:
    """A settings field. The limits have annotated-types' names: `ge` (at least), `le` (at most), `gt`, `lt`.

    An `argument` is positional on the command line. A `repeated` option is a tuple with one value per use. A `place` is
    text that may be a path or a name on a hub.
    """
    metadata = {"help": help, "choices": choices, "ge": ge, "le": le, "gt": gt, "lt": lt}
    metadata |= {"argument": argument, "repeated": repeated, "place": place}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base class of every stage's settings. Checks each field at construction: its limits, that text can be written
    as UTF-8, that neither a path nor anything required is empty, that an address stands only where one can be used (the
    fields that are a `Location`), and that a path leads to no FIFO or device.

    Paths may be given as strings, and tuples as lists. Raises UserError with the option, its value and the allowed
    values. The docstring of a subclass is its command's help. `work_module` holds `run(settings)`, and
    `plan(settings)`, the lines of --dry-run, if `has_plan`.
    """

    command: ClassVar[str]
    work_module: ClassVar[str]
    has_plan: ClassVar[bool] = False
    # Options of earlier versions, and what to use in their place.
    replaced: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for setting in fields(self):
            value = getattr(self, setting.name)
            is_path = kind_of(hints[setting.name]) is Path
            if is_path and isinstance(value, str) and is_url(value):
                value = _url(setting, hints[setting.name], value)
                object.__setattr__(self, setting.name, value)
            _check_text(flag(setting.name), value, needed=is_path or setting.default is REQUIRED)
            if is_path and not isinstance(value, Url | None) and is_special(Path(value)):
                raise UserError(
                    f"{flag(setting.name)} {value} is neither a regular file nor a directory. Choose another one."
                )
            if isinstance(value, str) and is_path:
                object.__setattr__(self, setting.name, Path(value))
            elif isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, setting.name, value)
            if value is not None:
                _check(flag(setting.name), value, setting.metadata)

    def as_json(self) -> dict[str, Any]:
        return {setting.name: _plain(getattr(self, setting.name)) for setting in _ordered(type(self))}

    def for_others(self) -> dict[str, Any]:
        """`as_json`, for files and logs that are published: of each path only its last part."""
        return {setting.name: _public(setting, getattr(self, setting.name)) for setting in _ordered(type(self))}


def _url(setting: dataclasses.Field[Any], hint: Any, value: str) -> Url:
    """The address that an option was given. Raises UserError for one that cannot be used, and where none can."""
    if Url not in typing.get_args(hint):
        raise UserError(
            f"{flag(setting.name)} {without_secrets(value)} is an address, and this option takes only a path on this "
            "machine. Choose a directory."
        )
    try:
        return Url(value)
    except LocationError as error:
        raise UserError(f"{flag(setting.name)} {error}") from None


def flag(name: str) -> str:
    """The command-line name of a field: `batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def _check_text(name: str, value: Any, needed: bool) -> None:
    """Raise UserError for text or a path that UTF-8 cannot express or that holds a NUL, and for an empty one that is
    `needed`."""
    for item in value if isinstance(value, tuple | list) else (value,):
        text = str(item) if isinstance(item, str | Path) else ""
        if not is_unicode(text):
            raise UserError(f"{name} {text} holds bytes that are not UTF-8. Rename the file, or correct the value.")
        if "\0" in text:
            raise UserError(f"{name} {text} holds a NUL. Remove it.")
    if isinstance(value, str) and needed and not value.strip():
        raise UserError(f"{name} is empty. Give a value, or leave the option out if it has a default.")


def _check(name: str, value: Any, limits: typing.Mapping[str, Any]) -> None:
    choices, ge, le, gt, lt = (limits.get(key) for key in ("choices", "ge", "le", "gt", "lt"))
    for item in value if isinstance(value, tuple) else (value,):
        if choices and item not in choices:
            raise UserError(f"{name} {not_one_of(item, choices)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} is {value}; it must be a finite number")
    if isinstance(value, int) and value > LARGEST_INT:
        raise UserError(f"{name} is {value}; it must be at most {LARGEST_INT}")
    if ge is not None and value < ge:
        raise UserError(f"{name} is {value}; it must be at least {ge}")
    if le is not None and value > le:
        raise UserError(f"{name} is {value}; it must be at most {le}")
    if gt is not None and value <= gt:
        raise UserError(f"{name} is {value}; it must be more than {gt}")
    if lt is not None and value >= lt:
        raise UserError(f"{name} is {value}; it must be less than {lt}")


def not_one_of(value: object, choices: tuple[str, ...]) -> str:
    """The end of a message about a value that is none of the choices."""
    return f"{value!r} is not one of {', '.join(choices)}.{did_you_mean(str(value), choices)}"


def _plain(value: Any) -> Any:
    if isinstance(value, Path | Url):
        return str(value)
    if isinstance(value, str) and is_url(value):
        return without_secrets(value)
    return list(value) if isinstance(value, tuple) else value


def _public(setting: dataclasses.Field[Any], value: Any) -> Any:
    if isinstance(value, Path | Url):
        return value.name
    return public_name(value) if setting.metadata["place"] and value is not None else _plain(value)


class Choice(click.Choice):
    """One of several names. The message about another one asks whether a similar name was meant."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value not in self.choices:
            self.fail(not_one_of(value, tuple(self.choices)), param, ctx)
        return super().convert(value, param, ctx)


class PathText(click.ParamType):
    """A path as text, which the settings check and convert: as a Path, an empty one would be the current directory."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value


class CommaSeparated(click.ParamType):
    """`a,b` on the command line, or a list in a file, becomes a tuple of strings in the settings."""

    name = "name,name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return tuple(map(str, value))


def click_options(settings: type[Settings]) -> list[click.Parameter]:
    """One click option (or argument) per field: the required ones first."""
    hints = typing.get_type_hints(settings)
    ordered = sorted(_ordered(settings), key=lambda setting: setting.default is not REQUIRED)
    return [
        *(_click_option(setting, hints[setting.name]) for setting in ordered),
        *map(_replaced_option, settings.replaced.items()),
    ]


def _replaced_option(replaced: tuple[str, str]) -> click.Parameter:
    """A hidden option that only says what is used in its place."""
    name, replacement = replaced

    def refuse(context: click.Context, option: click.Parameter, value: str | None) -> None:
        if value is not None:
            raise click.UsageError(f"{flag(name)} was replaced by {replacement}.", context)

    return click.Option([flag(name), name], hidden=True, expose_value=False, callback=refuse)


def _ordered(settings: type[Settings]) -> list[dataclasses.Field[Any]]:
    """The fields of a class: its own, then those of its bases, in the order in which it names them."""
    ranks: dict[str, int] = {}
    for rank, base in enumerate(settings.__mro__):
        for name in inspect.get_annotations(base):
            ranks.setdefault(name, rank)
    return sorted(fields(settings), key=lambda setting: ranks[setting.name])


def _click_option(setting: dataclasses.Field[Any], hint: Any) -> click.Parameter:
    kind = kind_of(hint)
    if setting.metadata["argument"]:
        return click.Argument([setting.name], type=_parameter_type(kind, setting), metavar="DIR")
    name, help = flag(setting.name), setting.metadata["help"]
    if setting.metadata["repeated"]:
        return click.Option([name, setting.name], multiple=True, required=setting.default is REQUIRED, help=help)
    if setting.default is REQUIRED:
        return click.Option([name, setting.name], type=_parameter_type(kind, setting), required=True, help=help)
    default = setting.default
    if kind is bool:
        shown = default is not None
        return click.Option([f"{name}/--no-{name[2:]}"], default=default, show_default=shown, help=help)
    choices = setting.metadata["choices"]
    is_list = typing.get_origin(kind) is tuple
    return click.Option(
        [name, setting.name],
        type=_parameter_type(kind, setting),
        default=default,
        show_default=",".join(default) if is_list and default is not None else default is not None,
        help=help + (f" Choices: {', '.join(choices)}." if is_list and choices else ""),
    )


def _parameter_type(kind: Any, setting: dataclasses.Field[Any]) -> Any:
    if typing.get_origin(kind) is tuple:
        return CommaSeparated()
    if kind is Path:
        return PathText()
    choices = setting.metadata["choices"]
    return Choice(choices) if choices else kind


def kind_of(hint: Any) -> Any:
    """The type of a setting's values besides None."""
    if isinstance(hint, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not types.NoneType)
    return hint


def write_settings(out: Location, name: str, settings: Settings) -> None:
    write_json(open_store(out), f"{name}.json", settings.as_json())

"""Where a shard set may lie: a directory, or an address in a bucket, on a hub or on a web server."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

# What each kind of address needs besides this package: the names of libraries as pip knows them.
LIBRARIES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "https": "aiohttp", "http": "aiohttp"}
WEB = ("https", "http")
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
ONE_SLASH = re.compile(rf"({'|'.join(LIBRARIES)}):/(?!/)")
USERINFO = re.compile(r"(?<=://)[^/?#]*@")


class LocationError(ValueError):
    """An address that cannot be used. The message says what can, and shows nothing secret."""


@dataclass(frozen=True)
class Url:
    """An address such as s3://bucket/cache. Its parts that may be secret, a password and a query, are kept for the
    requests alone: `str` and `repr` leave them out.

    Raises LocationError for an address of another kind, and for credentials in one that has no place for them.
    """

    address: str = field(repr=False)

    def __post_init__(self) -> None:
        if self.scheme not in LIBRARIES:
            known = ", ".join(f"{scheme}://" for scheme in LIBRARIES)
            raise LocationError(f"{self} is of no known kind. Use a path, or one of {known}.")
        rest = self.address.partition("://")[2]
        if not rest.strip("/") or rest.startswith("/"):
            raise LocationError(
                f"{self} names no place. Write {self.scheme}://, then what holds the data, then its path."
            )
        if self.scheme not in WEB and ("?" in rest or re.match(r"[^/@]*:[^/]*@", rest)):
            raise LocationError(
                f"{self} was given with a password or a query. Leave them out: credentials are taken from where the "
                f"library {LIBRARIES[self.scheme]} looks for them, such as the environment."
            )

    @property
    def scheme(self) -> str:
        match = SCHEME.match(self.address)
        return match[1].lower() if match else ""

    def __str__(self) -> str:
        return without_secrets(self.address)

    def __repr__(self) -> str:
        return f"Url({str(self)!r})"

    def __truediv__(self, name: str) -> Url:
        """The address of a name below this one, with the same query."""
        path, mark, query = self.address.partition("?")
        return Url(f"{path.rstrip('/')}/{name}{mark}{query}")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return str(self).rpartition("/")[2]

    @property
    def parent(self) -> Url | None:
        """The address without the last part of its path; None if it has no path."""
        path, mark, query = self.address.partition("?")
        above = path.rstrip("/").rpartition("/")[0]
        return None if above.endswith("/") else Url(f"{above}{mark}{query}")


Location = Path | Url


def without_secrets(address: str) -> str:
    """An address without what may be secret, and without a slash at its end."""
    return USERINFO.sub("", re.split("[?#]", address)[0]).rstrip("/")


def is_url(text: str) -> bool:
    return SCHEME.match(text) is not None


def location_of(text: str | Path | Url) -> Location:
    """The place that a text names. Raises LocationError for an address that cannot be used."""
    if isinstance(text, str):
        if slip := ONE_SLASH.match(text):
            raise LocationError(f"{text} lacks a slash. Write {slip[1]}://, or ./{text} for a path.")
        return Url(text) if is_url(text) else Path(text)
    return text

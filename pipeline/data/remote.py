"""Tars and tables at an address, such as s3://bucket/tars or s3://bucket/{00000..00012}.tar.

A tar is read from end to end once, to list it, and its images later by ranges. Tables are copied to this machine, since
the library maps them into memory.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from pipeline.data.records import ListedImage, Source
from pipeline.data.tables import BUILDERS, Table
from pipeline.data.tars import Tars, expanded
from pipeline.settings.data import DataSettings
from pipeline.system.copies import copies
from pipeline.system.errors import UserError
from shards.files import atomic_file
from shards.location import LocationError, Url, without_secrets
from shards.store import Store, at_once, open_store, read_chunks


class RemoteTars:
    """As `Tars`, of tars at addresses. The names of their images are the same as in a directory."""

    def __init__(self, tars: list[Url], image_column: str | None, caption_column: str | None) -> None:
        self.tars, self.columns = [beside(tar) for tar in tars], (image_column, caption_column)
        self.passed_over: Counter[str] = Counter()

    def images(self) -> list[ListedImage]:
        numbers = tqdm(range(len(self.tars)), unit="tar", desc="list", delay=2)
        return [image for number in numbers for image in self._list(number)]

    def read(self, location: tuple[int, int, int]) -> bytes:
        number, offset, length = location
        store, name = self.tars[number]
        (data,) = store.read_ranges(name, [(offset, length)])
        if len(data) != length:
            raise OSError(f"{name} is shorter than when it was listed")
        return data

    def _list(self, number: int) -> list[ListedImage]:
        """The images of one tar, which is on this machine meanwhile."""
        store, name = self.tars[number]
        with tempfile.TemporaryDirectory(prefix="distill-sd-") as folder:
            copy = Tars([Path(folder) / name], *self.columns)
            with open(copy.tars[0], "wb") as stream:
                stream.writelines(read_chunks(store, name))
            try:
                found = copy.images()
            except UserError as error:
                raise UserError(str(error).replace(str(copy.tars[0]), f"{store}/{name}")) from None
        self.passed_over += copy.passed_over
        return [
            replace(image, location=image.location and (number, *image.location[1:]), modified=None) for image in found
        ]


def open_remote(settings: DataSettings) -> Source:
    """The tars or tables at an address: one, a brace pattern of tars, or all of one kind that lie directly below it.

    Raises UserError if there are none, or if the address cannot be used.
    """
    shown = without_secrets(settings.data)
    for ending in (".tar", *BUILDERS):
        found = addresses(settings.data, shown) if shown.endswith(ending) else below(_url(settings.data), ending)
        if found and ending == ".tar":
            return RemoteTars(found, settings.image_column, settings.caption_column)
        if found:
            return Table.of_files(list(map(copy_of, found)), settings)
    raise UserError(
        f"--data {shown} holds neither tars nor tables. At an address there may be .tar files, or .parquet or .arrow "
        "files. Copy other data to this machine."
    )


def below(folder: Url, ending: str) -> list[Url]:
    """The objects that lie directly below an address and have this ending, sorted. A Mac's `._` files do not count."""
    names = open_store(folder).list()
    return [folder / name for name in names if name.endswith(ending) and not name.startswith("._")]


def addresses(pattern: str, shown: str) -> list[Url]:
    """The addresses that a pattern stands for. Raises UserError for one where nothing is."""
    path, mark, query = pattern.partition("?")
    tars = [_url(f"{name}{mark}{query}") for name in expanded(path, shown)]
    places = [beside(tar) for tar in tars]
    found = at_once(places[0][0], lambda place: place[0].exists(place[1]), places)
    missing = [tar for tar, exists in zip(tars, found, strict=True) if not exists]
    if missing:
        raise UserError(
            f"--data {shown}: {missing[0]} does not exist ({len(missing)} of {len(tars)} files are missing). "
            "Fix the address or restore the files."
        )
    return tars


def beside(url: Url) -> tuple[Store, str]:
    """The store that holds an object, and the object's name in it."""
    if url.parent is None:
        raise UserError(f"--data {url} names no object. Write what holds it, then its path.")
    return open_store(url.parent), url.name


def copy_of(url: Url) -> Path:
    """A copy of an object on this machine, made unless there is one of the same address and length."""
    store, name = beside(url)
    size = store.size(name) or 0
    folder = copies() / "tables" / hashlib.sha256(f"{url} {size}".encode()).hexdigest()
    if not (folder / name).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        bar = tqdm(total=size, unit="B", unit_scale=True, desc=f"download {name}", delay=2)
        with bar as progress, atomic_file(folder / name) as stream:
            for chunk in read_chunks(store, name):
                progress.update(stream.write(chunk))
    return folder / name


def _url(address: str) -> Url:
    try:
        return Url(address)
    except LocationError as error:
        raise UserError(f"--data {error}") from None

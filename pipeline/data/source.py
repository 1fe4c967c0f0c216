"""Where captioned images come from: `open_source` opens the input that `--data` names and lists its records.

Each kind of input is a module with a class that lists its images with their captions, in a fixed order, and reads an
image's bytes.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.files import refuse_special
from pipeline.data.image_folder import ImageFolder, metadata_in
from pipeline.data.records import Record, Source, inputs_sha256, records_of
from pipeline.data.remote import RemoteTars, open_remote
from pipeline.data.tables import Table, is_saved, tables_in
from pipeline.data.tars import Tars, tars_named
from pipeline.settings.data import DataSettings
from pipeline.system.echo import one_line, plural, printable
from pipeline.system.errors import UserError
from shards.location import is_url, without_secrets
from shards.schema import MANIFEST

__all__ = ["DataSettings", "OpenSource", "Record", "inputs_sha256", "open_source"]


class OpenSource:
    """A source with the records that the settings choose."""

    def __init__(self, source: Source, settings: DataSettings) -> None:
        self.source = source
        self.records = records_of(source.images(), settings)
        if not self.records:
            raise UserError(f"--data {settings.data} contains no images")

    def read(self, record: Record) -> bytes:
        """The encoded image. Raises OSError if it does not exist."""
        return self.source.read(record.location)

    def sorted(self, order: Sequence[int]) -> OpenSource:
        """The same source with its records in another order."""
        other = copy.copy(self)
        other.records = [self.records[place] for place in order]
        return other

    def notes(self) -> list[str]:
        """What a user should know about the input: files that were passed over, and records without an image."""
        lines = []
        over = self.source.passed_over if isinstance(self.source, (ImageFolder, Tars, RemoteTars)) else Counter()
        if over:
            kinds = ", ".join(
                f"{count} {kind}" for kind, count in sorted(over.items(), key=lambda kind: (-kind[1], kind))[:5]
            )
            lines.append(f"note: passed over {plural(over.total(), 'file')} of other kinds: {printable(kinds)}")
        unusable = [record for record in self.records if record.problem]
        if unusable:
            first = one_line(f"{unusable[0].source_id}: {unusable[0].problem}")
            entries = plural(len(self.records), "entry", "entries")
            lines.append(f"note: {len(unusable)} of {entries} will be skipped. The first is {first}")
        return lines


def open_source(settings: DataSettings) -> OpenSource:
    """The source that `--data` names. Raises UserError if it does not exist, is of no known kind, or has no images."""
    try:
        return OpenSource(_source(settings), settings)
    except UserError as error:
        # Names and lines of the input are part of the message, and an address may hold what is secret.
        shown = without_secrets(settings.data) if is_url(settings.data) else settings.data
        raise UserError(printable(str(error).replace(settings.data, shown))) from None


def _source(settings: DataSettings) -> Source:
    if is_url(settings.data):
        return open_remote(settings)
    data = Path(settings.data)
    refuse_special(data)
    if (data / MANIFEST).is_file() and any(data.glob("*.index")):
        raise UserError(
            f"--data {data} holds latents or a cache, not images. Give the images and captions that they were made "
            "from."
        )
    if metadata_in(data):
        return ImageFolder(data, settings.image_column, settings.caption_column)
    if tars := tars_named(settings.data):
        return Tars(tars, settings.image_column, settings.caption_column)
    if not data.exists():
        return Table.of_hub(settings)
    if is_saved(data):
        return Table.of_saved(data, settings)
    if tables := tables_in(data):
        return Table.of_files(tables, settings)
    if data.is_dir():
        folder = data / settings.split if metadata_in(data / settings.split) else data
        return ImageFolder(folder, settings.image_column, settings.caption_column)
    raise UserError(
        f"--data {data} is not a supported input. Give a folder of images (with a metadata.jsonl, or with a .txt "
        "next to each image), a .tar, a .parquet or .arrow file, a folder of these files, a saved dataset's folder, "
        "or a dataset's name."
    )

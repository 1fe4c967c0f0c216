"""`distill-sd drop-reader`: forgets a reader of a rolling cache, so that nothing waits for it."""

from __future__ import annotations

from pipeline.settings.drop_reader import DropReaderSettings
from pipeline.system.echo import say
from pipeline.system.errors import UserError
from shards.manifest import read_manifest
from shards.readers import NAME, READERS, drop_reader, file_of, reader_names
from shards.store import open_store


def run(settings: DropReaderSettings) -> None:
    """Drop a training that died for good from the readers of a rolling cache. `teacher-cache --window` waits for it no
    more and deletes what all others have passed."""
    store = open_store(settings.cache)
    if read_manifest(store, "cache").window is None:
        raise UserError(f"--cache {settings.cache} keeps all rounds and knows no readers. Nothing waits for one.")
    names = reader_names(store)
    if not NAME.fullmatch(settings.name) or settings.name not in names:
        known = f"Its readers are {', '.join(names)}." if names else "It has none."
        raise UserError(f"--name {settings.name}: {settings.cache} has no such reader. {known}")
    drop_reader(store, settings.name)
    say(
        f"dropped {settings.name}: removed {settings.cache}/{READERS}/{file_of(settings.name)}. If that training still "
        "runs, it ends at its next checkpoint."
    )

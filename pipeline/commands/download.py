"""A list of addresses and captions to WebDataset tars, through img2dataset.

img2dataset runs as a program of its own: it needs an older `webdataset` than this project, so it lives in an
environment of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from pipeline.system.command import stage_command
from pipeline.system.errors import UserError
from pipeline.system.settings import REQUIRED, Settings, option
from shards.files import file_sha256, write_json

DISTRIBUTORS = ("multiprocessing", "pyspark", "ray")
# Beside the tars, in a folder, because img2dataset takes every .json among the tars for one of its own.
LIST_FOLDER = "list"


@dataclass(frozen=True, kw_only=True)
class DownloadSettings(Settings):
    urls: Path = option(REQUIRED, "A parquet file of addresses and captions.")
    out: Path = option(REQUIRED, "Directory for the tars; what is there is kept.")
    url_column: str = option("url", "Column with the address.")
    caption_column: str = option("caption", "Column with the caption.")
    image_size: int = option(512, "Shrink pictures whose shorter side is longer, to this many pixels.", ge=1)
    entries_per_tar: int = option(10_000, "Addresses in one tar.", ge=2)
    max_samples: int | None = option(None, "Take this many of the addresses, drawn at random.", ge=1)
    seed: int = option(0, "Seed of the order in which the addresses are taken.", ge=0)
    processes: int = option(os.cpu_count() or 1, "Processes that download and shrink.", ge=1)
    threads: int = option(64, "Downloads at a time in each process.", ge=1)
    timeout: int = option(10, "Seconds to wait for a server.", ge=1)
    retries: int = option(1, "Times that an address is tried again.", ge=0)
    distributor: str = option("multiprocessing", "What img2dataset spreads the work with.", choices=DISTRIBUTORS)
    img2dataset: str = option("img2dataset", "The program, where it is not on the PATH.")


@dataclass(frozen=True)
class Tally:
    """What became of the addresses of the finished tars; `causes` counts the failures by what was wrong."""

    tars: int
    asked: int
    got: int
    causes: Counter[str]


def run(settings: DownloadSettings) -> None:
    """Download the pictures of a list into WebDataset tars, for `encode --data`."""
    program = find_program(settings.img2dataset)
    count = prepare(settings)
    tars = -(-count // settings.entries_per_tar)
    before = tally(settings.out)
    if before.tars < tars:
        finished = subprocess.run(
            [program, *arguments(settings)], env={**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}, check=False
        )
        if finished.returncode:
            raise UserError(
                f"{program} ended with status {finished.returncode}, see above; "
                "the finished tars stay, and the same command goes on"
            )
    click.echo(summary(settings.out, tally(settings.out), tars))


def find_program(name: str) -> str:
    program = shutil.which(name)
    if program is None:
        raise UserError(
            f"--img2dataset {name} is not there. Install it in an environment of its own, because it needs an older "
            "webdataset: pipx install 'img2dataset>=1.47', or python3 -m venv tools && "
            "tools/bin/pip install 'img2dataset>=1.47' and --img2dataset tools/bin/img2dataset"
        )
    return program


def prepare(settings: DownloadSettings) -> int:
    """Write the list, shuffled, beside the tars, unless it is there; returns its length.

    Raises UserError if the tars that are there come from another list, from other settings or from elsewhere.
    """
    if not settings.urls.is_file():
        raise UserError(f"--urls {settings.urls} is no file; give a parquet file of addresses and captions")
    chosen = ("url_column", "caption_column", "image_size", "entries_per_tar", "max_samples", "seed")
    spec = {"urls_sha256": file_sha256(settings.urls), **{name: getattr(settings, name) for name in chosen}}
    folder = settings.out / LIST_FOLDER
    record = folder / "spec.json"
    if record.is_file():
        found = json.loads(record.read_text())
        differing = [name for name in spec if found.get(name) != spec[name]]
        if differing:
            told = ", ".join(f"{name} {found.get(name)!r}, now {spec[name]!r}" for name in differing)
            raise UserError(f"{settings.out} was begun with other settings ({told}): choose another --out")
        return found["count"]
    if any(settings.out.glob("*.tar")):
        raise UserError(f"{settings.out} holds tars of which this command knows nothing: choose another --out")
    table = shuffled(settings)
    folder.mkdir(parents=True, exist_ok=True)
    _parquet().write_table(table, folder / "urls.parquet")
    write_json(record, {**spec, "count": len(table)})
    return len(table)


def shuffled(settings: DownloadSettings) -> Any:
    """The addresses and captions in the seed's order: neighbours in a list tend to be alike, or on one server."""
    wanted = {"url": settings.url_column, "caption": settings.caption_column}
    try:
        file = _parquet().ParquetFile(settings.urls)
    # The library's errors have no kind of their own.
    except Exception as error:
        raise UserError(f"--urls {settings.urls} is no parquet file: {error}") from None
    for flag, column in (("--url-column", settings.url_column), ("--caption-column", settings.caption_column)):
        if column not in file.schema_arrow.names:
            raise UserError(
                f"--urls {settings.urls} has no column {column!r}; it has "
                f"{', '.join(map(repr, file.schema_arrow.names))}: choose one with {flag}"
            )
    table = file.read(columns=list(wanted.values())).select(list(wanted.values())).rename_columns(list(wanted))
    order = np.random.default_rng(settings.seed).permutation(len(table))[: settings.max_samples]
    if not len(order):
        raise UserError(f"--urls {settings.urls} lists no addresses")
    return table.take(order)


def arguments(settings: DownloadSettings) -> list[str]:
    """What img2dataset is told. It skips what has a `_stats.json`, and writes a tar without one again."""
    told = {
        "url_list": settings.out / LIST_FOLDER / "urls.parquet",
        "input_format": "parquet",
        "output_folder": settings.out,
        "output_format": "webdataset",
        "incremental_mode": "incremental",
        "url_col": "url",
        "caption_col": "caption",
        "number_sample_per_shard": settings.entries_per_tar,
        "image_size": settings.image_size,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "skip_reencode": True,
        "processes_count": settings.processes,
        "thread_count": settings.threads,
        "timeout": settings.timeout,
        "retries": settings.retries,
        "distributor": settings.distributor,
        "enable_wandb": False,
    }
    return [f"--{name}={value}" for name, value in told.items()]


def tally(out: Path) -> Tally:
    """Sum of the finished tars' `_stats.json`."""
    asked, got, causes = 0, 0, Counter()
    files = sorted(out.glob("*_stats.json"))
    for file in files:
        stats = json.loads(file.read_text())
        asked, got = asked + stats["count"], got + stats["successes"]
        causes.update({cause: count for cause, count in stats["status_dict"].items() if cause != "success"})
    return Tally(len(files), asked, got, causes)


def summary(out: Path, found: Tally, tars: int) -> str:
    """In words; raises UserError if tars are lacking, or if nothing came."""
    lines = [f"{out} holds {found.got} pictures of {found.asked} addresses, in {found.tars} tars"]
    lines += [f"  {count} x {cause}" for cause, count in found.causes.most_common()]
    text = "\n".join(lines)
    if found.tars < tars:
        raise UserError(f"{text}\n{tars - found.tars} of {tars} tars are not finished: run the same command again")
    if not found.got:
        raise UserError(f"{text}\nnothing came: see the causes above, and choose another --out to try again")
    return text


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("to read a parquet list, install the library: pip install 'distill-sd[datasets]'") from None
    return pyarrow.parquet


command = stage_command("download", DownloadSettings, None, run)

if __name__ == "__main__":
    command()

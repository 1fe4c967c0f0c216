"""Download a list of image URLs and captions into WebDataset tars, with img2dataset.

img2dataset runs as a separate program: it needs an older `webdataset` than this project, so it is installed in its own
environment.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from pipeline.data import web_guard
from pipeline.settings.download import DownloadSettings
from pipeline.system.echo import plural, printable, say
from pipeline.system.errors import UserError
from pipeline.system.extras import install_command
from pipeline.system.json_files import read_json
from pipeline.system.lock import OutputLock
from pipeline.system.output import check_output, made_by
from shards.files import file_sha256, write_json

# A subfolder, because img2dataset takes every .json next to the tars for one of its own.
LIST_FOLDER, SPEC = "list", "spec.json"
# Causes of failure that are printed; the rest are counted together.
CAUSES = 12


@dataclass(frozen=True)
class Tally:
    """The results of the finished tars. `causes` counts the failed URLs by their error."""

    tars: int
    urls: int
    images: int
    causes: Counter[str]


def run(settings: DownloadSettings) -> None:
    """Download the images of a list into WebDataset tars, for `encode --data`."""
    program = find_program(settings.img2dataset)
    own = made_by(settings.out, "download", f"{LIST_FOLDER}/{SPEC}")
    if not own and any(settings.out.glob("*.tar")):
        raise UserError(f"{settings.out} contains tars that this command did not create. Choose another --out.")
    # Before its specification, the command writes the list.
    check_output(settings.out, "download", {}, own=own, first=[LIST_FOLDER])
    with OutputLock(settings.out) as lock:
        download(settings, program, lock)


def download(settings: DownloadSettings, program: str, lock: OutputLock) -> None:
    """Claim --out and have the program download what it lacks."""
    count = prepare(settings, lock)
    tars = -(-count // settings.entries_per_tar)
    if tally(settings.out).tars < tars:
        status = run_guarded([program, *arguments(settings)])
        if status:
            raise UserError(
                f"{program} ended with status {status}. See its output above. "
                "The finished tars are kept. Rerun the same command to resume."
            )
    say(summary(settings.out, tally(settings.out), tars))


def find_program(name: str) -> str:
    program = shutil.which(name)
    if program is None:
        raise UserError(
            f"--img2dataset {name} was not found. Install it in a separate environment, because it needs an older "
            "webdataset: pipx install 'img2dataset>=1.47', or python3 -m venv tools && "
            "tools/bin/pip install 'img2dataset>=1.47' and --img2dataset tools/bin/img2dataset"
        )
    return program


def run_guarded(command: list[str]) -> int:
    """Run img2dataset under the rules of `web_guard`. Returns its exit status."""
    with tempfile.TemporaryDirectory(prefix="distill-sd-") as folder:
        shutil.copy(web_guard.__file__, Path(folder, "sitecustomize.py"))
        marker = Path(folder, "in-force")
        paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        guard = {"PYTHONPATH": os.pathsep.join(paths), web_guard.MARKER: str(marker)}
        status = subprocess.run(
            command, env={**os.environ, **guard, "NO_ALBUMENTATIONS_UPDATE": "1"}, check=False
        ).returncode
        if not marker.exists():
            say(
                f"warning: {command[0]} did not load the rules against redirects into private networks and huge bodies",
                err=True,
            )
        return status


def prepare(settings: DownloadSettings, lock: OutputLock) -> int:
    """Write the shuffled list next to the tars, unless that was done before, and return its length.

    Raises UserError if the tars in the directory come from another list, other settings or another program.
    """
    if not settings.urls.is_file():
        raise UserError(f"--urls {settings.urls} is not a file. Give a parquet file of image URLs and captions.")
    chosen = ("url_column", "caption_column", "image_size", "entries_per_tar", "max_samples", "seed")
    spec = {"urls_sha256": file_sha256(settings.urls), **{name: getattr(settings, name) for name in chosen}}
    folder = settings.out / LIST_FOLDER
    spec_file = folder / SPEC
    if spec_file.is_file():
        recorded = read_json(spec_file, "Restore it from a backup, or choose another --out.")
        changes = [
            f"{name} {recorded.get(name)!r}, now {now!r}" for name, now in spec.items() if recorded.get(name) != now
        ]
        if changes:
            raise UserError(
                f"{settings.out} was created with other settings ({'; '.join(changes)}). Choose another --out."
            )
        lock.take()
        return recorded["count"]
    table, refused = shuffled(settings)
    for reason, number in refused.most_common():
        say(f"note: {number} URLs are left out: {reason}")
    lock.take()
    folder.mkdir(parents=True, exist_ok=True)
    _parquet().write_table(table, folder / "urls.parquet")
    write_json(spec_file, {**spec, "count": len(table), "left_out": dict(refused)})
    return len(table)


def shuffled(settings: DownloadSettings) -> tuple[Any, Counter[str]]:
    """The URLs and captions, shuffled by the seed, and the reasons why some are left out.

    Neighbours in a list are often similar or on the same server.
    """
    columns = {"url": settings.url_column, "caption": settings.caption_column}
    try:
        file = _parquet().ParquetFile(settings.urls)
    # pyarrow's errors have no common base class.
    except Exception as error:
        raise UserError(f"--urls {settings.urls} is not a parquet file: {error}") from None
    for flag, column in (("--url-column", settings.url_column), ("--caption-column", settings.caption_column)):
        if column not in file.schema_arrow.names:
            raise UserError(
                f"--urls {settings.urls} has no column {column!r}. It has "
                f"{', '.join(map(repr, file.schema_arrow.names))}: choose one with {flag}."
            )
    table = file.read(columns=list(columns.values())).select(list(columns.values())).rename_columns(list(columns))
    order = np.random.default_rng(settings.seed).permutation(len(table))
    problems = [problem_of(url) for url in table.column("url").to_pylist()]
    refused = Counter(filter(None, problems))
    chosen = [row for row in order if problems[row] is None][: settings.max_samples]
    if not chosen:
        reasons = "".join(f"\n  {number} are left out: {reason}" for reason, number in refused.most_common())
        raise UserError(f"--urls {settings.urls} lists no URLs that can be downloaded{reasons}")
    return table.take(np.array(chosen)), refused


def problem_of(url: Any) -> str | None:
    """Why a URL is not downloaded; None if it is."""
    if not isinstance(url, str):
        return "not text"
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        return "not a URL"
    if parts.scheme.lower() not in ("http", "https"):
        return "neither http nor https"
    if not host:
        return "no server"
    # Clouds give out credentials at link-local addresses.
    return "a link-local address" if is_link_local(host) else None


def is_link_local(host: str) -> bool:
    """Whether a host is a link-local address in any of the ways to write one. False for a name."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        try:
            # 2852039166 and 0xa9fea9fe are addresses as well.
            address = ipaddress.ip_address(socket.inet_aton(host))
        except (OSError, ValueError):
            return False
    return (getattr(address, "ipv4_mapped", None) or address).is_link_local


def arguments(settings: DownloadSettings) -> list[str]:
    """The command line of img2dataset. It skips tars that have a `_stats.json` and rewrites tars that have none."""
    options = {
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
    return [f"--{name}={value}" for name, value in options.items()]


def tally(out: Path) -> Tally:
    """The sums over the finished tars' `_stats.json`."""
    urls, images = 0, 0
    causes: Counter[str] = Counter()
    files = sorted(out.glob("*_stats.json"))
    for file in files:
        stats = read_json(file, "Delete it and rerun the same command, which downloads its tar again.")
        urls, images = urls + stats["count"], images + stats["successes"]
        for error, count in stats["status_dict"].items():
            if error != "success":
                causes[cause_of(error)] += count
    return Tally(len(files), urls, images, causes)


def cause_of(error: str) -> str:
    """The kind of a failure: its text without the names, numbers and addresses of this one case."""
    status = re.match(r"HTTP Error (\d{3})\b", error)
    if status:
        known = {code.value: code.phrase for code in HTTPStatus}
        return f"HTTP Error {status[1]}: {known.get(int(status[1]), 'unknown')}"
    text = re.sub(r"'[^']*'|\"[^\"]*\"|\w+://\S+", "...", error)
    text = re.sub(r"(?<!Errno )(?<!Errno -)\b(0x[0-9a-fA-F]+|\d+)\b", "N", text)
    return printable(" ".join(text.split()))[:100]


def summary(out: Path, counts: Tally, tars: int) -> str:
    """The results as text. Raises UserError if tars are missing or if all downloads failed."""
    found = f"{plural(counts.images, 'image')} from {plural(counts.urls, 'URL')}, in {plural(counts.tars, 'tar')}"
    lines = [f"{out} holds {found}"]
    causes = counts.causes.most_common()
    lines += [f"  {count} x {cause}" for cause, count in causes[:CAUSES]]
    if causes[CAUSES:]:
        lines.append(f"  {sum(count for _, count in causes[CAUSES:])} x other causes")
    text = "\n".join(lines)
    if counts.tars < tars:
        raise UserError(f"{text}\n{tars - counts.tars} of {tars} tars are not finished. Rerun the same command.")
    if not counts.images:
        raise UserError(f"{text}\nAll downloads failed. See the causes above, and choose another --out to try again.")
    return text


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"to read a parquet list, install pyarrow: {install_command('datasets')}") from None
    return pyarrow.parquet

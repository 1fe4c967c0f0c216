"""Bytes on the disk: free ones, and those of files."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from pathlib import Path

from pipeline.system.errors import UserError
from shards.location import Location


def free_bytes(out: Path) -> int:
    """Bytes free on the disk that holds `out`, which need not exist yet."""
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def free_line(out: Location) -> list[str]:
    """The line of a plan on the disk of `out`; none for an address."""
    return [f"free on that disk: {format_bytes(free_bytes(out))}"] if isinstance(out, Path) else []


def size_of(files: Iterable[Path]) -> int:
    """The bytes of those of the paths that are files."""
    return sum(file.stat().st_size for file in files if file.is_file())


def require_space(out: Path, needed: int, remedy: str) -> None:
    """Raise UserError, before anything is computed, if `needed` more bytes do not fit."""
    free = free_bytes(out)
    if needed > free:
        raise UserError(
            f"{out} needs about {format_bytes(needed)} more, but its disk has only {format_bytes(free)} free. "
            f"Free some space, choose an --out on another disk, or {remedy}."
        )


def format_bytes(size: float) -> str:
    """Bytes in decimal units: 1234567 -> '1.23 MB'."""
    power = min(4, max(0, int(math.log10(max(size, 1)) // 3)))
    return f"{size / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"

"""Editing the sidecars of format 2, so that they can be made to lie."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np

# The columns of the table before those of the members, and those of each member.
OWN, OF_MEMBER = 2, 4


def load(path: Path) -> tuple[dict, np.ndarray]:
    """(head, table), of which the table can be written to."""
    line, _, table = path.read_bytes().partition(b"\n")
    head = json.loads(line)
    return head, np.frombuffer(table, "<i8").reshape(head["count"], OWN + OF_MEMBER * len(head["members"])).copy()


def save(path: Path, head: dict, table: np.ndarray) -> None:
    """Write a sidecar with the right checksum of its table."""
    images = [int(table[0, 0]), int(table[-1, 0])] if len(table) else None
    data = table.astype("<i8").tobytes()
    line = json.dumps({**head, "count": len(table), "images": images, "table_crc32": zlib.crc32(data)}).encode()
    path.write_bytes(line + b"\n" + data)


def of_another_writing(path: Path) -> None:
    """Rewrite a sidecar as if the shard had been written again with other bytes."""
    head, table = load(path)
    save(path, {**head, "sha256": "0" * 64}, table)


def columns(head: dict, member: str) -> slice:
    """The columns of a member: offset, length, raw_bytes, crc32."""
    first = OWN + OF_MEMBER * head["members"].index(member)
    return slice(first, first + OF_MEMBER)

"""origin.json in a cache: the teacher by name with its licence, and the data by name, as far as they are known.

The student's model card is made from it, on a machine that may have neither. Local folders go by their last name
alone, so that nobody's paths are published.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from shards.files import write_json

ORIGIN, CARD = "origin.json", "README.md"
LICENCE_FIELDS = ("license", "license_name", "license_link")


def write_origin(cache: Path, teacher: str, folder: Path, revision: str | None, latents: Path) -> None:
    """Write origin.json of a cache that has none; `folder` is where the pipeline called `teacher` lies."""
    if not (cache / ORIGIN).is_file():
        write_json(cache / ORIGIN, {"teacher": teacher_origin(teacher, folder, revision), "data": data_origin(latents)})


def read_origin(cache: Path) -> dict[str, Any]:
    """What write_origin wrote; empty for a cache of an earlier version."""
    path = cache / ORIGIN
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def teacher_origin(teacher: str, folder: Path, revision: str | None) -> dict[str, Any]:
    """The teacher's `name`, whether a hub has it under that name (`hub`), its `revision`, and its card's licence."""
    hub = teacher != "demo" and not Path(teacher).is_dir()
    name = teacher if hub or teacher == "demo" else folder.resolve().name
    known = {"name": name, "hub": hub, **({"revision": revision} if revision else {})}
    return known | licence(card_text(teacher, folder, revision, hub))


def card_text(teacher: str, folder: Path, revision: str | None, hub: bool) -> str:
    """The teacher's card: its folder's README.md, else the hub's, else nothing."""
    path = folder / CARD
    try:
        if hub and not path.is_file():
            path = Path(hf_hub_download(teacher, CARD, revision=revision))
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError, HfHubHTTPError):
        return ""


def licence(card: str) -> dict[str, str]:
    """The licence fields of a card's YAML head; empty if it has no head, or one that cannot be read."""
    matched = re.match(r"---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    try:
        head = yaml.safe_load(matched[1]) if matched else None
    except yaml.YAMLError:
        head = None
    known = head if isinstance(head, dict) else {}
    return {name: known[name] for name in LICENCE_FIELDS if isinstance(known.get(name), str)}


def data_origin(latents: Path) -> dict[str, Any]:
    """The data's `name`, as `encode` was given it, and whether that is a name on the hub."""
    path = latents / "encode.json"
    if not path.is_file():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))["data"]
    hub = not Path(data).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", data) is not None
    return {"name": data if hub else Path(data).name, "hub": hub}

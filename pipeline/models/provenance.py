"""origin.json in a cache: the names of the teacher and the data, and the teacher's licence, as far as they are known.

The student's model card is made from it, possibly on a machine that has neither. Only the last part of a local path is
kept, so that no one's paths are published.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from pipeline.system.errors import UserError
from pipeline.system.json_files import read_json_at
from pipeline.system.names import is_on_hub, public_name
from pipeline.system.output import DEMOS
from pipeline.system.text_files import read_text
from pipeline.system.yaml_file import parse_yaml
from shards.location import Location
from shards.schema import IMAGES
from shards.store import open_store, write_json

ORIGIN, CARD = "origin.json", "README.md"
LICENCE_FIELDS = ("license", "license_name", "license_link")


def write_origin(cache: Location, teacher: str, folder: Path, revision: str | None, latents: Location) -> None:
    """Write a cache's origin.json if it has none; `folder` holds the pipeline called `teacher`."""
    store = open_store(cache)
    if not store.exists(ORIGIN):
        origin = {"teacher": teacher_origin(teacher, folder, revision), "data": data_origin(latents)}
        write_json(store, ORIGIN, origin)


def read_origin(cache: Location) -> dict[str, Any]:
    """The contents of origin.json; empty for a cache that an earlier version wrote.

    Raises UserError for a file that is damaged.
    """
    path = cache / ORIGIN
    remedy = "Copy it from an intact cache, or delete it and rerun the same `distill-sd teacher-cache`."
    origin = read_json_at(cache, ORIGIN, remedy)
    if origin is None:
        return {}
    parts = [origin.get(name, {}) for name in ("teacher", "data")]
    if not all(isinstance(part, dict) and all(map(_is_plain, part.values())) for part in parts):
        raise UserError(f"{path} is corrupt: its teacher and data are not names and licences. {remedy}")
    return origin


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | bool)


def teacher_origin(teacher: str, folder: Path, revision: str | None) -> dict[str, Any]:
    """The teacher's `name`, whether that is a name on a hub (`hub`), its `revision`, and the licence on its card."""
    hub = teacher not in DEMOS and is_on_hub(teacher)
    name = public_name(teacher)
    origin = {"name": name, "hub": hub, **({"revision": revision} if revision else {})}
    return origin | licence(card_text(teacher, folder, revision, hub))


def card_text(teacher: str, folder: Path, revision: str | None, hub: bool) -> str:
    """The teacher's card: README.md in its folder, else the one on the hub, else an empty string."""
    path = folder / CARD
    try:
        if hub and not path.is_file():
            path = Path(hf_hub_download(teacher, CARD, revision=revision))
        return read_text(path)
    except (OSError, ValueError, HfHubHTTPError):
        return ""


def licence(card: str) -> dict[str, str]:
    """The licence fields of a card's YAML header; empty if the header is missing or unreadable."""
    matched = re.match(r"---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    try:
        header = parse_yaml(matched[1]) if matched else None
    except ValueError:
        header = None
    fields = header if isinstance(header, dict) else {}
    return {name: fields[name] for name in LICENCE_FIELDS if isinstance(fields.get(name), str)}


def licence_of(folder: Path) -> str | None:
    """The licence that the card in a model's folder states, as the hub calls it, or its own name for another one."""
    try:
        stated = licence(read_text(folder / CARD))
    except (OSError, ValueError):
        return None
    return stated.get("license_name") or stated.get("license")


def data_origin(latents: Location) -> dict[str, Any]:
    """The data's `name`, as passed to `encode`, and whether that is a name on the hub. The images of a cache have that
    of the cache."""
    remedy = "Delete it, and rerun the same `distill-sd encode` on these latents."
    settings = read_json_at(latents, "encode.json", remedy)
    if settings is None:
        name = latents.resolve().name if isinstance(latents, Path) else latents.name
        return read_origin(latents.parent).get("data", {}) if name == IMAGES and latents.parent else {}
    data = settings.get("data")
    if not isinstance(data, str):
        return {}
    # A name without an owner may just as well be that of a folder which is gone.
    return {"name": public_name(data), "hub": "/" in data and is_on_hub(data)}

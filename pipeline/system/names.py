"""What others may read of the names of models and data: never where they lie on this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

from shards.location import is_url, without_secrets

NAME_ON_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_on_hub(name: str) -> bool:
    """Whether a model or data set of this name would come from a hub: there is nothing of the name here, and it can be
    one there."""
    return NAME_ON_HUB.fullmatch(name) is not None and not os.path.exists(name)


def public_name(name: str) -> str:
    """A name on a hub as it is; of a path or an address the last part."""
    if is_url(name):
        return without_secrets(name).rpartition("/")[2]
    return name if is_on_hub(name) else Path(os.path.abspath(name)).name

"""Where copies of what lies at addresses are kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def copies() -> Path:
    """~/.cache/distill-sd, or where XDG_CACHE_HOME says. What is in it can be deleted, and is then copied again."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "distill-sd"

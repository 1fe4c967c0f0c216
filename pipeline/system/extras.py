"""The optional packages of this project, as the installed metadata states them."""

from __future__ import annotations

import re
from importlib.metadata import requires


def install_command(extra: str) -> str:
    """The command that installs the packages of one of this project's extras, such as `lora`.

    It names the packages themselves, so it works however this project was installed.
    """
    found = [
        re.fullmatch(r"([^;]+?)\s*;\s*extra\s*==\s*[\"'](\w+)[\"']", line) for line in requires("distill-sd") or ()
    ]
    return " ".join(["pip install", *(f"'{match[1]}'" for match in found if match and match[2] == extra)])

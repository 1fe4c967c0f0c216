"""Editing the configs and the tokenizer of a pipeline's folder."""

import json
from pathlib import Path


def change_json(path: Path, **changes) -> None:
    """Set keys of a JSON file; None removes one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def swap_tokens(folder: Path, one: str = "a</w>", other: str = "b</w>") -> None:
    """Give two tokens of a tokenizer each other's number, in every file that states them."""
    for path in (folder / "vocab.json", folder / "tokenizer.json"):
        if path.is_file():
            content = json.loads(path.read_text())
            vocabulary = content.get("model", {}).get("vocab", content)
            vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
            path.write_text(json.dumps(content))

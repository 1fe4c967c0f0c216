"""CLIP's tokenizer with the first of its merges alone, because it takes a second to read them all."""

import gzip
from pathlib import Path
from typing import Any

from pipeline.models import tokenizer
from pipeline.models.families.sd_configs import TEXT_CONFIG

MERGES, FEW = tokenizer.MERGES, 200


def write_few(folder: Path) -> Path:
    """A file to stand for `tokenizer.MERGES`."""
    file = folder / MERGES.name
    file.write_bytes(gzip.compress(b"".join(gzip.decompress(MERGES.read_bytes()).splitlines(keepends=True)[:FEW])))
    return file


def text_config(merges: int = FEW) -> dict[str, Any]:
    """What a text encoder for a tokenizer with so many merges differs in from others."""
    tokens = 2 * 256 + merges + len(tokenizer.SPECIAL)
    return {**TEXT_CONFIG, "vocab_size": tokens, "bos_token_id": tokens - 2, "eos_token_id": tokens - 1}

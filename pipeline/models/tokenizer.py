"""The tokenizer of OpenAI's CLIP, which SD-1.x and SD-2.x use, from the merges that this package brings.

merges.txt.gz holds the 48,894 merges of https://github.com/openai/CLIP that its tokenizer uses, and clip/LICENSE its
licence. The vocabulary follows from them.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

MERGES = Path(__file__).parent / "clip" / "merges.txt.gz"
END_OF_WORD = "</w>"
SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def write_tokenizer(folder: Path) -> None:
    """Write vocab.json and merges.txt, as transformers' CLIPTokenizer reads them."""
    merges = gzip.decompress(MERGES.read_bytes()).decode().splitlines()
    (folder / "vocab.json").write_text(json.dumps(vocabulary(merges), ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def vocabulary(merges: list[str]) -> dict[str, int]:
    """Numbers of the tokens: the bytes, the bytes that end a word, the merges in their order, and the special ones."""
    characters = byte_characters()
    joined = [merge.replace(" ", "") for merge in merges]
    tokens = [*characters, *(character + END_OF_WORD for character in characters), *joined, *SPECIAL]
    return {token: number for number, token in enumerate(tokens)}


def byte_characters() -> list[str]:
    """The characters that stand for the 256 bytes: themselves where they can be printed, others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, printable), *(chr(256 + number) for number in range(256 - len(printable)))]

"""Every kind of damage of tests/damage.py, and where it is noticed: a markdown table.

python tests/benchmarks/damage.py
"""

from __future__ import annotations

import contextlib
import io
import platform
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.damage import DAMAGES, Outcome, Place, look, read_all, verify
from support.stages import run_encode, run_teacher_cache, shard_files
from support.tiny import tiny_pipeline, write_images


def make_caches(work: Path) -> Place:
    """A cache of ten entries in six shards, and another one of another seed."""
    tiny_pipeline().save_pretrained(work / "teacher")
    latents = run_encode(work / "teacher", write_images(work / "images", 5), work / "latents")
    caches = [
        run_teacher_cache(work / "teacher", latents, work / name, entries_per_shard=2, seed=seed)
        for name, seed in (("cache", 0), ("other", 1))
    ]
    return Place(*caches)


def row(kind: str, outcome: Outcome, kept: int) -> str:
    seen = [outcome.opening, outcome.reading, outcome.fast, outcome.full]
    words = ("refused", "refused", "found", "found")
    cells = [word if message else "" for word, message in zip(words, seen, strict=True)]
    return f"| {kind} | {' | '.join(cells)} | {len(outcome.wrong)} | {kept} of 6 |"


def main() -> None:
    print("| damage | opening | reading | verify | verify --full | wrong tensors read | shards kept |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            whole = make_caches(work)
        before = read_all(whole.cache)[0]
        for kind, (damage, _) in DAMAGES.items():
            place = Place(shutil.copytree(whole.cache, work / "damaged"), whole.other)
            damage(place)
            outcome = look(place.cache, before)
            verify(place.cache, "--full", "--remove-damaged")
            kept = [name for name in shard_files(place.cache) if name.startswith("r0") and name.endswith(".index")]
            print(row(kind, outcome, len(kept)))
            shutil.rmtree(place.cache)
    print(f"\nPython {platform.python_version()}, torch {version('torch')}, numpy {version('numpy')}.", file=sys.stderr)


if __name__ == "__main__":
    main()

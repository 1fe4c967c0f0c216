"""All benchmarks of the GPU, each to a page with the card, the versions and the commands.

    python tests/benchmarks/on_a_gpu.py --work work/gpu --pages tests/benchmarks/gpu

is meant to take at most 25 minutes on one H100 or H200, less with `--only`. What fails is named at the end, and does
not stop the others.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

import click

HERE = Path(__file__).parent
SD15 = "--arch sd15"
BF16 = f"{SD15} --mixed-precision bf16 --repeats 1"
# By page: its title, and commands with {work} for a directory. They go in this order: the loader reads the cache that
# stage two leaves.
PAGES = {
    "stage_one": (
        "Stage one against its networks' own speed",
        [
            f"stage_one.py --work {{work}}/one {SD15} --images 512 --workers 4 --workers 12 --repeats 2",
            f"stage_one.py --work {{work}}/one {SD15} --images 512 --workers 12 --repeats 1 --compile",
        ],
    ),
    "stage_two": (
        "Stage two against online training",
        [
            f"stage_two.py --work {{work}}/two {BF16} --levels sd_small --batch-size 8 --steps 30 --compile",
            f"stage_two.py --work {{work}}/two {BF16} --levels sd_small --batch-size 8 --steps 30 "
            "--gradient-checkpointing",
            f"stage_two.py --work {{work}}/two {BF16} --batch-size 1 --batch-size 8 --batch-size 32 --steps 30",
        ],
    ),
    "loader": (
        "The loader alone",
        [
            f"loader.py --cache {{work}}/two/cache --level {level} --batch-size 8 --workers 1 --workers 2 --workers 4 "
            "--workers 8"
            for level in ("sd_small", "sd_tiny")
        ],
    ),
    "students": (
        "Students beside their teacher",
        [
            "students.py --batch-size 1 --batch-size 4 --compile no",
            "students.py --batch-size 1 --batch-size 4 --compile yes --repeats 1",
        ],
    ),
    "whole_road": (
        "The whole road against online training",
        [f"whole_road.py --work {{work}}/road {SD15} --mixed-precision bf16 --batch-size 8 --steps 30 --repeats 2"],
    ),
}


def card() -> str:
    """The card's name, memory and driver, as nvidia-smi has them."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()


@click.command()
@click.option("--work", type=Path, required=True, help="Directory for shards and students.")
@click.option("--pages", type=Path, default=HERE / "gpu", show_default=True, help="Directory for the pages.")
@click.option("--only", multiple=True, type=click.Choice(list(PAGES)), default=tuple(PAGES), help="By default all.")
def main(work: Path, pages: Path, only: tuple[str, ...]) -> None:
    failed = []
    pages.mkdir(parents=True, exist_ok=True)
    for name, (title, commands) in PAGES.items():
        if name not in only:
            continue
        with open(pages / f"{name}.md", "w") as page:
            page.write(f"# {title}: on a GPU\n\n{card()}.\n")
            for command in commands:
                page.write(f"\n    python tests/benchmarks/{command.format(work='work')}\n\n")
                page.flush()
                started = time.monotonic()
                arguments = shlex.split(command.format(work=work))
                result = subprocess.run([sys.executable, HERE / arguments[0], *arguments[1:]], stdout=page)
                print(f"{time.monotonic() - started:5.0f} s, exit code {result.returncode}: {command}", flush=True)
                if result.returncode:
                    failed.append(command)
    if failed:
        sys.exit("failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()

"""What a student costs beside its teacher: the U-Net's parameters, multiplications, seconds and memory.

distill-sd claims up to 100 % more speed and 30 % less memory for its students. Here SD-1.x and its students run at
512 px with random weights; `--arch demo` takes the bundled teacher's shape, to try the benchmark itself. Each run is a
process of its own, so its memory is its own: the most that weights and activations took together on a GPU, and on a CPU
the process's peak beyond what it held before the U-Net (with torch.compile that counts the compiler too). The rows take
turns; ratios are to the teacher of the same turn. Prints one markdown table. On a quiet machine:

    python tests/benchmarks/students.py --batch-size 1 --batch-size 4
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from dataclasses import dataclass

import click
import torch
from diffusers import UNet2DConditionModel
from machine import in_process, machine
from sd15_road import SD15_UNET

from pipeline.demo.networks import TEXT_WIDTH
from pipeline.evaluation.cost import count_macs, unet_inputs
from pipeline.models.bundled import teacher_folder
from pipeline.models.families import denoise
from pipeline.models.families.sd import SD
from pipeline.models.load import unet_config
from pipeline.models.students import student_config
from pipeline.system.device import DTYPES, resolve_dtype, use_cpu
from pipeline.system.memory import peak_memory

ROWS = ("teacher", "sd_small", "bk_small", "sd_tiny")
REFERENCE = "teacher"
CONDITIONING = {"sd15": {"prompt_embeds": (77, 768)}, "demo": {"prompt_embeds": (24, TEXT_WIDTH)}}
WARM_UP, TIMED = 2, 3


@dataclass(frozen=True)
class Case:
    """What the rows of one group share."""

    arch: str
    device: str
    dtype: str
    batch_size: int
    compiled: bool


@dataclass(frozen=True)
class Run:
    """Seconds of a forward pass of the whole batch, and peak memory in bytes."""

    seconds: float
    memory: int


def unet_on_meta(arch: str, row: str) -> UNet2DConditionModel:
    """The U-Net of a row without weights."""
    with torch.device("meta"):
        teacher = UNet2DConditionModel(**(SD15_UNET if arch == "sd15" else unet_config(teacher_folder())))
        if row == REFERENCE:
            return teacher.eval()
        return UNet2DConditionModel.from_config(student_config(dict(teacher.config), row)).eval()


@functools.cache
def size_of(arch: str, row: str) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of the forward pass for one image."""
    unet = unet_on_meta(arch, row)
    return unet.num_parameters(), count_macs(denoise, unet, *unet_inputs(unet, 1, CONDITIONING[arch]), SD)


@torch.inference_mode()
def run(row: str, case: Case) -> Run:
    """The median of a few forward passes, after some that are not timed."""
    device, dtype = torch.device(case.device), DTYPES[case.dtype]
    torch.manual_seed(0)
    before = peak_memory(device)
    unet = unet_on_meta(case.arch, row).to(dtype).to_empty(device=device).to(memory_format=torch.channels_last)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    forward = torch.compile(unet) if case.compiled else unet
    inputs = unet_inputs(unet, case.batch_size, CONDITIONING[case.arch])
    times = []
    for _ in range(WARM_UP + TIMED):
        started = time.perf_counter()
        denoise(forward, *inputs, SD)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return Run(statistics.median(times[WARM_UP:]), peak_memory(device) - before)


def turns(case: Case, repeats: int) -> dict[str, list[Run]]:
    """Every row once a turn, forwards and backwards by turns."""
    runs: dict[str, list[Run]] = {row: [] for row in ROWS}
    for turn in range(repeats):
        for row in ROWS if turn % 2 == 0 else reversed(ROWS):
            runs[row].append(in_process(run, row, case))
    return runs


def lines(runs: dict[str, list[Run]], case: Case) -> list[str]:
    rows = []
    for row, each in runs.items():
        parameters, macs = size_of(case.arch, row)
        faster = [teacher.seconds / run.seconds for teacher, run in zip(runs[REFERENCE], each, strict=True)]
        smaller = [run.memory / teacher.memory for teacher, run in zip(runs[REFERENCE], each, strict=True)]
        rows.append(
            f"| {row} | {parameters / 1e6:,.1f} | {macs / 1e9:,.1f} | {case.batch_size} "
            f"| {'yes' if case.compiled else 'no'} | {statistics.median(run.seconds for run in each):.3g} "
            f"| {statistics.median(faster):.2f} | {statistics.median(run.memory for run in each) / 1e9:.2f} "
            f"| {statistics.median(smaller):.2f} |"
        )
    return rows


@click.command()
@click.option("--arch", type=click.Choice(list(CONDITIONING)), default="sd15", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu"]), default="auto", show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["auto", *DTYPES]),
    default="auto",
    show_default=True,
    help="auto is fp16 on a GPU, else fp32.",
)
@click.option("--batch-size", "batch_sizes", multiple=True, default=(1, 4), show_default=True)
@click.option(
    "--compile",
    type=click.Choice(["no", "yes", "both"]),
    default="both",
    show_default=True,
    help="Whether to time the plain networks, those of torch.compile, or both.",
)
@click.option("--repeats", default=3, show_default=True, help="Turns of all rows.")
def main(arch: str, device: str, dtype: str, batch_sizes: tuple[int, ...], compile: str, repeats: int) -> None:
    place = torch.device("cpu" if use_cpu(device) else "cuda")
    dtype = resolve_dtype(dtype, place)
    print(f"{machine(device)}; {arch}, random weights, {dtype}, {repeats} turns\n")
    print(
        "| U-Net | parameters, M | GMAC a picture | batch | compiled | seconds a forward | times as fast "
        "| peak memory, GB | of the teacher's |\n|---|---|---|---|---|---|---|---|---|"
    )
    for compiled, batch_size in itertools.product(
        {"no": (False,), "yes": (True,), "both": (False, True)}[compile], batch_sizes
    ):
        case = Case(arch, place.type, dtype, batch_size, compiled)
        print("\n".join(lines(turns(case, repeats), case)), flush=True)


if __name__ == "__main__":
    main()

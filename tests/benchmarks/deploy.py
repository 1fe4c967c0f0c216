"""What one pass of a U-Net takes in torch, onnxruntime and OpenVINO, on a CPU.

SD-1.x and its students run at 512 px with random weights, in fp32; `--arch demo` takes the bundled teacher's shape, to
try the benchmark itself. OpenVINO runs the same graph in fp32 and, where nncf is installed, with int8 weights. All rows
take turns within one process, and ratios are to the teacher in torch in the same turn. onnxruntime and OpenVINO use all
cores; torch as many as OMP_NUM_THREADS says, so leave that unset. Prints one markdown table. On a quiet machine:

    python tests/benchmarks/deploy.py --turns 5
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import click
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from machine import machine
from students import CONDITIONING, REFERENCE, unet_on_meta

from pipeline.export.onnx import Graph, downscaling, unet_graph, write_graph
from pipeline.models.families.sd import SD
from pipeline.models.graphs import GRAPH
from pipeline.sampling.engines import onnx_runner, openvino_runner

EXPORTED = ("sd_small", "sd_tiny")
Pass = Callable[[], object]


def unet_of(arch: str, row: str) -> UNet2DConditionModel:
    """The U-Net of a row with random weights, float32."""
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config(dict(unet_on_meta(arch, row).config)).eval()


def graph_of(unet: UNet2DConditionModel, arch: str, batch_size: int) -> Graph:
    """The U-Net with inputs of its own size."""
    side = unet.config.sample_size // downscaling(unet)
    return unet_graph(unet, SD, CONDITIONING[arch], batch_size, (side, side))


def passes_of(row: str, arch: str, batch_size: int, folder: Path) -> dict[tuple[str, str], Pass]:
    """Forward passes by (row, engine)."""
    graph = graph_of(unet_of(arch, row), arch, batch_size)
    found: dict[tuple[str, str], Pass] = {(row, "torch"): lambda: graph.call(*graph.inputs.values())}
    if row == REFERENCE:
        return found
    write_graph(graph, folder / row)
    inputs = {name: tensor.numpy() for name, tensor in graph.inputs.items()}
    found[row, "onnxruntime"] = running(onnx_runner(folder / row / GRAPH)[0], inputs)
    if find_spec("openvino"):
        found[row, "OpenVINO"] = running(openvino_runner(folder / row / GRAPH)[0], inputs)
    if find_spec("openvino") and find_spec("nncf"):
        found[row, "OpenVINO, int8 weights"] = running(openvino_runner(int8_weights(folder / row))[0], inputs)
    return found


def int8_weights(folder: Path) -> Path:
    """The graph in a folder with int8 weights, in OpenVINO's own format."""
    import nncf
    import openvino

    compressed = nncf.compress_weights(openvino.Core().read_model(folder / GRAPH))
    openvino.save_model(compressed, folder / "int8.xml", compress_to_fp16=False)
    return folder / "int8.xml"


def running(run: Callable, inputs: dict[str, np.ndarray]) -> Pass:
    return lambda: run(inputs)


def seconds_of(one_pass: Pass) -> float:
    started = time.perf_counter()
    with torch.inference_mode():
        one_pass()
    return time.perf_counter() - started


@click.command()
@click.option("--arch", type=click.Choice(("sd15", "demo")), default="sd15", show_default=True)
@click.option("--batch-size", default=2, show_default=True, help="2 is an image with guidance.")
@click.option("--turns", default=5, show_default=True)
def main(arch: str, batch_size: int, turns: int) -> None:
    """Print one markdown table."""
    with tempfile.TemporaryDirectory() as place:
        passes: dict[tuple[str, str], Pass] = {}
        for row in (REFERENCE, *EXPORTED):
            passes |= passes_of(row, arch, batch_size, Path(place))
        # The first pass of each is slower.
        taken: dict[tuple[str, str], list[float]] = {key: [] for key in passes if seconds_of(passes[key])}
        for _ in range(turns):
            for key, one_pass in passes.items():
                taken[key].append(seconds_of(one_pass))
    installed = [name for name in ("onnxruntime", "openvino", "nncf") if find_spec(name)]
    print(f"{machine('cpu')}, {', '.join(f'{name} {version(name)}' for name in installed)}; batch of {batch_size}\n")
    print("| U-Net | engine | seconds a pass, median (least to most) | speed beside the teacher in torch |")
    print("|---|---|---|---|")
    reference = taken[REFERENCE, "torch"]
    for (row, engine), seconds in taken.items():
        speed = statistics.median(first / other for first, other in zip(reference, seconds, strict=True))
        median, least, most = statistics.median(seconds), min(seconds), max(seconds)
        print(f"| {row} | {engine} | {median:.3g} ({least:.3g} to {most:.3g}) | {speed:.2f} |")


if __name__ == "__main__":
    main()

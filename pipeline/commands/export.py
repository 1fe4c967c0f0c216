"""`distill-sd export`: converts a pipeline, the teacher's or a student's, to the formats of other programs.

    single-file   one .safetensors in the original Stable Diffusion layout: U-Net, VAE and text encoder
    onnx          a pipeline's folder with its networks as ONNX graphs (see `pipeline.models.graphs`)
    int8          a pipeline's folder whose U-Net has int8 weights (see `pipeline.export.int8`)

diffusers loads a single file with `StableDiffusionPipeline.from_single_file(path, config=<the exported folder>)`, which
takes the number of blocks from the folder's configs. It loads an int8 pipeline with
`DiffusionPipeline.from_pretrained(folder, torch_dtype=...)`.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.export import int8, modelspec, onnx
from pipeline.models.fake_quant import bake, has_quantisers, weight_bits
from pipeline.models.families import Family, Frame
from pipeline.models.graphs import GRAPH
from pipeline.models.load import (
    MODEL_INDEX,
    family_of,
    find_pipeline,
    load_base,
    load_deployed_unet,
    load_unet,
    refuse_quantised,
)
from pipeline.models.provenance import licence_of
from pipeline.models.reading import read_json
from pipeline.models.save import copy_parts, copy_small_parts, save_config
from pipeline.models.weights import network_bytes
from pipeline.sampling.generate import image_size
from pipeline.settings.export import ExportSettings
from pipeline.system.device import DTYPES, device_name, process_state
from pipeline.system.disk import format_bytes, require_space
from pipeline.system.echo import say, say_wait
from pipeline.system.errors import UserError
from pipeline.system.extras import install_command
from pipeline.system.names import public_name
from pipeline.system.output import check_new
from shards.files import atomic_directory, atomic_file

PACKAGES = {"onnx": ("onnx",), "int8": ("torchao",)}
CAPTIONS = ["a red bicycle against a wall", "portrait of an old sailor"]


def run(settings: ExportSettings) -> None:
    """Export a pipeline in a format for other programs."""
    check_new(settings.out, "export", {"--model": settings.model}, file=settings.format == "single-file")
    require_packages(settings.format)
    folder = find_pipeline(settings.model, settings.revision, settings.variant, "--model", any_channels=True)
    {"single-file": export_single_file, "onnx": export_onnx, "int8": export_int8}[settings.format](settings, folder)


def require_packages(format: str) -> None:
    missing = [name for name in PACKAGES.get(format, ()) if find_spec(name) is None]
    if missing:
        raise UserError(f"--format {format} needs {' and '.join(missing)}. Run: {install_command(format)}")


def export_single_file(settings: ExportSettings, folder: Path) -> None:
    pipe, family = load_complete_pipeline(settings, folder), family_of(folder)
    size = network_bytes(pipe.unet, *encoders_of(pipe, family))
    require_space(settings.out, size, "use --dtype fp16")
    weights = single_file_weights(settings, pipe, family)
    schedule = pipe.scheduler.config
    title, licence = public_name(settings.model), licence_of(folder)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(settings.out) as stream:
        # safetensors wants a path: this is the temporary file next to --out.
        say_wait(f"writing {settings.out}", size)
        save_file(
            {**weights, **modelspec.schedule_marks(schedule)},
            stream.name,
            modelspec.header(family.architecture(pipe), title, image_size(pipe), schedule, licence),
        )
        modelspec.sort_header(Path(stream.name))
    pipeline = read_json(folder / MODEL_INDEX)["_class_name"]
    how = f'Load it with {pipeline}.from_single_file("{settings.out}", config="{folder}")'
    if not hasattr(getattr(diffusers, pipeline, None), "from_single_file"):
        how = f"It is for other programs: diffusers loads no {pipeline} from a single file."
    if settings.layout == "sdcpp":
        how = "It is for stable-diffusion.cpp."
    encoders = "text encoder" if len(family.encoders) == 2 else "text encoders"
    say(f"Wrote U-Net, VAE and {encoders} to {settings.out}, {format_bytes(settings.out.stat().st_size)}. {how}")
    if advice := modelspec.schedule_advice(schedule):
        say(advice)
    tell_of_floats(settings, folder)


def single_file_weights(settings: ExportSettings, pipe: DiffusionPipeline, family: Family) -> dict[str, Tensor]:
    """The tensors of a single file in the layout that was asked for."""
    try:
        weights = family.single_file(pipe)
    except ValueError as error:
        raise UserError(f"--model {settings.model}: {error}. Export it as onnx or int8.") from None
    if settings.layout == "dense":
        return weights
    try:
        return family.sdcpp(weights)
    except ValueError as error:
        raise UserError(f"--model {settings.model} --layout {settings.layout}: {error}.") from None


def export_onnx(settings: ExportSettings, folder: Path) -> None:
    unet = load_deployed_unet(folder / "unet", settings.variant, torch.float32)
    refuse_quantised(unet, folder)
    bits, family = weight_bits(unet), family_of(folder)
    if bits and settings.dtype != "fp32":
        raise UserError(
            f"--dtype {settings.dtype}: {settings.model} was trained for integers, and its other layers stay in fp32. "
            "Leave --dtype out."
        )
    bake(unet)
    pipe = load_base(folder, settings.variant, unet)
    for part in ("unet", *family.encoders):
        if not (part == "vae" and family.follows_force_upcast and pipe.vae.config.force_upcast):
            getattr(pipe, part).to(DTYPES[settings.dtype])
    require_space(settings.out, 2 * network_bytes(pipe.unet, *encoders_of(pipe, family)), "use --dtype fp16")
    conditioning = family.conditioning_shapes(folder)
    with atomic_directory(settings.out) as out:
        checked = {}
        # The sizes of the examples differ, so that a graph which only takes those of its trace is noticed.
        traced = onnx.graphs_of(pipe, family, conditioning, 2, (1, 2), seed=0, bits=bits)
        others = onnx.graphs_of(pipe, family, conditioning, 1, (3, 2), seed=1, bits=bits)
        for graph, other in zip(traced, others, strict=True):
            say_wait(f"writing {settings.out / graph.name}", network_bytes(graph.network))
            onnx.write_graph(graph, out / graph.name)
            save_config(graph.network, out / graph.name)
            checked[graph.name] = onnx.largest_difference(other, out / graph.name)
        copy_small_parts(folder, settings.variant, out)
    say(f"Wrote {', '.join(checked)} as {GRAPH}, each with its weights, to {settings.out}. {differences(checked)}")


def differences(checked: dict[str, tuple[float, float] | None]) -> str:
    """What was found when graphs were compared with torch, by their names: a sentence."""
    found = {name: value for name, value in checked.items() if value}
    if not found:
        return "Not compared with torch: onnxruntime is not installed."
    each = [f"{name} {difference:.2g} (of {largest:.2g})" for name, (difference, largest) in found.items()]
    return f"Largest differences from torch's outputs (and the largest outputs): {', '.join(each)}."


def export_int8(settings: ExportSettings, folder: Path) -> None:
    device, dtype, family = process_state("auto").device, DTYPES[settings.dtype], family_of(folder)
    unet = load_unet(folder, settings.variant).to(dtype).eval()
    quantised = int8.load_int8(folder, settings.variant, dtype).eval()
    pipe = load_base(folder, settings.variant, quantised)
    inputs = guided_step(pipe, family, unet.config.in_channels, int8.latents_size(unet))
    encoders = [part.to(dtype) for part in encoders_of(pipe, family)]
    require_space(settings.out, network_bytes(unet, *encoders), "use --dtype fp16")
    with atomic_directory(settings.out) as out:
        copy_parts(folder, settings.variant, out, dtype)
        quantised.save_pretrained(out / "unet")
        size = int8.weights_bytes(out / "unet")
    plain, other = int8.compare(unet.to(device), quantised.to(device), inputs, family)
    costs = {
        settings.dtype: int8.Int8Cost(network_bytes(unet), *plain),
        f"{settings.dtype}, int8 linear layers": int8.Int8Cost(size, *other),
    }
    say(f"{int8.cost_table(costs)}\n\nMeasured on one guided step on {device_name(device)}.")
    say(
        f"Wrote a pipeline to {settings.out}. Where torchao is installed, load it with "
        f'DiffusionPipeline.from_pretrained("{settings.out}", torch_dtype={dtype})'
    )
    tell_of_floats(settings, folder)


def tell_of_floats(settings: ExportSettings, folder: Path) -> None:
    """Say what becomes of a U-Net that was trained for integers, in a format without ranges of inputs."""
    if has_quantisers(folder / "unet"):
        say(
            f"note: --format {settings.format} has no place for the ranges of {settings.model}, which was trained for "
            "integers, and holds its weights in floats. --format onnx has them."
            if settings.format == "single-file"
            else f"note: --format {settings.format} rounds the weights of linear layers alone, and leaves out the "
            f"ranges of {settings.model}, which was trained for integers. --format onnx has them."
        )


def guided_step(
    pipe: DiffusionPipeline, family: Family, channels: int, size: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Latents (2, C, S, S) of pure noise, a high and a low timestep (2,), and conditioning (2, ...) by name."""
    latents = torch.randn(len(CAPTIONS), channels, size, size, generator=torch.Generator().manual_seed(0))
    side = size * pipe.vae_scale_factor
    of_image = family.image_conditioning(Frame((side, side), (0, 0), (side, side)))
    with torch.inference_mode():
        conditioning = family.encode_prompts(pipe, CAPTIONS)
    conditioning |= {name: torch.stack([tensor] * len(CAPTIONS)) for name, tensor in of_image.items()}
    return latents, torch.tensor([999, 400]), conditioning


def encoders_of(pipe: DiffusionPipeline, family: Family) -> list[nn.Module]:
    """The VAE and the text encoders."""
    return [getattr(pipe, part) for part in family.encoders]


def load_complete_pipeline(settings: ExportSettings, folder: Path) -> DiffusionPipeline:
    pipe = load_base(folder, settings.variant, load_unet(folder, settings.variant))
    return pipe.to(DTYPES[settings.dtype])

"""`distill-sd export`: a pipeline, a teacher's or a student's, in the forms that other programs take.

    single-file   one .safetensors in the original Stable Diffusion layout: U-Net, VAE and text encoder
    onnx          a folder with the U-Net as an ONNX graph (see `onnx_unet`)
    int8          a pipeline's folder whose U-Net has int8 weights (see `int8_unet`)

The first is read back by `StableDiffusionPipeline.from_single_file(path, config=<the exported folder>)`, whose configs
say how many blocks there are; the last by `DiffusionPipeline.from_pretrained(folder, torch_dtype=...)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import click
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel

from pipeline.export import int8, onnx
from pipeline.export.single_file import single_file_weights
from pipeline.models.families.sd import encode_prompts
from pipeline.models.load import find_pipeline, load_base, load_unet
from pipeline.system.command import stage_command
from pipeline.system.device import DTYPES, device_name, process_state
from pipeline.system.disk import format_bytes, require_space
from pipeline.system.errors import UserError
from pipeline.system.options import HubOptions
from pipeline.system.settings import REQUIRED, option
from shards.files import atomic_directory, atomic_file

SUFFIX = ".safetensors"
PACKAGES = {"onnx": ("onnx", "onnxscript"), "int8": ("torchao",)}
# Of OpenCLIP's 24 layers SD-2.x uses 23, and diffusers never reads another.
OPEN_CLIP_LAYERS = 23
CAPTIONS = ["a red bicycle against a wall", "portrait of an old sailor"]


@dataclass(frozen=True, kw_only=True)
class ExportSettings(HubOptions):
    model: str = option(REQUIRED, "Pipeline to export: a folder, a hub's name, or demo.")
    format: str = option(REQUIRED, "What to write.", choices=("single-file", "onnx", "int8"))
    out: Path = option(REQUIRED, f"File ({SUFFIX}, of single-file) or folder to make.")
    dtype: str = option("fp32", "Precision of the weights, of int8 those of the rest.", choices=tuple(DTYPES))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format == "onnx" and self.dtype != "fp32":
            raise UserError(f"--dtype {self.dtype} does not go with --format onnx, which is fp32: leave it out")
        if self.format == "single-file" and self.out.suffix != SUFFIX:
            raise UserError(f"--out {self.out} does not end in {SUFFIX}, by which a single file is known: add it")


def run(settings: ExportSettings) -> None:
    """Write a pipeline in a form that other programs take."""
    if settings.out.exists():
        raise UserError(f"--out {settings.out} is there already: choose another name, or delete it")
    require_packages(settings.format)
    folder = find_pipeline(settings.model, settings.revision, settings.variant, "--model")
    {"single-file": export_single_file, "onnx": export_onnx, "int8": export_int8}[settings.format](settings, folder)


def require_packages(format: str) -> None:
    lacking = [name for name in PACKAGES.get(format, ()) if find_spec(name) is None]
    if lacking:
        raise UserError(f"--format {format} needs {' and '.join(lacking)}: pip install 'distill-sd[{format}]'")


def export_single_file(settings: ExportSettings, folder: Path) -> None:
    pipe = whole_pipeline(settings, folder)
    open_clip = takes_open_clip(settings, pipe)
    require_space(settings.out, bytes_of(*networks(pipe)), "give --dtype fp16")
    try:
        weights = single_file_weights(*(part.state_dict() for part in networks(pipe)), open_clip=open_clip)
    except ValueError as error:
        raise UserError(f"--model {settings.model}: {error}; export it as onnx or int8") from None
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(settings.out) as stream:
        # safetensors takes a name: this is the hidden one beside --out.
        save_file(weights, stream.name, metadata={"format": "pt"})
    click.echo(
        f"{settings.out} holds U-Net, VAE and text encoder, {format_bytes(settings.out.stat().st_size)}; load it with "
        f'StableDiffusionPipeline.from_single_file("{settings.out}", config="{folder}")'
    )


def takes_open_clip(settings: ExportSettings, pipe: DiffusionPipeline) -> bool:
    """Whether the text encoder is SD-2.x's. Raises UserError for one that is neither that nor SD-1.x's."""
    text_encoder = pipe.text_encoder
    if not isinstance(text_encoder, CLIPTextModel):
        raise UserError(
            f"--model {settings.model} has a {type(text_encoder).__name__} as its text encoder, for which the "
            "single-file layout has no place: export it as onnx or int8"
        )
    # What tells OpenCLIP's models from OpenAI's, which have quick_gelu.
    open_clip = text_encoder.config.hidden_act == "gelu"
    if open_clip and text_encoder.config.num_hidden_layers > OPEN_CLIP_LAYERS:
        raise UserError(
            f"--model {settings.model} has a text encoder of {text_encoder.config.num_hidden_layers} layers, of which "
            f"{OPEN_CLIP_LAYERS} would be read back from a single file: export it as onnx or int8"
        )
    return open_clip


def export_onnx(settings: ExportSettings, folder: Path) -> None:
    unet = load_unet(folder, settings.variant)
    require_space(settings.out, bytes_of(unet), "export a smaller level")
    tokens = load_base(folder, settings.variant).tokenizer.model_max_length
    with atomic_directory(settings.out) as out:
        onnx.write_onnx(unet, tokens, out)
        differs = onnx.largest_difference(unet, tokens, out)
    checked = "not checked, for want of onnxruntime"
    if differs:
        checked = f"largest difference from torch {differs[0]:.2g}, where the largest output is {differs[1]:.2g}"
    click.echo(f"{settings.out} holds the U-Net as {onnx.GRAPH} with its weights beside it; {checked}")


def export_int8(settings: ExportSettings, folder: Path) -> None:
    device, dtype = process_state("auto").device, DTYPES[settings.dtype]
    unet = load_unet(folder, settings.variant).to(dtype).eval()
    quantised = int8.load_int8(folder, settings.variant, dtype).eval()
    pipe = load_base(folder, settings.variant, quantised)
    inputs = guided_step(pipe, unet.config.in_channels, onnx.latents_size(unet))
    for part in (pipe.vae, pipe.text_encoder):
        part.to(dtype)
    require_space(
        settings.out, sum(bytes_of(part) for part in (unet, pipe.vae, pipe.text_encoder)), "give --dtype fp16"
    )
    with atomic_directory(settings.out) as out:
        pipe.save_pretrained(out)
        size = int8.weights_bytes(out / "unet")
    latents, timesteps, prompt_embeds = inputs
    placed = (latents.to(device, dtype), timesteps.to(device), prompt_embeds.to(device, dtype))
    plain, other = int8.compare(unet.to(device), quantised.to(device), placed)
    costs = {
        settings.dtype: int8.Cost(bytes_of(unet), *plain),
        f"{settings.dtype}, int8 linear layers": int8.Cost(size, *other),
    }
    click.echo(f"{int8.cost_table(costs)}\n\nOne guided step, on {device_name(device)}.")
    click.echo(
        f"{settings.out} is a pipeline; where torchao is installed, load it with "
        f'DiffusionPipeline.from_pretrained("{settings.out}", torch_dtype={dtype})'
    )


def guided_step(pipe: DiffusionPipeline, channels: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents (2, C, S, S) of noise, timesteps (2,) late and early, and prompt embeddings (2, L, D)."""
    latents = torch.randn(len(CAPTIONS), channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        prompt_embeds = encode_prompts(pipe, CAPTIONS)
    return latents, torch.tensor([999, 400]), prompt_embeds


def whole_pipeline(settings: ExportSettings, folder: Path) -> DiffusionPipeline:
    pipe = load_base(folder, settings.variant, load_unet(folder, settings.variant))
    return pipe.to(DTYPES[settings.dtype])


def networks(pipe: DiffusionPipeline) -> tuple[nn.Module, nn.Module, nn.Module]:
    return pipe.unet, pipe.vae, pipe.text_encoder


def bytes_of(*modules: nn.Module) -> int:
    tensors = [tensor for module in modules for tensor in module.state_dict().values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


command = stage_command("export", ExportSettings, None, run)

if __name__ == "__main__":
    command()

"""The teacher's networks: where they are, loading them, hashing them, asking them; and saving a student."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub.errors
import numpy
import torch
import transformers
from accelerate import PartialState
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTokenizer

from pipeline import demo
from pipeline.core.taps import Taps
from pipeline.models.checksums import write_checksums
from pipeline.models.families.sd import check_teacher
from pipeline.system.errors import UserError
from pipeline.system.memory import keep_freed_memory
from shards.files import atomic_directory, write_json

# Their bars and hints about this package's own calls would drown the stages' one line of progress.
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# One process may be done long before another; the default of ten minutes would end the run.
PATIENCE = timedelta(days=2)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DEVICES = ("auto", "cpu")
MODEL_INDEX = "model_index.json"
NEEDED = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")


def use_cpu(device: str) -> bool:
    """Whether `--device` comes down to the CPU. Said to accelerate, or it would overlook a CPU's other processes."""
    return device == "cpu" or not torch.accelerator.is_available()


def process_state(device: str) -> PartialState:
    """This process among those of `accelerate launch` or torchrun (one without them), and its device."""
    if use_cpu(device):
        keep_freed_memory()
    return PartialState(cpu=use_cpu(device), timeout=PATIENCE)


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """`auto` is fp16 on a GPU and fp32 elsewhere."""
    return ("fp16" if device.type == "cuda" else "fp32") if dtype == "auto" else dtype


def device_name(device: torch.device) -> str:
    """What to call it in a report: a GPU by its maker's name, a CPU just so."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def computes_beside(device: torch.device) -> bool:
    """Whether a device leaves the CPU's cores to other threads while it computes."""
    return device.type != "cpu"


def find_pipeline(name: str, revision: str | None, variant: str | None, flag: str = "--teacher") -> Path:
    """The local folder of a Stable Diffusion pipeline: `demo`, a folder itself, or a hub's name, downloaded.

    Raises UserError if there is none or if it lacks a part that the stages need.
    """
    folder = demo.teacher_folder() if name == "demo" else Path(name)
    if not folder.is_dir():
        folder = _download(name, revision, variant, flag)
    if not (folder / MODEL_INDEX).is_file():
        raise UserError(f"{flag} {name} has no {MODEL_INDEX}: give a checkpoint in diffusers layout")
    index = _read_index(folder / MODEL_INDEX)
    lacking = [part for part in NEEDED if not index.get(part) or index[part][0] is None]
    if lacking:
        raise UserError(f"{flag} {name} has no {', '.join(lacking)}: give a whole Stable Diffusion pipeline")
    if "text_encoder_2" in index:
        raise UserError(f"{flag} {name} is a {index['_class_name']}; SD-1.x and SD-2.x are supported so far")
    return folder


def _read_index(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): copy or download the pipeline again") from None


def _download(name: str, revision: str | None, variant: str | None, flag: str) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{flag} {name} is no folder")
    try:
        return Path(DiffusionPipeline.download(name, revision=revision, variant=variant))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{flag} {name} is no folder, and no model hub gave it: {reason}") from None


def load_base(folder: Path, variant: str | None = None, unet: UNet2DConditionModel | None = None) -> DiffusionPipeline:
    """A pipeline with `unet` in the place of its own, or with none; the rest is loaded, float32, on the CPU."""
    base = _load(lambda: DiffusionPipeline.from_pretrained(folder, unet=unet, variant=variant), folder)
    for part in base.components.values():
        # transformers would leave its networks in the precision of their files.
        if isinstance(part, nn.Module) and part is not unet:
            part.to(torch.float32)
    return base


def load_unet(folder: Path, variant: str | None) -> UNet2DConditionModel:
    """A pipeline's U-Net, float32, on the CPU. Raises UserError for one with quantised weights."""
    unet = open_unet(folder / "unet", variant, torch.float32)
    refuse_quantised(unet, folder)
    return unet


def open_unet(folder: Path, variant: str | None, dtype: torch.dtype) -> UNet2DConditionModel:
    """The U-Net in a folder of its own, on the CPU. Quantised weights take the precision of the rest only here."""
    return _load(lambda: UNet2DConditionModel.from_pretrained(folder, variant=variant, torch_dtype=dtype), folder)


def refuse_quantised(unet: UNet2DConditionModel, folder: Path) -> None:
    """Raise UserError for a U-Net with quantised weights, which only draws and is only evaluated."""
    if unet.config.get("quantization_config"):
        raise UserError(f"{folder} has quantised weights: give the pipeline that it was exported from")


def unet_config(folder: Path) -> dict[str, Any]:
    """The teacher's U-Net config alone, with diffusers' defaults filled in."""
    config = _load(lambda: UNet2DConditionModel.load_config(folder, subfolder="unet"), folder)
    with torch.device("meta"):
        return dict(UNet2DConditionModel.from_config(config).config)


def _load(load, folder: Path):
    try:
        return load()
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{folder} cannot be loaded: {reason}; is the download complete?") from error


def load_noise_scheduler(folder: Path, prediction_type: str | None) -> DDPMScheduler:
    """The noise schedule the teacher was trained with; `prediction_type` overrides what its config says."""
    noise_scheduler = _load(lambda: DDPMScheduler.from_pretrained(folder, subfolder="scheduler"), folder)
    if prediction_type:
        noise_scheduler.register_to_config(prediction_type=prediction_type)
    return noise_scheduler


def encode_prompts(base: DiffusionPipeline, captions: list[str]) -> Tensor:
    """(B, L, D) float32: the text encoder's last hidden state, as StableDiffusionPipeline uses it."""
    tokenizer, text_encoder = base.tokenizer, base.text_encoder
    tokens = tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    device = text_encoder.device
    uses_mask = getattr(text_encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask.to(device) if uses_mask else None
    return text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0].float()


def count_cut_prompts(base: DiffusionPipeline, captions: list[str]) -> int:
    """How many captions have more tokens than the text encoder takes, begin and end included."""
    tokenizer, cut = base.tokenizer, 0
    for first in range(0, len(captions), 1000):
        tokens = tokenizer(captions[first : first + 1000], truncation=False, verbose=False).input_ids
        cut += sum(len(each) > tokenizer.model_max_length for each in tokens)
    return cut


def encode_images(vae: nn.Module, pixels: Tensor, standard_normal: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> latents (B, 4, H/f, W/f) float32, sampled and scaled.

    `standard_normal`, of the latents' shape, picks the point of the posterior: mean + std * it.
    """
    images = pixels.to(vae.device).permute(0, 3, 1, 2).to(vae.dtype) / 127.5 - 1.0
    posterior = vae.encode(images).latent_dist
    sampled = posterior.mean.float() + posterior.std.float() * standard_normal.to(vae.device)
    return sampled * vae.config.scaling_factor


def latents_shape(vae: nn.Module, resolution: int) -> tuple[int, int, int]:
    """(C, H, W) of a square image's latents. Raises UserError if the resolution does not divide."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if resolution % factor:
        raise UserError(f"--resolution {resolution} is not a multiple of {factor}, the VAE's downscaling")
    return vae.config.latent_channels, resolution // factor, resolution // factor


def tap_shapes(
    config: dict[str, Any], latents: tuple[int, ...], prompt_embeds: tuple[int, ...], taps: list[str]
) -> dict[str, tuple[int, int, int]]:
    """The (C, H, W) of each tap, from a forward pass without data."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        with Taps(unet, taps).recording() as features:
            unet(torch.empty(1, *latents), torch.zeros(1), encoder_hidden_states=torch.empty(1, *prompt_embeds))
    return {tap: tuple(features[tap].shape[1:]) for tap in taps}


@dataclass(frozen=True)
class TeacherShapes:
    """Latents (C, H, W), prompt embeddings (L, D), and the output (C, H, W) of each tap."""

    latents: tuple[int, int, int]
    prompt_embeds: tuple[int, int]
    taps: dict[str, tuple[int, int, int]]


def teacher_shapes(folder: Path, resolution: int, taps: list[str]) -> TeacherShapes:
    """The shapes of a teacher's data at a resolution, from its configs: its weights need not be there."""
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(_load(lambda: AutoencoderKL.load_config(folder, subfolder="vae"), folder))
    text = _load(lambda: CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder"), folder)
    tokenizer = _load(lambda: CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"), folder)
    config = unet_config(folder)
    try:
        check_teacher(config)
    except ValueError as error:
        raise UserError(f"--teacher {folder}: {error}") from None
    latents, prompt_embeds = latents_shape(vae, resolution), (tokenizer.model_max_length, text.hidden_size)
    return TeacherShapes(latents, prompt_embeds, tap_shapes(config, latents, prompt_embeds, taps))


def weights_sha256(module: nn.Module) -> str:
    """A hash of a network's tensors with their names: equal for equal weights, whatever the files."""
    digest = hashlib.sha256()
    tensors = itertools.chain.from_iterable(plain_tensors(*item) for item in sorted(module.state_dict().items()))
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def plain_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor by its name; of a quantised one those that it is kept in, such as integers and scales."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(f"{name}.{part}", getattr(tensor, part))


def library_versions() -> dict[str, str]:
    modules = {"torch": torch, "diffusers": diffusers, "transformers": transformers, "numpy": numpy}
    return {name: module.__version__ for name, module in modules.items()}


def save_base(base: DiffusionPipeline, noise_scheduler: DDPMScheduler, out: Path) -> None:
    """Write all of the teacher's pipeline but the U-Net, ready to take a student's.

    The sampling scheduler stays the teacher's, with the prediction type that was settled.
    """
    base.scheduler.register_to_config(prediction_type=noise_scheduler.config.prediction_type)
    with atomic_directory(out, exist_ok=True) as folder:
        base.save_pretrained(folder)
        index = json.loads((folder / MODEL_INDEX).read_text(encoding="utf-8"))
        write_json(folder / MODEL_INDEX, {**index, "unet": ["diffusers", "UNet2DConditionModel"]})
        write_checksums(folder)


def save_pipeline(base: Path, unet: UNet2DConditionModel, out: Path) -> None:
    """A whole pipeline in `out`: the files of `base` and the U-Net. model_index.json goes first and comes last."""
    (out / MODEL_INDEX).unlink(missing_ok=True)
    index = json.loads((base / MODEL_INDEX).read_text(encoding="utf-8"))
    for part in sorted(base / name for name in index if name != "unet" and (base / name).is_dir()):
        _replace_directory(out / part.name, lambda folder, part=part: shutil.copytree(part, folder, dirs_exist_ok=True))
    _replace_directory(out / "unet", unet.save_pretrained)
    write_json(out / MODEL_INDEX, index, indent=2)


def _replace_directory(path: Path, fill) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with atomic_directory(path) as folder:
        fill(folder)

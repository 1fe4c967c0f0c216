"""Finding a pipeline and loading its networks, in float32 on the CPU unless noted otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, UNet2DConditionModel
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from torch import nn

from pipeline.models.bundled import BUNDLED, teacher_folder
from pipeline.models.fake_quant import has_quantisers, load_quantisers
from pipeline.models.families import FAMILIES, Family, family_of_index
from pipeline.models.graphs import holds_graphs
from pipeline.models.reading import read_json, read_part, reading
from pipeline.models.schedule import no_betas
from pipeline.models.single_file import SINGLE_FILES, converted
from pipeline.models.weights import has_weights, load_network
from pipeline.system.errors import UserError, did_you_mean, first_line
from pipeline.system.output import writer_of
from shards.regular import is_special

# Their bars and hints about this package's own calls would hide the stages' one line of progress.
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

MODEL_INDEX = "model_index.json"
# The commands whose output becomes a model when it is finished; and what diffusers and peft write next to LoRA weights.
TRAININGS = ("distill", "finetune")
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_config.json")
LIBRARIES = {"diffusers": diffusers, "transformers": transformers}


def find_pipeline(
    name: str, revision: str | None, variant: str | None, flag: str = "--teacher", any_channels: bool = False
) -> Path:
    """The local folder of a pipeline: a bundled one by its name, such as `demo`, a folder, a single file, which is
    converted, or a name on the hub.

    Raises UserError if there is none, or if its configs show that it is of no known family or does not fit together.
    Its weights are not read. With `any_channels`, the U-Net may take more than the VAE's latents.
    """
    folder = teacher_folder(BUNDLED[name]) if name in BUNDLED else Path(name)
    if folder.is_file():
        folder = converted(folder, f"{flag} {name}")
    if not folder.is_dir():
        folder = _download(name, revision, variant, flag)
    if not (folder / MODEL_INDEX).is_file():
        raise UserError(f"{flag} {name} {_instead(folder, flag)}")
    refuse_special_files(folder, f"{flag} {name}")
    if holds_graphs(folder) and not has_weights(folder / "unet"):
        raise UserError(f"{flag} {name} holds ONNX graphs alone. Generate with `distill-sd sample --engine onnx`.")
    for holds, problem in check_index(folder):
        if not holds:
            raise UserError(f"{flag} {name}: {problem}")
    for holds, problem in family_of(folder).problems(folder, any_channels):
        if not holds:
            raise UserError(f"{flag} {name}: {problem}")
    return folder


def refuse_special_files(folder: Path, named: str) -> None:
    """Raise UserError if a FIFO, a socket or a device lies among a pipeline's files: the libraries would wait for it.

    `named` is how messages call the pipeline.
    """
    for pattern in ("*", "*/*"):
        for path in sorted(folder.glob(pattern)):
            if is_special(path):
                raise UserError(
                    f"{named}: {path.relative_to(folder)} is not a regular file. Copy it again or remove it."
                )


def _instead(folder: Path, flag: str) -> str:
    """What a folder without a model_index.json is, and what to do: the rest of a sentence, and another one."""
    command = writer_of(folder)
    if any((folder / name).is_file() for name in LORA_FILES):
        return "holds LoRA weights, not a model. Give the model that they were trained on."
    if command in TRAININGS:
        return f"is the output of a `{command}` that is not finished. Rerun that command to finish it."
    if command:
        return f"is the output of `{command}`, not a model. Use a checkpoint in diffusers layout."
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".ckpt"))
    # A part of a pipeline has a config, and its weights are no whole pipeline.
    if files and not (folder / "config.json").exists():
        return f"has no {MODEL_INDEX}. To use the single file in it, give {flag} {files[0]}."
    return f"has no {MODEL_INDEX}. Use a checkpoint in diffusers layout."


def family_of(folder: Path) -> Family:
    """The family of a pipeline. Raises UserError if it has none."""
    index = read_json(folder / MODEL_INDEX)
    family = family_of_index(index)
    if family is None:
        titles = ", ".join(family.title for family in FAMILIES.values())
        raise UserError(f"{folder} is a {index.get('_class_name')}. Use a pipeline of a supported family: {titles}.")
    return family


def check_index(folder: Path) -> Iterator[tuple[bool, str]]:
    """(whether it holds, the problem if not) for each part that the family needs and model_index.json names.

    Only classes of diffusers and transformers that the family lists are ever imported, and no code of a pipeline's own.
    """
    family, index = family_of(folder), read_json(folder / MODEL_INDEX)
    refusal = family.refusal(index)
    yield refusal is None, refusal or ""
    missing = [part for part in family.parts if index.get(part) in (None, [None, None])]
    yield not missing, f"it has no {', '.join(missing)}. Use a complete pipeline of {family.title}."
    for part, classes in family.parts.items():
        named = class_name(index, part)
        yield named in classes, _refusal(part, named, classes)


def class_name(index: Mapping[str, Any], part: str) -> str:
    """`diffusers.AutoencoderKL` for a part that model_index.json gives as ["diffusers", "AutoencoderKL"]."""
    value = index[part]
    return ".".join(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else repr(value)


def _refusal(part: str, named: str, classes: Sequence[str]) -> str:
    if part == "scheduler" and named.startswith("diffusers."):
        return f"{no_betas(named, f'the scheduler in its {MODEL_INDEX}')}."
    return f"the {part} in its {MODEL_INDEX} is {named}, which is not supported. Use {_any_of(classes)}."


def _any_of(classes: Sequence[str]) -> str:
    return f"one such as {classes[0]}" if len(classes) > 3 else " or ".join(classes)


def part_classes(folder: Path) -> dict[str, Any]:
    """The class of each part of a pipeline. Raises UserError for a class that its family does not list."""
    for holds, problem in check_index(folder):
        if not holds:
            raise UserError(f"{folder}: {problem}")
    index = read_json(folder / MODEL_INDEX)
    names = {part: class_name(index, part).split(".") for part in family_of(folder).parts}
    return {part: getattr(LIBRARIES[library], name) for part, (library, name) in names.items()}


def _download(name: str, revision: str | None, variant: str | None, flag: str) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(SINGLE_FILES):
        raise UserError(
            f"{flag} {name} is not a folder. Give one in diffusers layout, or a name on the hub.{_similar(name)}"
        )
    try:
        folder = Path(DiffusionPipeline.download(name, revision=revision, variant=variant))
        if variant is None and not has_weights(folder / "unet"):
            # The repository may hold files in half precision alone.
            folder = Path(DiffusionPipeline.download(name, revision=revision, variant="fp16"))
        return folder
    except (OSError, ValueError, HTTPError) as error:
        # The hub's own errors say what is wrong. diffusers' error only refers to its cause.
        from_hub = isinstance(error, HfHubHTTPError) or error.__cause__ is None
        reason = _hub_problem(error if from_hub else error.__cause__)
        raise UserError(f"{flag} {name} is not a folder, and {reason}.{_similar(name)}") from None


def _hub_problem(error: BaseException | None) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "no hub can be asked, because HF_HUB_OFFLINE is set"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no model of that name, or shows it only to those who are logged in (`hf auth login`)"
    if isinstance(error, (ConnectionError, HTTPError)) and not isinstance(error, HfHubHTTPError):
        return "the hub cannot be reached"
    return f"it cannot be downloaded from a hub: {first_line(error or ValueError()).rstrip('.')}"


def _similar(name: str) -> str:
    """A question, if there is a model with a similar name: demo, or a folder or single file in the same place."""
    place = Path(name)
    beside = place.parent.iterdir() if place.parent.is_dir() else ()
    names = [path.name for path in beside if path.is_dir() or path.suffix in SINGLE_FILES]
    return did_you_mean(place.name, [*names, *BUNDLED] if place.name == name else names)


def load_base(folder: Path, variant: str | None = None, unet: UNet2DConditionModel | None = None) -> DiffusionPipeline:
    """A pipeline with `unet` in place of its own, or without one. The other parts are loaded, networks in float32.

    A safety checker is not: no stage needs it. Weights of `variant` are taken where there are any.
    """
    parts: dict[str, Any] = {}
    for part, kind in part_classes(folder).items():
        if part == "unet":
            parts[part] = unet
        elif issubclass(kind, nn.Module):
            # transformers would leave its networks in the precision of their files.
            parts[part] = load_network(kind, folder / part, variant).to(torch.float32)
        else:
            parts[part] = read_part(kind, folder, part)
    return family_of(folder).assemble(read_json(folder / MODEL_INDEX), **parts)


def load_scheduler(folder: Path) -> Any:
    """A pipeline's own sampling scheduler."""
    return read_part(part_classes(folder)["scheduler"], folder, "scheduler")


def load_unet(folder: Path, variant: str | None, as_stored: bool = False) -> UNet2DConditionModel:
    """A pipeline's U-Net, if `as_stored` in the precision of its files. Raises UserError for one with quantised
    weights."""
    dtype = None if as_stored else torch.float32
    unet = load_unet_folder(folder / "unet", variant, dtype)
    refuse_quantised(unet, folder)
    return unet


def load_unet_folder(folder: Path, variant: str | None, dtype: torch.dtype | None) -> UNet2DConditionModel:
    """The U-Net in a folder of its own; None is the precision of its files. The dtype is set here because quantised
    weights cannot be cast afterwards."""
    stated: dict[str, Any] = {"as_stored": True} if dtype is None else {"torch_dtype": dtype}
    return load_network(UNet2DConditionModel, folder, variant, fallback=False, **stated)


def load_deployed_unet(folder: Path, variant: str | None, dtype: torch.dtype) -> UNet2DConditionModel:
    """The U-Net in a folder of its own as it is used: with fake quantisers if it was trained with them.

    Others load it for training, and as a teacher, from its plain weights.
    """
    unet = load_unet_folder(folder, variant, dtype)
    if has_quantisers(folder):
        load_quantisers(unet, folder)
    return unet


def refuse_quantised(unet: UNet2DConditionModel, folder: Path) -> None:
    """Raise UserError for a U-Net with quantised weights, which can generate and be evaluated but not be trained."""
    if unet.config.get("quantization_config"):
        raise UserError(
            f"{folder} has quantised weights, which can be neither trained nor exported. Use the pipeline it was "
            "exported from."
        )


def unet_config(folder: Path) -> dict[str, Any]:
    """The U-Net config of a pipeline, with diffusers' defaults filled in. Its weights need not exist."""
    config = read_json(folder / "unet" / "config.json")
    with torch.device("meta"):
        made = reading(folder / "unet", lambda: UNet2DConditionModel.from_config(config), UNet2DConditionModel)
        return dict(made.config)

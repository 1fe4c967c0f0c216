"""Saving pipelines: the teacher's parts without its U-Net, and a student's pipeline.

What is written loads in transformers 4 and 5, and it does not say where the teacher lay on this machine.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file

from pipeline.models.checksums import write_checksums
from pipeline.models.fake_quant import save_unet
from pipeline.models.load import MODEL_INDEX, family_of
from pipeline.models.reading import read_json
from pipeline.models.schedule import CONFIG, stated_prediction_type
from pipeline.models.weights import copy_weights, find_weights, has_weights, network_bytes, read_tensors
from pipeline.system.disk import size_of
from pipeline.system.echo import say_wait
from shards.files import atomic_directory, atomic_file, write_json

# Keys under which diffusers and transformers note the folder that a part was loaded from.
PATH_KEYS = {"_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file"}
# Parts that no stage needs, with their configs. They are handed on if they are complete.
OPTIONAL = {
    "feature_extractor": "preprocessor_config.json",
    "image_encoder": "config.json",
    "safety_checker": "config.json",
}
# How transformers 4 calls the tensors of a CLIPTextModel. transformers 5 leaves the prefix out, and reads both.
CLIP_PREFIX = "text_model."
CLIP_MODULES = re.compile(r"(embeddings|encoder|final_layer_norm)\.")


def save_base(folder: Path, variant: str | None, noise_scheduler: DDPMScheduler, out: Path) -> None:
    """Write the parts of the pipeline in `folder` besides the U-Net, for a student's U-Net to be added.

    They are the teacher's own files where these hold float32, otherwise converted. The sampling scheduler stays the
    teacher's, with the prediction type of `noise_scheduler`.
    """
    with atomic_directory(out, exist_ok=True) as temporary:
        copy_parts(folder, variant, temporary, torch.float32)
        state_prediction_type(temporary / "scheduler" / CONFIG, noise_scheduler.config.prediction_type)
        write_checksums(temporary)


def state_prediction_type(path: Path, prediction_type: str) -> None:
    """Have a scheduler's config file state a prediction type. One that does so already stays as it is."""
    config = read_json(path)
    if stated_prediction_type(config) != prediction_type:
        write_json(path, {**config, "prediction_type": prediction_type}, indent=2)


def copy_parts(folder: Path, variant: str | None, out: Path, dtype: torch.dtype) -> None:
    """Write the parts of a pipeline besides the U-Net, and its model_index.json, with networks in `dtype`."""
    for part in parts_to_keep(folder):
        (out / part).mkdir(exist_ok=True)
        copy_part(folder / part, variant, out / part, dtype=dtype)
    write_json(out / MODEL_INDEX, index_to_keep(folder), indent=2)


def parts_to_keep(folder: Path) -> list[str]:
    """The parts of a pipeline besides the U-Net: those that its family needs, and optional ones that are complete."""
    index = read_json(folder / MODEL_INDEX)
    optional = [part for part, config in OPTIONAL.items() if _is_complete(folder, index, part, config)]
    if "feature_extractor" not in optional:
        # diffusers loads no safety checker without it.
        optional = [part for part in optional if part != "safety_checker"]
    return [*(part for part in family_of(folder).parts if part != "unet"), *optional]


def index_to_keep(folder: Path) -> dict[str, Any]:
    """The model_index.json of a pipeline that has `parts_to_keep` and a U-Net."""
    kept = {*parts_to_keep(folder), "unet"}
    index = {
        key: value if key in kept or not isinstance(value, list) else [None, None]
        for key, value in read_json(folder / MODEL_INDEX).items()
        if key not in PATH_KEYS
    }
    return index if "safety_checker" in kept else {**index, "requires_safety_checker": False}


def _is_complete(folder: Path, index: dict[str, Any], part: str, config: str) -> bool:
    has_config = index.get(part) not in (None, [None, None]) and (folder / part / config).is_file()
    return has_config and (config != "config.json" or has_weights(folder / part))


def copy_part(folder: Path, variant: str | None, out: Path, *, dtype: torch.dtype) -> None:
    """Write one part: its configs and vocabularies, and its weights in `dtype` if it has any."""
    for path in _small_files(folder):
        if path.suffix == ".json":
            _copy_json(path, out / path.name)
        else:
            shutil.copyfile(path, out / path.name)
    complete_tokenizer(out)
    if has_weights(folder):
        config = read_json(out / "config.json")
        is_clip = config.get("model_type") == "clip_text_model"
        copied = copy_weights(folder, variant, out, dtype, clip_name if is_clip else lambda name: name)
        stated = {key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in config}
        if not copied and stated:
            write_json(out / "config.json", {**config, **stated}, indent=2)


def copy_small_parts(folder: Path, variant: str | None, out: Path) -> None:
    """Write the parts of a pipeline that have no weights, and its model_index.json, without the optional parts."""
    for part in family_of(folder).parts:
        if not has_weights(folder / part):
            (out / part).mkdir()
            copy_part(folder / part, variant, out / part, dtype=torch.float32)
    index = {key: [None, None] if key in OPTIONAL else value for key, value in index_to_keep(folder).items()}
    write_json(out / MODEL_INDEX, {**index, "requires_safety_checker": False}, indent=2)


def save_config(network: Any, out: Path) -> None:
    """Write the config.json of a network of diffusers or transformers, with all of its fields."""
    config = network.config
    text = config.to_json_string(use_diff=False) if hasattr(config, "to_json_string") else network.to_json_string()
    fields = {key: value for key, value in json.loads(text).items() if key not in PATH_KEYS}
    write_json(out / "config.json", fields, indent=2)


def _small_files(folder: Path) -> Iterator[Path]:
    """Configs and vocabularies: the files that are neither weights nor the index of weights in pieces."""
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".txt") and ".index." not in path.name and path.is_file():
            yield path


def _copy_json(source: Path, out: Path) -> None:
    """Copy a JSON file, byte for byte unless it states a path."""
    value = json.loads(source.read_text(encoding="utf-8"))
    if isinstance(value, dict) and PATH_KEYS & value.keys():
        write_json(out, {key: item for key, item in value.items() if key not in PATH_KEYS}, indent=2)
    else:
        shutil.copyfile(source, out)


def clip_name(name: str) -> str:
    """What transformers 4 calls a tensor of a CLIPTextModel."""
    return CLIP_PREFIX + name if CLIP_MODULES.match(name) else name


def complete_tokenizer(folder: Path) -> None:
    """Write vocab.json and merges.txt, which transformers 4 needs, if a folder has only a tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.is_file() or (folder / "vocab.json").is_file():
        return
    tokenizer = read_json(path)
    model = tokenizer["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", ())}
    write_json(folder / "vocab.json", model["vocab"])
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")
    if more := {token: number for token, number in added.items() if token not in model["vocab"]}:
        write_json(folder / "added_tokens.json", more)


def save_pipeline(
    base: Path,
    unet: UNet2DConditionModel,
    out: Path,
    prediction_type: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a complete pipeline to `out`: the parts of `base`, with networks in `dtype`, and the U-Net as it is,
    its fake quantisers included.

    Its scheduler states `prediction_type`, what the U-Net predicts; None is what that of `base` states.
    model_index.json is removed first and written last, so a folder that has one is complete.
    """
    index = index_to_keep(base)
    (out / MODEL_INDEX).unlink(missing_ok=True)
    for part in parts_to_keep(base):
        with replaced_directory(out / part) as folder:
            copy_part(base / part, None, folder, dtype=dtype)
            if part == "scheduler" and prediction_type:
                state_prediction_type(folder / CONFIG, prediction_type)
    with replaced_directory(out / "unet") as folder:
        say_wait(f"writing {out / 'unet'}", network_bytes(unet))
        save_unet(unet, folder)
    write_json(out / MODEL_INDEX, index, indent=2)


def write_fp16_variant(folder: Path, out: Path) -> None:
    """Write the networks of the pipeline in `folder` to `out` in fp16, as diffusers' variant fp16: without configs.

    `out` may be the same folder. What is there already is kept.
    """
    for part in (*parts_to_keep(folder), "unet"):
        if not has_weights(folder / part):
            continue
        weights = find_weights(folder / part, None)
        path = out / part / f"{weights.stem}.fp16.safetensors"
        if path.is_file():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        say_wait(f"writing {path}", size_of(weights.files) // 2)
        tensors = {name: t.half() if t.is_floating_point() else t for name, t in read_tensors(weights).items()}
        with atomic_file(path) as stream:
            # safetensors wants a path: this is the temporary file next to the final one.
            save_file(tensors, stream.name, metadata={"format": "pt"})


@contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """A new directory, to be filled, in place of `path`."""
    shutil.rmtree(path, ignore_errors=True)
    with atomic_directory(path) as folder:
        yield folder

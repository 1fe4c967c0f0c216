"""The weight files in a part's folder, under the names that diffusers and transformers give them.

diffusion_pytorch_model.safetensors     or model.safetensors: the plain file
model.fp16.safetensors                  the variant fp16
model-00001-of-00002.safetensors ...    in pieces, with an index
pytorch_model.bin                       a pickle, read with weights_only
"""

from __future__ import annotations

import math
import re
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.models.reading import read_json, reading
from pipeline.system.disk import size_of
from pipeline.system.echo import say_wait
from pipeline.system.errors import UserError

NAME = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)"
    r"(\.(?P<variant>[A-Za-z]\w*))?(-\d{5}-of-(?P<pieces>\d{5}))?(\.(?P<old_variant>[A-Za-z]\w*))?"
    r"\.(?P<format>safetensors|bin)"
)
INDEX = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)\.(?P<format>safetensors|bin)\.index"
    r"(\.(?P<variant>[A-Za-z]\w*))?\.json"
)
# Weights that a file may hold besides the network's: the parts of CLIP that are not its text encoder.
SPARE = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
FORMATS = ("safetensors", "bin")
# Looked for in this order where no variant is asked for and the plain files are missing.
FALLBACKS = ("fp32", "fp16", "bf16")
# The names of dtypes in a safetensors header.
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

PRECISIONS = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "I8": "int8"}


@dataclass(frozen=True)
class WeightFiles:
    """One complete set of a network's weights: the `files`, sorted, of one variant (None: plain) in one format."""

    variant: str | None
    format: str
    files: tuple[Path, ...]

    @property
    def stem(self) -> str:
        """`model` or `diffusion_pytorch_model`."""
        name = self.files[0].name
        return "diffusion_pytorch_model" if name.startswith("diffusion") else "model"


def find_weights(folder: Path, variant: str | None, fallback: bool = True) -> WeightFiles:
    """The files that a network is loaded from: of `variant` if there are any, else the plain ones.

    If `variant` is None and there are no plain files, those of another variant. Without `fallback`, a `variant` that is
    asked for must exist. Raises UserError if there are no such files, or more than one set of them.
    """
    found = _weights_in(folder)
    others = sorted({name for name, _ in found if name} - set(FALLBACKS))
    order: list[str | None] = [variant, *([None] if fallback else [])] if variant else [None, *FALLBACKS, *others]
    for name in order:
        for format in FORMATS:
            if (name, format) in found:
                refuse_several_sets(folder, name, format, found[name, format])
                return WeightFiles(name, format, tuple(sorted(found[name, format])))
    if not found:
        raise UserError(f"{folder} holds no weights. Copy or download the pipeline again.")
    available = ", ".join(sorted({f"--variant {name}" if name else "no --variant" for name, _ in found}))
    raise UserError(f"{folder} has no weights of --variant {variant}. Use {available}.")


def has_weights(folder: Path) -> bool:
    return bool(_weights_in(folder))


def _weights_in(folder: Path) -> dict[tuple[str | None, str], list[Path]]:
    found = defaultdict(list)
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := NAME.fullmatch(path.name):
            found[match["variant"] or match["old_variant"], match["format"]].append(path)
    return dict(found)


def refuse_several_sets(folder: Path, variant: str | None, format: str, files: list[Path]) -> None:
    """Raise UserError unless weight files of one variant and format are one file, or all pieces of one network.

    Of two sets, each library would load another one.
    """
    sets = defaultdict(list)
    for path in sorted(files):
        if match := NAME.fullmatch(path.name):
            sets[match["stem"], match["pieces"]].append(path.name)
    in_pieces = {stem: int(pieces) for stem, pieces in sets if pieces}
    for path in sorted(folder.iterdir()):
        match = INDEX.fullmatch(path.name)
        if match and (match["variant"], match["format"]) == (variant, format) and match["stem"] not in in_pieces:
            sets[match["stem"], "index"].append(path.name)
    names = [name for of_set in sets.values() for name in of_set]
    if len(sets) > 1:
        raise UserError(
            f"{folder} holds {len(sets)} sets of weights: {', '.join(names)}. Delete those that are not the network's."
        )
    for pieces in in_pieces.values():
        if len(names) != pieces:
            raise UserError(
                f"{folder} holds {len(names)} of {pieces} pieces of its weights: {', '.join(names)}. "
                "Copy or download the pipeline again."
            )


def load_network(
    kind: Any, folder: Path, variant: str | None, fallback: bool = True, as_stored: bool = False, **options: Any
) -> Any:
    """The network of class `kind` in a folder, with every tensor from its files, if `as_stored` in their precision.

    Raises UserError if a tensor is missing or has another shape, which the libraries would leave random, and if the
    files hold others, which they would ignore.
    """
    read_json(folder / "config.json")
    weights = find_weights(folder, variant, fallback)
    say_wait(f"loading {folder}", size_of(weights.files))
    if as_stored:
        options["torch_dtype"] = reading(folder, lambda: stored_dtype(weights))
    if "transformers" in kind.__module__:
        # Otherwise transformers only says that some tensor does not fit.
        options["ignore_mismatched_sizes"] = True
    network, info = reading(
        folder,
        lambda: kind.from_pretrained(
            folder,
            variant=weights.variant,
            use_safetensors=weights.format == "safetensors",
            output_loading_info=True,
            local_files_only=True,
            **options,
        ),
        kind,
    )
    refuse_unfitting(folder, weights, network, info)
    return network


def refuse_unfitting(folder: Path, weights: WeightFiles, network: nn.Module, info: dict[str, Any]) -> None:
    """Raise UserError if `info`, a library's account of loading, has tensors that only the files or the network has."""
    source = weights.files[0] if len(weights.files) == 1 else folder
    misshapen = sorted(item if isinstance(item, str) else item[0] for item in info["mismatched_keys"])
    if misshapen:
        raise UserError(
            f"{source} does not fit its config.json: {misshapen[0]} has another shape"
            f"{_and_others(misshapen)}. Copy or download the pipeline again."
        )
    missing = sorted(set(info["missing_keys"]) & set(network.state_dict()))
    if missing:
        raise UserError(
            f"{source} lacks {len(missing)} of the network's {len(network.state_dict())} tensors, such as "
            f"{missing[0]}. Copy or download the pipeline again."
        )
    spare = sorted(name for name in info["unexpected_keys"] if not name.startswith(SPARE))
    more = f" and {len(spare) - 1} other tensors" if len(spare) > 1 else ""
    if spare:
        raise UserError(
            f"{source} holds {spare[0]}{more}, which its config.json has no place for. "
            "Correct the config, or copy or download the pipeline again."
        )


def stored_dtype(weights: WeightFiles) -> torch.dtype:
    """Half precision, fp16 or bf16, if all floats of a network's safetensors files have it; else float32."""
    found = set()
    for path in weights.files if weights.format == "safetensors" else ():
        with safe_open(path, "pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in list(file.keys())} & FLOATS.keys()
    return FLOATS[found.pop()] if len(found) == 1 and found <= {"F16", "BF16"} else torch.float32


def stored_precisions(folder: Path) -> list[str]:
    """The precisions of the floats in a folder's safetensors files, such as fp16; int8 if there are any of those."""
    found = set()
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in list(file.keys())}
    return [name for dtype, name in PRECISIONS.items() if dtype in found]


def stored_parameters(folder: Path) -> int:
    """How many parameters a network's safetensors files hold, by their headers."""
    count = 0
    for path in find_weights(folder, None).files:
        with safe_open(path, "pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in list(file.keys()))
    return count


def _and_others(names: list[str]) -> str:
    return f", as have {len(names) - 1} others" if len(names) > 1 else ""


def copy_weights(
    folder: Path, variant: str | None, out: Path, dtype: torch.dtype, rename: Callable[[str], str]
) -> bool:
    """Copy a network's weights to `out` under the plain names, with every tensor called `rename(name)`.

    The files are copied as they are if that is what they hold already, in `dtype` and as safetensors. Otherwise one
    file with such tensors is written. Returns whether the files were copied.
    """
    weights = find_weights(folder, variant)
    say_wait(f"copying {folder}", size_of(weights.files))
    if weights.variant is None and weights.format == "safetensors" and _hold(weights.files, dtype, rename):
        for file in (*weights.files, folder / f"{weights.stem}.safetensors.index.json"):
            if file.is_file():
                shutil.copyfile(file, out / file.name)
        return True
    tensors = {
        rename(name): tensor.to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous().clone()
        for name, tensor in reading(folder, lambda: read_tensors(weights)).items()
    }
    save_file(tensors, out / f"{weights.stem}.safetensors", metadata={"format": "pt"})
    return False


def read_tensors(weights: WeightFiles) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in weights.files:
        is_pickle = weights.format == "bin"
        tensors |= torch.load(file, map_location="cpu", weights_only=True) if is_pickle else load_file(file)
    return tensors


def _hold(files: tuple[Path, ...], dtype: torch.dtype, rename: Callable[[str], str]) -> bool:
    """Whether safetensors files hold floats of `dtype` alone, under names that `rename` leaves as they are."""
    for path in files:
        with safe_open(path, "pt") as file:
            for name in list(file.keys()):
                if rename(name) != name or FLOATS.get(file.get_slice(name).get_dtype(), dtype) != dtype:
                    return False
    return True


def network_bytes(*networks: nn.Module) -> int:
    """The bytes of the networks' tensors."""
    tensors = [tensor for network in networks for tensor in network.state_dict().values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

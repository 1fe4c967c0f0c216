"""How good pictures are by themselves: FID, Inception score, CLIP score, and the oracle for the demo's scenes.

pictures -> one size -> Inception's features and logits, CLIP's embeddings -> torchmetrics.
BK-SDM's protocol (Kim et al. 2023, arXiv:2305.15798): pictures of 512 px, resized to 256 by Pillow's bicubic filter.
"""

from __future__ import annotations

import itertools
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPModel, CLIPProcessor

from pipeline.data.images import ImageProblem, decode, is_image_name
from pipeline.system.errors import UserError

FILTERS = {filter.name.lower(): filter for filter in Image.Resampling}
# Of Salimans et al. 2016, and of every table since.
INCEPTION_SCORE_SPLITS = 10
EXTRA = "pip install 'distill-sd[evaluate]'"
INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth of torch-fidelity's release v0.2.0"


@dataclass(frozen=True)
class Missing:
    """What a figure lacks to be measured, and how to get it: a clause that follows "not measured: "."""

    reason: str


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D), float64, of features."""

    mu: Tensor
    sigma: Tensor


# uint8 (B, 3, H, W) -> pooled features (B, D), and logits without bias (B, K).
Inception = Callable[[Tensor], tuple[Tensor, Tensor]]


class Clip:
    """A CLIP and its processor, in the form that torchmetrics asks: it is both `model` and `processor`.

    torchmetrics takes the model's features for tensors, where transformers gives a structure since version 5; and it
    cuts long prompts without their end, at which CLIP reads the embedding: here the tokenizer cuts, and keeps the end.
    """

    def __init__(self, model: CLIPModel, processor: CLIPProcessor) -> None:
        self.config = model.config
        self._model, self._processor = model, processor

    def to(self, device: torch.device) -> Clip:
        self._model.to(device)
        return self

    def get_image_features(self, pixels: Tensor) -> Tensor:
        return _tensor(self._model.get_image_features(pixels))

    def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        return _tensor(self._model.get_text_features(ids, mask))

    def __call__(self, text: list[str] | None = None, images: list[Tensor] | None = None, **options: Any) -> Any:
        if text is None:
            return self._processor(images=images, return_tensors="pt")
        longest = self.config.text_config.max_position_embeddings
        return self._processor(text=text, truncation=True, max_length=longest, **options)


def _tensor(features: Any) -> Tensor:
    return features if isinstance(features, Tensor) else features.pooler_output


def open_torchmetrics() -> Missing | None:
    """None when torchmetrics can be imported; with a torch-fidelity beside it, it takes torchvision too."""
    try:
        import torchmetrics  # noqa: F401
    except ImportError as error:
        return Missing(f"needs {error.name or 'torchmetrics'}; {EXTRA}")
    return None


def open_inception(weights: Path | None, device: torch.device) -> Inception | Missing:
    """FID's Inception v3 by torch-fidelity, with weights from a file, or downloaded where there is a network.

    Raises UserError for a file that holds anything but tensors, or others than Inception's.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        return Missing(f"needs torch-fidelity and torchvision; {EXTRA}")
    if weights is not None:
        check_tensors_only(weights)
    features = ["2048", "logits_unbiased"]
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", features, str(weights) if weights else None)
    except OSError as error:
        return Missing(
            f"needs Inception's weights, which cannot be downloaded here ({error}); get the file "
            f"{INCEPTION_WEIGHTS} and give it with --inception-weights"
        )
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"--inception-weights {weights} is not {INCEPTION_WEIGHTS} ({reason}): give that") from None
    network.to(device)
    return lambda pictures: network(pictures.to(device))


def check_tensors_only(weights: Path) -> None:
    """Raise UserError unless a .pth file loads as tensors: torch-fidelity would run whatever else is in it."""
    try:
        torch.load(weights, map_location="meta", weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"--inception-weights {weights} cannot be loaded ({reason}): give {INCEPTION_WEIGHTS}"
        ) from None


def open_clip(folder: Path | None, device: torch.device) -> Clip | Missing:
    """A CLIP that transformers saved. Raises UserError for a folder that holds none."""
    if folder is None:
        return Missing(
            "needs --clip FOLDER, a CLIP as transformers saves it, such as "
            "laion/CLIP-ViT-g-14-laion2B-s12B-b42K from the hub"
        )
    lacking = open_torchmetrics()
    if lacking:
        return lacking
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False).to(device)
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"--clip {folder} cannot be loaded ({reason}): give a folder with a CLIP and its processor"
        ) from None
    return Clip(model, processor)


def open_reference(path: Path) -> Statistics | list[Path]:
    """What FID is measured against: stored statistics, or the pictures of a folder, sorted.

    Raises UserError for a path that is neither.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if is_image_name(file.name))
        if len(files) < 2:
            raise UserError(f"--reference {path} holds {len(files)} pictures: give a folder with at least two")
        return files
    try:
        stored = read_arrays(path)
        mu, sigma = (stored[name].double() for name in ("mu", "sigma"))
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        zipfile.BadZipFile,
        safetensors.SafetensorError,
    ) as error:
        raise UserError(
            f"--reference {path} cannot be read ({error}): give a folder of pictures, or an .npz or .safetensors "
            "file with mu and sigma"
        ) from None
    fits = mu.ndim == 1 and sigma.shape == (len(mu), len(mu))
    if not fits or not (mu.isfinite().all() and sigma.isfinite().all()):
        raise UserError(
            f"--reference {path} has mu {tuple(mu.shape)} and sigma {tuple(sigma.shape)}: "
            "give finite ones of shapes (D,) and (D, D)"
        )
    return Statistics(mu, sigma)


def read_arrays(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in ("mu", "sigma")}


def read_batches(files: list[Path], side: int, filter: str, batch_size: int) -> Iterator[Tensor]:
    """uint8 (B, 3, side, side) of picture files, in order. Raises UserError for one that cannot be decoded."""
    rest = iter(files)
    while batch := list(itertools.islice(rest, batch_size)):
        pixels = np.stack([np.asarray(center_square(read_image(file), side, filter)) for file in batch])
        yield torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def read_image(file: Path) -> Image.Image:
    try:
        return decode(file.read_bytes())
    except (OSError, ImageProblem) as error:
        raise UserError(f"{file} cannot be used ({error}): mend it or take it out") from None


def center_square(image: Image.Image, side: int, filter: str) -> Image.Image:
    """The centre of a picture, its shorter side resized to `side` by one of FILTERS."""
    short = min(image.size)
    size = tuple(max(side, round(length * side / short)) for length in image.size)
    left, top = ((length - side) // 2 for length in size)
    return image.resize(size, FILTERS[filter]).crop((left, top, left + side, top + side))


@torch.inference_mode()
def inception_features(batches: Iterable[Tensor], inception: Inception, total: int, name: str) -> tuple[Tensor, Tensor]:
    """Features (N, D) float64 and logits (N, K) float32 of pictures, on the CPU."""
    features, logits = [], []
    with tqdm(total=total, unit="picture", desc=f"{name}, by Inception") as progress:
        for batch in batches:
            pooled, unbiased = inception(batch)
            features.append(pooled.double().cpu())
            logits.append(unbiased.float().cpu())
            progress.update(len(batch))
    return torch.cat(features), torch.cat(logits)


def frechet_distance(reference: Statistics | Tensor, features: Tensor) -> float:
    """FID (Heusel et al. 2017) of features (N, D) float64, against others or against stored statistics.

    Raises UserError if the statistics are of other features.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    width = features.shape[1]
    found = len(reference.mu) if isinstance(reference, Statistics) else reference.shape[1]
    if found != width:
        raise UserError(f"--reference holds statistics of {found} features, and Inception's are {width}: give others")
    passed = nn.Identity()
    passed.num_features = width
    metric = FrechetInceptionDistance(passed)
    metric.update(features, real=False)
    if isinstance(reference, Statistics):
        # The sums over two samples that have this mean and covariance.
        mu, count = reference.mu, 2
        metric.real_features_sum = count * mu
        metric.real_features_cov_sum = (count - 1) * reference.sigma + count * torch.outer(mu, mu)
        metric.real_features_num_samples = torch.tensor(count)
    else:
        metric.update(reference, real=True)
    return metric.compute().item()


def inception_score(logits: Tensor) -> float:
    """The mean over ten splits (Salimans et al. 2016) of logits (N, K), dealt out at random but always alike."""
    from torchmetrics.image.inception import InceptionScore

    with warnings.catch_warnings():
        # That it keeps the logits of all pictures: they are kept here already.
        warnings.simplefilter("ignore")
        metric = InceptionScore(nn.Identity(), splits=INCEPTION_SCORE_SPLITS)
    # In float32 the share of a class that a picture surely is not of would be 0, and its logarithm infinite.
    metric.update(logits.double())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # It also gives the deviation over the splits, which takes two of them; the mean does not.
        mean, _ = metric.compute()
    return mean.item()


@torch.inference_mode()
def clip_score(batches: Iterable[Tensor], prompts: list[str], clip: Clip, device: torch.device, name: str) -> float:
    """100 times the cosine of a picture and its prompt, averaged, at least 0 (Hessel et al. 2021, without its 2.5)."""
    from torchmetrics.multimodal.clip_score import CLIPScore

    metric = CLIPScore(lambda: (clip, clip)).to(device)
    rest = iter(prompts)
    with tqdm(total=len(prompts), unit="picture", desc=f"{name}, by CLIP") as progress:
        for batch in batches:
            metric.update(list(batch.to(device)), list(itertools.islice(rest, len(batch))))
            progress.update(len(batch))
    return metric.compute().item()

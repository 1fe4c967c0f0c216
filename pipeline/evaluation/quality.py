"""How good generated images are: FID, Inception score and CLIP score.

images -> one size -> Inception's features and logits, CLIP's embeddings -> scores.
BK-SDM's protocol (Kim et al. 2023, arXiv:2305.15798): 512 px images, resized to 256 px with Pillow's bicubic filter.
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

from pipeline.data.files import MAX_IMAGE_BYTES, reason_of
from pipeline.data.images import ImageProblem, decode, is_image_name
from pipeline.models.load import refuse_special_files
from pipeline.system.disk import size_of
from pipeline.system.echo import plural, say_wait
from pipeline.system.errors import UserError, first_line
from pipeline.system.extras import install_command
from shards.regular import read_regular

FILTERS = {filter.name.lower(): filter for filter in Image.Resampling}
# The number in Salimans et al. 2016 and in published tables since.
INCEPTION_SCORE_SPLITS = 10
INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth from torch-fidelity's release v0.2.0"

# uint8 (B, 3, H, W) -> pooled features (B, D), and logits without bias (B, K).
Inception = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Missing:
    """Why a score cannot be measured, and the remedy: a clause that follows "not measured: "."""

    reason: str


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D) of features, float64."""

    mu: Tensor
    sigma: Tensor


class Clip:
    """A CLIP model and its processor in the form that torchmetrics expects: this is both `model` and `processor`.

    It corrects two things. torchmetrics expects features as tensors, but transformers 5 returns a structure. And
    torchmetrics cuts off the end-of-text token of long prompts, from which CLIP takes the embedding; the tokenizer's
    own truncation keeps that token.
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


def missing_torchmetrics() -> Missing | None:
    """None if torchmetrics can be imported. Where torch-fidelity is installed, that needs torchvision as well."""
    try:
        import torchmetrics  # noqa: F401
    except ImportError as error:
        return Missing(f"needs {error.name or 'torchmetrics'}; {install_command('evaluate')}")
    return None


def load_inception(weights: Path | None, device: torch.device) -> Inception | Missing:
    """FID's Inception v3 from torch-fidelity, with weights from a file or, by default, downloaded.

    Raises UserError if the file holds anything but tensors, or other tensors than Inception's.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        return Missing(f"needs torch-fidelity and torchvision; {install_command('evaluate')}")
    if weights is not None:
        check_tensors_only(weights)
    features = ["2048", "logits_unbiased"]
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", features, str(weights) if weights else None)
    except OSError as error:
        return Missing(
            f"needs Inception's weights, which cannot be downloaded here ({error}); get "
            f"{INCEPTION_WEIGHTS} and pass it with --inception-weights"
        )
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"--inception-weights {weights} cannot be used ({first_line(error)}). Pass {INCEPTION_WEIGHTS}."
        ) from None
    network.to(device)
    return lambda images: network(images.to(device))


def check_tensors_only(weights: Path) -> None:
    """Raise UserError unless a .pth file holds only tensors: torch-fidelity would execute any code in it."""
    try:
        torch.load(weights, map_location="meta", weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(
            f"--inception-weights {weights} cannot be loaded ({first_line(error)}). Pass {INCEPTION_WEIGHTS}."
        ) from None


def load_clip(folder: Path | None, device: torch.device) -> Clip | Missing:
    """A CLIP model saved by transformers. Raises UserError if the folder does not hold one."""
    if folder is None:
        return Missing(
            "needs --clip FOLDER, a CLIP model saved by transformers, such as "
            "laion/CLIP-ViT-g-14-laion2B-s12B-b42K from the hub"
        )
    missing = missing_torchmetrics()
    if missing:
        return missing
    refuse_special_files(folder, f"--clip {folder}")
    say_wait(f"loading {folder}", size_of(folder.glob("*")))
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False).to(device)
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(
            f"--clip {folder} cannot be loaded ({first_line(error)}). "
            "Pass a folder with a CLIP model and its processor."
        ) from None
    return Clip(model, processor)


def open_reference(path: Path) -> Statistics | list[Path]:
    """The reference for FID: stored statistics, or the sorted image files of a folder.

    Raises UserError if the path is neither.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if is_image_name(file.name))
        if len(files) < 2:
            raise UserError(f"--reference {path} holds {plural(len(files), 'image')}. Pass a folder with at least two.")
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
            f"--reference {path} cannot be read ({error}). Pass a folder of images, or an .npz or .safetensors "
            "file with mu and sigma."
        ) from None
    shapes_match = mu.ndim == 1 and sigma.shape == (len(mu), len(mu))
    if not shapes_match or not (mu.isfinite().all() and sigma.isfinite().all()):
        raise UserError(
            f"--reference {path} has mu of shape {tuple(mu.shape)} and sigma of shape {tuple(sigma.shape)}. "
            "They must be finite and of shapes (D,) and (D, D)."
        )
    return Statistics(mu, sigma)


def read_arrays(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in ("mu", "sigma")}


def read_batches(files: list[Path], side: int, filter: str, batch_size: int) -> Iterator[Tensor]:
    """Image files -> uint8 (B, 3, side, side), in order. Raises UserError if one cannot be decoded."""
    remaining = iter(files)
    while batch := list(itertools.islice(remaining, batch_size)):
        pixels = np.stack([np.asarray(center_square(read_image(file), side, filter)) for file in batch])
        yield torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def read_image(file: Path) -> Image.Image:
    try:
        return decode(read_regular(file, MAX_IMAGE_BYTES))
    except (OSError, ImageProblem) as error:
        reason = reason_of(error) if isinstance(error, OSError) else error
        raise UserError(f"{file} cannot be used ({reason}). Fix or remove the file.") from None


def center_square(image: Image.Image, side: int, filter: str) -> Image.Image:
    """The centre square of an image whose shorter side was resized to `side` with one of FILTERS."""
    short = min(image.size)
    width, height = (max(side, round(length * side / short)) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    return image.resize((width, height), FILTERS[filter]).crop((left, top, left + side, top + side))


@torch.inference_mode()
def inception_features(batches: Iterable[Tensor], inception: Inception, total: int, name: str) -> tuple[Tensor, Tensor]:
    """Features (N, D) float64 and logits (N, K) float32 of the images, on the CPU."""
    features, logits = [], []
    with tqdm(total=total, unit="image", desc=f"{name}, Inception") as progress:
        for batch in batches:
            pooled, unbiased = inception(batch)
            features.append(pooled.cpu().double())
            logits.append(unbiased.float().cpu())
            progress.update(len(batch))
    return torch.cat(features), torch.cat(logits)


def frechet_distance(reference: Statistics | Tensor, features: Tensor) -> float:
    """FID (Heusel et al. 2017) of features (N, D) float64, against other features or stored statistics.

    |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr(sqrt(S1 S2)), where the last trace is the sum of the square roots of the
    eigenvalues of S1 S2. Raises UserError if the statistics are not of Inception's features.
    """
    real = reference if isinstance(reference, Statistics) else feature_statistics(reference)
    fake = feature_statistics(features)
    if len(real.mu) != len(fake.mu):
        raise UserError(
            f"--reference holds statistics of {len(real.mu)} features, but Inception has {len(fake.mu)}. "
            "Pass statistics of Inception's features."
        )
    # S1 S2 has no negative eigenvalues, but rounding can make small ones negative or complex.
    trace = torch.linalg.eigvals(real.sigma @ fake.sigma).sqrt().real.sum()
    return ((real.mu - fake.mu).square().sum() + real.sigma.trace() + fake.sigma.trace() - 2 * trace).item()


def feature_statistics(features: Tensor) -> Statistics:
    """The mean and the unbiased covariance of features (N, D) float64."""
    mu = features.mean(dim=0)
    centred = features - mu
    return Statistics(mu, centred.T @ centred / (len(features) - 1))


def inception_score(logits: Tensor) -> float:
    """Inception score (Salimans et al. 2016) of logits (N, K): the mean over ten splits, drawn with a fixed seed."""
    from torchmetrics.image.inception import InceptionScore

    with warnings.catch_warnings():
        # It warns that it keeps the logits of all images, which are in memory anyway.
        warnings.simplefilter("ignore")
        metric = InceptionScore(nn.Identity(), splits=INCEPTION_SCORE_SPLITS)
    # In float32 the probability of an unlikely class can underflow to 0, and its logarithm would be infinite.
    metric.update(logits.double())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, _ = metric.compute()
    return mean.item()


@torch.inference_mode()
def clip_score(batches: Iterable[Tensor], prompts: list[str], clip: Clip, device: torch.device, name: str) -> float:
    """The mean of 100 cos(image, prompt), at least 0: Hessel et al. 2021, without their factor of 2.5."""
    from torchmetrics.multimodal.clip_score import CLIPScore

    metric = CLIPScore(lambda: (clip, clip)).to(device)
    remaining = iter(prompts)
    with tqdm(total=len(prompts), unit="image", desc=f"{name}, CLIP") as progress:
        for batch in batches:
            metric.update(list(batch.to(device)), list(itertools.islice(remaining, len(batch))))
            progress.update(len(batch))
    return metric.compute().item()


def _tensor(features: Any) -> Tensor:
    return features if isinstance(features, Tensor) else features.pooler_output

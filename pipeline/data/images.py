"""From an encoded image to a square of pixels: decode, orient, resize, crop, flip."""

from __future__ import annotations

import functools
import io
import os
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

# Resizing a sliver's short side would blow its long side up to gigabytes before the crop.
MAX_ASPECT = 64


class ImageProblem(ValueError):
    """An image that cannot be used. The message is the reason listed for skipping it."""


@dataclass(frozen=True)
class Crop:
    """How an image was cut: resized to `resized` pixels (width, height), then a square cropped at (left, top)."""

    original: tuple[int, int]
    resized: tuple[int, int]
    left: int
    top: int
    flip: bool

    def as_json(self) -> dict[str, Any]:
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


def is_image_name(name: str) -> bool:
    """Whether a file name ends like that of an image that Pillow can open."""
    return os.path.splitext(name)[1].lower() in _endings()


@functools.cache
def _endings() -> frozenset[str]:
    return frozenset(end for end, format in Image.registered_extensions().items() if format in Image.OPEN)


def decode(data: bytes) -> Image.Image:
    """Decode an image to RGB, rotated upright by its EXIF orientation, with transparency laid over white.

    Raises ImageProblem for anything that Pillow cannot decode completely or takes for a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
            if image.mode.startswith("I"):
                # Pillow would clip 16-bit values at 255.
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            if image.has_transparency_data:
                layer = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            return image.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageProblem(f"too large: {error}") from None
    # Pillow's decoders raise many kinds of error on damaged data (OSError, SyntaxError, struct.error, ...).
    except Exception as error:
        raise ImageProblem(f"not decodable: {type(error).__name__}: {error}") from None


def square(
    image: Image.Image, resolution: int, *, center_crop: bool, random_flip: bool, draw: np.random.Generator
) -> tuple[np.ndarray, Crop]:
    """Resize the shorter side to `resolution`, crop a square, and flip it if `random_flip` allows and chance decides.

    Returns the pixels, (resolution, resolution, 3) uint8, and the crop. The antialiased bilinear resizing and the
    rounding of sizes and of the centre are torchvision's, as in distill-sd. `draw` is the image's own random generator.
    Raises ImageProblem for an image whose long side is over 64 times its short side.
    """
    width, height = image.size
    short = min(width, height)
    if max(width, height) > MAX_ASPECT * short:
        raise ImageProblem(f"too thin: {width} x {height} pixels")
    resized = (int(resolution * width / short), int(resolution * height / short))
    spare = (resized[0] - resolution, resized[1] - resolution)
    placed, flipped = draw.random(2), draw.random() < 0.5
    if center_crop:
        left, top = (int(round(s / 2.0)) for s in spare)
    else:
        left, top = (int(p * (s + 1)) for p, s in zip(placed, spare, strict=True))
    flip = bool(random_flip and flipped)
    pixels = image.resize(resized, Image.Resampling.BILINEAR).crop((left, top, left + resolution, top + resolution))
    if flip:
        pixels = ImageOps.mirror(pixels)
    return np.asarray(pixels), Crop((width, height), resized, left, top, flip)

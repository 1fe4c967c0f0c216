"""An encoded picture to a square of pixels: decode, orient, resize, crop, flip."""

from __future__ import annotations

import functools
import io
import os
import warnings
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image, ImageOps

# A sliver would be blown up to gigabytes on its way to the crop.
MAX_ASPECT = 64


class ImageProblem(ValueError):
    """A picture that cannot be used; the message is the reason that is listed."""


@dataclass(frozen=True)
class Crop:
    """What was cut from a picture: of `resized` pixels (width, height), a square at (left, top)."""

    original: tuple[int, int]
    resized: tuple[int, int]
    left: int
    top: int
    flip: bool

    def as_json(self) -> dict:
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


def is_image_name(name: str) -> bool:
    """Whether a file's name ends as that of a picture that Pillow can open."""
    return os.path.splitext(name)[1].lower() in _endings()


@functools.cache
def _endings() -> frozenset[str]:
    return frozenset(end for end, format in Image.registered_extensions().items() if format in Image.OPEN)


def decode(data: bytes) -> Image.Image:
    """RGB, upright by its EXIF orientation, transparency laid over white.

    Raises ImageProblem for what Pillow cannot decode in full, or holds for a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                # Pillow would clip sixteen bits at 255.
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
    """Resize the shorter side to `resolution`, crop a square, perhaps flip it.

    Returns (resolution, resolution, 3) uint8 and what was done. Antialiased bilinear resizing and
    the rounding of sizes and of the centre are torchvision's, as in distill-sd. `draw` is the image's own.
    Raises ImageProblem for a picture over 64 times as long as wide.
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

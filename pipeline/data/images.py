"""From an encoded image to pixels of one size: decode, orient, resize, crop, flip."""

from __future__ import annotations

import functools
import io
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

# Pillow opens these without another program; it would hand an EPS to Ghostscript. Older Pillows lack some.
FORMATS = (
    *("AVIF", "BMP", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI"),
    *("SGI", "TGA", "TIFF", "WEBP"),
)
# Resizing a sliver's short side would blow its long side up to gigabytes before the crop.
MAX_ASPECT = 64
# Larger images are decoded one at a time, because each takes hundreds of megabytes.
LARGE_PIXELS = 1 << 25
# Pixels that are converted at once, so that intermediate results stay small.
STRIP_PIXELS = 1 << 20
# The colour space of an ICC profile: the mode in which its pixels are converted, and the modes of images it can be for.
PROFILE_MODES = {
    "RGB ": ("RGB", ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA")),
    "GRAY": ("L", ("L", "LA", "La", "1", "I", "I;16", "I;16B", "I;16L")),
    "CMYK": ("CMYK", ("CMYK",)),
}
# A profile that moves no colour by more than this is sRGB, up to rounding.
SRGB_TOLERANCE = 2
UPRIGHT: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

ON_ITS_SIDE = (5, 6, 7, 8)
# One of these is in every PNG that states an orientation.
PNG_ORIENTATION = (b"eXIf", b"Raw profile type", b"adobe.xmp")

_one_large_image = threading.Lock()


class ImageProblem(ValueError):
    """An image that cannot be used. The message is the reason listed for skipping it, the same in every run."""


@dataclass(frozen=True)
class Crop:
    """How an image was cut: resized to `resized` pixels (width, height), then cropped at (left, top) to the wanted
    size."""

    original: tuple[int, int]
    resized: tuple[int, int]
    left: int
    top: int
    flip: bool

    def as_json(self) -> dict[str, Any]:
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


def is_image_name(name: str) -> bool:
    """Whether a file name ends like that of an image that `decode` takes, and is not a Mac's `._` file beside one."""
    base = os.path.basename(name)
    return os.path.splitext(base)[1].lower() in _endings() and not base.startswith("._")


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(format for format in FORMATS if format in Image.OPEN)


@functools.cache
def _endings() -> frozenset[str]:
    return frozenset(end for end, format in Image.registered_extensions().items() if format in _formats())


def decode(data: bytes) -> Image.Image:
    """Decode an image to RGB in sRGB, rotated upright by its EXIF orientation, with transparency laid over white.

    An ICC profile is applied if it fits the image. Raises ImageProblem for anything that Pillow cannot decode
    completely or takes for a decompression bomb.
    """
    return upright_rgb(open_image(data))


def open_image(data: bytes) -> Image.Image:
    """An image whose size and mode are known and whose pixels are not decoded yet. Raises ImageProblem as `decode`."""
    with _problems():
        image = Image.open(io.BytesIO(data), formats=_formats())
        # Pillow itself raises an error from twice the limit on, and only warns below.
        if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        if image.mode == "F":
            raise ImageProblem("its pixels are floats, of which nobody says what is white. Save it with 8 or 16 bits")
        return image


def upright_size(data: bytes) -> tuple[int, int]:
    """(height, width) of an encoded image after it is turned upright, from its header. Raises ImageProblem as `decode`,
    as far as the header shows a problem."""
    image = open_image(data)
    # Pillow decodes a whole PNG to look for an orientation, which may stand at its end.
    turned = (image.format != "PNG" or any(mark in data for mark in PNG_ORIENTATION)) and _is_on_its_side(image)
    return (image.width, image.height) if turned else (image.height, image.width)


def upright_rgb(image: Image.Image) -> Image.Image:
    """The pixels of an opened image, as `decode` returns them. Raises ImageProblem as `decode` does."""
    with _problems():
        image.load()
        _refuse_wide(image)
        to_srgb = _srgb_conversion(image)
        image = _upright(image)
        if image.mode == "RGB" and not image.has_transparency_data and to_srgb is None:
            return image
        result = Image.new("RGB", image.size)
        rows = max(1, STRIP_PIXELS // image.width)
        for top in range(0, image.height, rows):
            box = (0, top, image.width, min(top + rows, image.height))
            result.paste(_rgb_on_white(image.crop(box), to_srgb), box)
        return result


def memory_of(image: Image.Image) -> AbstractContextManager[Any]:
    """To be held while the pixels of an opened image are in memory: only one large image is decoded at a time."""
    return _one_large_image if image.width * image.height > LARGE_PIXELS else nullcontext()


@contextmanager
def _problems() -> Iterator[None]:
    """Any error of Pillow as an ImageProblem."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageProblem(f"too large: more than {Image.MAX_IMAGE_PIXELS} pixels") from None
    except ImageProblem:
        raise
    except UnidentifiedImageError:
        raise ImageProblem("not decodable: not an image of a known format") from None
    # Pillow's decoders raise many kinds of error on damaged data (OSError, SyntaxError, struct.error, ...).
    except Exception as error:
        # The text of an object holds its address, which is another one in every run.
        text = re.sub(r" at 0x[0-9a-fA-F]+", "", str(error))
        raise ImageProblem(f"not decodable: {type(error).__name__}: {text}") from None


def _refuse_wide(image: Image.Image) -> None:
    """Raise ImageProblem for 32-bit integers that are not those of a 16-bit image."""
    if image.mode != "I":
        return
    extremes: Any = image.getextrema()
    least, most = extremes
    if least < 0 or most > 65535:
        raise ImageProblem(f"its pixels go from {least} to {most}, not from 0 to 65535. Save it with 8 or 16 bits")


def _upright(image: Image.Image) -> Image.Image:
    """The image turned by its EXIF orientation. An orientation that cannot be read leaves it as it is."""
    # ImageOps.exif_transpose also writes all other EXIF tags again and fails if one of them is invalid.
    method = UPRIGHT.get(_orientation(image))
    return image if method is None else image.transpose(method)


def _is_on_its_side(image: Image.Image) -> bool:
    """Whether an image's width becomes its height when it is turned upright."""
    return _orientation(image) in ON_ITS_SIDE


def _orientation(image: Image.Image) -> Any:
    """The EXIF orientation of an image, a number from 1 to 8; something else if there is none that can be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return orientation if isinstance(orientation, int) else None
    except Exception:
        return None


def _rgb_on_white(strip: Image.Image, to_srgb: Callable[[Image.Image], Image.Image] | None) -> Image.Image:
    if strip.mode.startswith("I"):
        # Pillow would clip 16-bit values at 255.
        strip = Image.fromarray((np.asarray(strip).clip(0, 65535) // 257).astype(np.uint8))
    if not strip.has_transparency_data:
        return strip.convert("RGB") if to_srgb is None else to_srgb(strip)
    layer = strip.convert("RGBA")
    if to_srgb is not None:
        alpha = layer.getchannel("A")
        layer = to_srgb(layer.convert("RGB"))
        layer.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _srgb_conversion(image: Image.Image) -> Callable[[Image.Image], Image.Image] | None:
    """From the image's ICC profile to sRGB. None without a profile, and for one that is damaged, foreign or sRGB."""
    data = image.info.get("icc_profile")
    if not data:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        mode, fitting = PROFILE_MODES[profile.profile.xcolor_space]
        if image.mode not in fitting:
            return None
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")

        def to_srgb(pixels: Image.Image) -> Image.Image:
            converted = ImageCms.applyTransform(pixels.convert(mode), transform)
            assert converted is not None
            return converted

        # Compare all greys, or a lattice of colours.
        lattice = Image.linear_gradient("L") if mode == "L" else _lattice()
        converted = to_srgb(lattice)
    # ImageCms raises many kinds of error, and an ImportError if Pillow was built without it.
    except Exception:
        return None
    moved = np.abs(np.asarray(converted, dtype=int) - np.asarray(lattice.convert("RGB"), dtype=int)).max()
    if mode != "CMYK" and moved <= SRGB_TOLERANCE:
        return None
    return to_srgb


@functools.cache
def _lattice() -> Image.Image:
    """RGB colours in even steps, as an image."""
    steps = np.linspace(0, 255, 16).round().astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), -1).reshape(64, 64, 3))


def framed(
    image: Image.Image, size: tuple[int, int], *, center_crop: bool, random_flip: bool, draw: np.random.Generator
) -> tuple[np.ndarray, Crop]:
    """Resize to cover `size` (height, width), crop, and flip if `random_flip` allows and chance decides.

    Returns the pixels, (height, width, 3) uint8, and the crop. The antialiased bilinear resizing and the rounding of
    sizes and of the centre are torchvision's, as in distill-sd. `draw` is the image's own random generator. Raises
    ImageProblem for an image whose long side is over 64 times its short side.
    """
    width, height = image.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageProblem(f"too thin: {width} x {height} pixels")
    rows, columns = size
    if columns * height >= rows * width:
        resized = columns, int(columns * height / width)
    else:
        resized = int(rows * width / height), rows
    spare = (resized[0] - columns, resized[1] - rows)
    placed, flipped = draw.random(2), draw.random() < 0.5
    if center_crop:
        left, top = (int(round(s / 2.0)) for s in spare)
    else:
        left, top = (int(p * (s + 1)) for p, s in zip(placed, spare, strict=True))
    flip = bool(random_flip and flipped)
    pixels = image.resize(resized, Image.Resampling.BILINEAR).crop((left, top, left + columns, top + rows))
    if flip:
        pixels = ImageOps.mirror(pixels)
    return np.asarray(pixels), Crop((width, height), resized, left, top, flip)

"""Images of any kind, made square as torchvision's Resize and CenterCrop would."""

import io
import os
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from pipeline.core.draws import generator
from pipeline.data import images
from pipeline.data.images import ImageProblem, decode, framed, is_image_name, memory_of, open_image


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def gradient(width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(
        np.stack([columns * 255 // width, rows * 255 // height, (rows + columns) % 256], -1).astype("u1")
    )


def draw(name: str = "a"):
    return generator(0, name, 0, "crop")


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(gradient(30, 20), "JPEG", exif=exif)).size == (20, 30)


def exif_block(*entries, extra=b""):
    """A little-endian EXIF block with one directory of (tag, type, count, value) entries."""
    body = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4) + extra


SIX = (0x0112, 3, 1, struct.pack("<HH", 6, 0))


@pytest.mark.parametrize(
    ("exif", "size"),
    [
        (exif_block(SIX), (20, 30)),
        # A resolution of -1/0, as signed rational.
        (exif_block(SIX, (0x011A, 10, 1, struct.pack("<I", 38)), extra=struct.pack("<ii", -1, 0)), (20, 30)),
        (exif_block(SIX, (0x011A, 5, 1, struct.pack("<I", 38)), extra=struct.pack("<II", 1, 0)), (20, 30)),
        (exif_block(SIX, (0x8769, 4, 1, struct.pack("<I", 0xFFFFFF))), (20, 30)),
        (exif_block((0x0112, 2, 4, b"6\0\0\0")), (30, 20)),
        (exif_block((0x0112, 3, 2, struct.pack("<HH", 6, 6))), (20, 30)),
        (exif_block((0x0112, 12, 1, struct.pack("<I", 0xFFFFFF))), (30, 20)),
        (exif_block(SIX)[:-12], (30, 20)),
        (b"Exif\0\0", (30, 20)),
        (b"Exif\0\0rubbish, not a directory", (30, 20)),
    ],
)
def test_odd_exif_does_not_spoil_a_sound_image(exif, size):
    assert decode(encoded(gradient(30, 20), "JPEG", exif=exif)).size == size


def test_transparency_is_laid_over_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode(encoded(image)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "I;16", "LA"])
def test_every_mode_becomes_rgb(mode):
    image = gradient(8, 8).convert("L" if mode == "I;16" else mode.replace("LA", "L"))
    image = image.convert("I;16") if mode == "I;16" else image.convert(mode)
    decoded = decode(encoded(image, "TIFF" if mode == "CMYK" else "PNG"))
    assert decoded.mode == "RGB"
    assert decoded.size == (8, 8)


def test_sixteen_bits_of_grey_keep_their_tones():
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    decoded = np.asarray(decode(encoded(Image.fromarray(ramp))))
    np.testing.assert_array_equal(decoded[..., 0], ramp // 257)


@pytest.mark.parametrize("data", [b"", b"this is text", encoded(gradient(64, 64))[:150]], ids=["empty", "text", "cut"])
def test_an_undecodable_image_is_reported(data):
    with pytest.raises(ImageProblem, match="not decodable"):
        decode(data)


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for side in (12, 40):
        with pytest.raises(ImageProblem, match="too large"):
            decode(encoded(gradient(side, side)))


def test_a_decompression_bomb_is_refused_in_every_thread(monkeypatch):
    """Whatever the filters of warnings are, which all threads share, and they stay as they are."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data, filters = encoded(gradient(12, 12)), list(warnings.filters)

    def refused(_):
        try:
            return bool(decode(data)) and None
        except ImageProblem as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(refused, range(200))) == {"too large: more than 100 pixels"}
    assert warnings.filters == filters


def test_only_raster_formats_are_opened(tmp_path, monkeypatch):
    """A stand-in for Ghostscript would leave a file if Pillow started it."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(ImageProblem, match="not an image of a known format"):
        decode(encoded(gradient(8, 8), "EPS"))
    assert not (tmp_path / "started").exists()
    assert [
        name for name in ("a.eps", "a.ps", "a.wmf", "a.h5", "a.mpg", "a.svg", "._a.png") if is_image_name(name)
    ] == []
    assert all(is_image_name(f"a.{end}") for end in ("jpg", "JPEG", "png", "webp", "gif", "bmp", "tif", "tiff", "jp2"))


@pytest.mark.parametrize("data", [b"", b"text", b"%!PS-Adobe-3.0", encoded(gradient(64, 64))[:150]])
def test_a_reason_is_the_same_in_every_run(data):
    reasons = set()
    for _ in range(3):
        with pytest.raises(ImageProblem) as caught:
            decode(bytes(bytearray(data)))
        reasons.add(str(caught.value))
    assert len(reasons) == 1
    assert "0x" not in reasons.pop()


def test_large_images_are_decoded_one_at_a_time(monkeypatch):
    monkeypatch.setattr(images, "LARGE_PIXELS", 100)
    large, small = (open_image(encoded(gradient(side, side))) for side in (11, 10))
    with memory_of(large):
        assert memory_of(large).locked()
        with memory_of(small):
            pass
    assert not memory_of(large).locked()


# (width, height) -> resized size and the corner of a 32 px centre crop, by torchvision's documented rules:
# the long side is int(32 * long / short), the corner is int(round((side - 32) / 2)).
TORCHVISION = {
    (40, 40): ((32, 32), (0, 0)),
    (50, 40): ((40, 32), (4, 0)),
    (40, 53): ((32, 42), (0, 5)),
    (37, 100): ((32, 86), (0, 27)),
    (101, 37): ((87, 32), (28, 0)),
    (20, 30): ((32, 48), (0, 8)),
}


@pytest.mark.parametrize("size", TORCHVISION)
def test_resize_and_centre_crop_are_torchvisions(size):
    image = gradient(*size)
    pixels, crop = framed(image, (32, 32), center_crop=True, random_flip=False, draw=draw())
    resized, corner = TORCHVISION[size]
    assert (crop.original, crop.resized, (crop.left, crop.top)) == (size, resized, corner)
    expected = np.asarray(image.resize(resized, Image.Resampling.BILINEAR))
    left, top = corner
    np.testing.assert_array_equal(pixels, expected[top : top + 32, left : left + 32])


def test_random_crops_reach_every_place_and_flips_are_half():
    image = gradient(36, 32)
    crops = [framed(image, (32, 32), center_crop=False, random_flip=True, draw=draw(str(i)))[1] for i in range(400)]
    assert {crop.left for crop in crops} == set(range(5))
    assert 150 < sum(crop.flip for crop in crops) < 250
    assert crops[7] == framed(image, (32, 32), center_crop=False, random_flip=True, draw=draw("7"))[1]


def test_a_flip_mirrors_the_same_crop():
    image = gradient(50, 40)
    for i in range(20):
        pixels, crop = framed(image, (32, 32), center_crop=False, random_flip=True, draw=draw(str(i)))
        plain, same = framed(image, (32, 32), center_crop=False, random_flip=False, draw=draw(str(i)))
        assert (crop.left, crop.top) == (same.left, same.top)
        np.testing.assert_array_equal(pixels, plain[:, ::-1] if crop.flip else plain)


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1)])
def test_a_sliver_is_refused_before_it_is_blown_up(size):
    with pytest.raises(ImageProblem, match="too thin"):
        framed(gradient(*size), (512, 512), center_crop=True, random_flip=False, draw=draw())

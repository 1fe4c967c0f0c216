"""Images of any kind, made square as torchvision's Resize and CenterCrop would."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.core.draws import generator
from pipeline.data.images import ImageProblem, decode, square


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
    pixels, crop = square(image, 32, center_crop=True, random_flip=False, draw=draw())
    resized, corner = TORCHVISION[size]
    assert (crop.original, crop.resized, (crop.left, crop.top)) == (size, resized, corner)
    expected = np.asarray(image.resize(resized, Image.Resampling.BILINEAR))
    left, top = corner
    np.testing.assert_array_equal(pixels, expected[top : top + 32, left : left + 32])


def test_random_crops_reach_every_place_and_flips_are_half():
    image = gradient(36, 32)
    crops = [square(image, 32, center_crop=False, random_flip=True, draw=draw(str(i)))[1] for i in range(400)]
    assert {crop.left for crop in crops} == set(range(5))
    assert 150 < sum(crop.flip for crop in crops) < 250
    assert crops[7] == square(image, 32, center_crop=False, random_flip=True, draw=draw("7"))[1]


def test_a_flip_mirrors_the_same_crop():
    image = gradient(50, 40)
    for i in range(20):
        pixels, crop = square(image, 32, center_crop=False, random_flip=True, draw=draw(str(i)))
        plain, same = square(image, 32, center_crop=False, random_flip=False, draw=draw(str(i)))
        assert (crop.left, crop.top) == (same.left, same.top)
        np.testing.assert_array_equal(pixels, plain[:, ::-1] if crop.flip else plain)


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1)])
def test_a_sliver_is_refused_before_it_is_blown_up(size):
    with pytest.raises(ImageProblem, match="too thin"):
        square(gradient(*size), 512, center_crop=True, random_flip=False, draw=draw())

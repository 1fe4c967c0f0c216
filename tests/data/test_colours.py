"""Colours of images with an ICC profile, against the profiles' own arithmetic."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipeline.data import images
from pipeline.data.images import decode
from pipeline.evaluation.quality import read_image

# Primaries (X, Y, Z of red, green and blue) of two colour spaces, adapted to D50, from their specifications.
DISPLAY_P3 = [(0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)]
ADOBE_RGB = [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)]
SRGB = [(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)]
WHITE = (0.9642, 1.0, 0.8249)


def fixed(values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def icc(device, space, connection, tags):
    """An ICC profile, version 2, made by hand."""
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78), **tags}
    tags |= {b"wtpt": b"XYZ \0\0\0\0" + fixed(WHITE), b"cprt": b"text\0\0\0\0x\0"}
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"test", 0x02400000, device, space, connection)
    head += bytes(12) + b"acsp" + bytes(28) + fixed(WHITE) + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + body


def curve(gamma):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def rgb_profile(primaries, gamma):
    tags = {
        name + b"XYZ": b"XYZ \0\0\0\0" + fixed(xyz) for name, xyz in zip((b"r", b"g", b"b"), primaries, strict=True)
    }
    return icc(b"mntr", b"RGB ", b"XYZ ", tags | {name + b"TRC": curve(gamma) for name in (b"r", b"g", b"b")})


def grey_profile(gamma):
    return icc(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": curve(gamma)})


def cmyk_profile():
    """Every ink prints as the complement of red, green or blue, and black dims them: a table with two steps per ink."""
    corners = np.array(np.meshgrid(*[[0, 1]] * 4, indexing="ij")).reshape(4, -1).T
    colours = ((1 - corners[:, :3]) * (1 - corners[:, 3:]) * 255).astype(np.uint8)[None]
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), to_lab)).astype(np.uint8)[0]
    # Pillow stores a and b as signed bytes, ICC with 128 in the middle.
    lab = lab + np.array([0, 128, 128], np.uint8)
    ramps = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed(np.eye(3).ravel()) + ramps * 4 + lab.tobytes() + ramps * 3
    return icc(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table})


def expected(values, primaries, gamma):
    """What sRGB values show the colours that `values` have in an RGB space: decode, change primaries, encode."""
    linear = (values / 255.0) ** gamma @ np.array(primaries) @ np.linalg.inv(np.array(SRGB))
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def saved(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def colours(size=24):
    rows, columns = np.mgrid[:size, :size] * 255 // (size - 1)
    return np.stack([rows, columns, 255 - rows], -1).astype(np.uint8)


@pytest.mark.parametrize("primaries", [DISPLAY_P3, ADOBE_RGB], ids=["display p3", "adobe rgb"])
@pytest.mark.parametrize("strip_pixels", [50, 1 << 20])
def test_a_wide_profile_is_converted_to_srgb(primaries, strip_pixels, monkeypatch):
    monkeypatch.setattr(images, "STRIP_PIXELS", strip_pixels)
    data = saved(Image.fromarray(colours()), icc_profile=rgb_profile(primaries, 2.2))
    shown = expected(colours(), primaries, 2.2)
    assert np.abs(np.asarray(decode(data)) - shown).max() < 3
    assert np.abs(colours() - shown).max() > 20


def test_the_profile_is_applied_below_transparency_and_orientation():
    exif = Image.Exif()
    exif[0x0112] = 3
    layer = Image.fromarray(colours()).convert("RGBA")
    layer.putalpha(128)
    options = {"icc_profile": rgb_profile(ADOBE_RGB, 2.2), "exif": exif}
    shown = expected(colours(), ADOBE_RGB, 2.2)[::-1, ::-1] * 128 / 255 + 127
    assert np.abs(np.asarray(decode(saved(layer, **options))) - shown).max() < 3


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_has_profiles_of_its_own(mode):
    ramp = np.arange(256, dtype=np.uint8)[None].repeat(4, 0)
    image = Image.fromarray(ramp.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(ramp).convert(mode)
    pixels = np.asarray(decode(saved(image, icc_profile=grey_profile(1.8))))
    assert np.abs(pixels - expected(np.repeat(ramp[..., None], 3, -1), SRGB, 1.8)).max() < 3


def test_inks_are_shown_as_their_profile_says():
    inks = np.array([[(255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255), (0, 0, 0, 0), (255, 255, 0, 0)]])
    image = Image.frombytes("CMYK", (6, 1), inks.astype(np.uint8).tobytes())
    pixels = np.asarray(decode(saved(image, "TIFF", icc_profile=cmyk_profile())))[0].astype(int)
    shown = [(0, 255, 255), (255, 0, 255), (255, 255, 0), (0, 0, 0), (255, 255, 255), (0, 0, 255)]
    assert np.abs(pixels - shown).max() < 12
    # Halfway to black the table is linear in lightness; without a profile it would be linear in the stored values.
    half = Image.frombytes("CMYK", (1, 1), bytes([0, 0, 0, 128]))
    assert np.abs(np.asarray(decode(saved(half, "TIFF", icc_profile=cmyk_profile())))[0, 0] - 119.0).max() < 3


def srgb_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize(
    ("mode", "profile"),
    [
        ("RGB", srgb_profile()),
        ("RGBA", srgb_profile()),
        ("P", srgb_profile()),
        ("RGB", b"no profile at all"),
        ("RGB", rgb_profile(DISPLAY_P3, 2.2)[:200]),
        ("RGB", grey_profile(1.8)),
        ("L", rgb_profile(ADOBE_RGB, 2.2)),
        ("RGB", cmyk_profile()),
        ("CMYK", rgb_profile(ADOBE_RGB, 2.2)),
    ],
    ids=[
        "sRGB",
        "sRGB alpha",
        "sRGB palette",
        "text",
        "cut",
        "grey for RGB",
        "RGB for grey",
        "CMYK for RGB",
        "RGB for CMYK",
    ],
)
def test_an_srgb_profile_or_one_that_does_not_fit_changes_no_byte(mode, profile):
    image = Image.fromarray(colours()).convert(mode)
    format = "TIFF" if mode == "CMYK" else "PNG"
    tagged, plain = (decode(saved(image, format, **options)) for options in ({"icc_profile": profile}, {}))
    np.testing.assert_array_equal(np.asarray(tagged), np.asarray(plain))


def test_reference_images_of_fid_are_converted_too(tmp_path):
    data = saved(Image.fromarray(colours()), icc_profile=rgb_profile(DISPLAY_P3, 2.2))
    (tmp_path / "a.png").write_bytes(data)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.png")), np.asarray(decode(data)))

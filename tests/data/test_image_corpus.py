"""Images as found in the wild: each is decoded as a person would expect, or skipped with a reason."""

import contextlib
import io
import json
import random
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.stages import read_entries, run_encode

from pipeline.core.draws import generator
from pipeline.data.images import ImageProblem, decode, framed

SIDE = 32


def photo(width=48, height=40, seed=0):
    """A smooth image with one white corner, so that its orientation can be seen."""
    rows, columns = np.mgrid[:height, :width]
    values = np.stack([columns * 255 // width, rows * 255 // height, np.full_like(rows, 64)], -1)
    values[: height // 4, : width // 4] = (255, 255, 255)
    return Image.fromarray(values.astype(np.uint8))


def saved(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bits=8, colour=2, data=b""):
    """A PNG made by hand, which need not match its header."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(photo(), "JPEG", exif=exif)


def animation(format):
    return saved(photo(), format, save_all=True, append_images=[photo().rotate(90 * i) for i in (1, 2)])


JPEG, PNG = saved(photo(), "JPEG"), saved(photo())
with_profile = {"icc_profile": b"no profile at all"}

TAKEN = {
    "jpeg.jpg": JPEG,
    "progressive.jpg": saved(photo(), "JPEG", progressive=True),
    "grey.jpg": saved(photo().convert("L"), "JPEG"),
    "cmyk.jpg": saved(photo().convert("CMYK"), "JPEG"),
    "subsampled.jpg": saved(photo(), "JPEG", subsampling=2, quality=10),
    "bad profile.jpg": saved(photo(), "JPEG", **with_profile),
    **{f"exif {orientation}.jpg": turned(orientation) for orientation in range(1, 9)},
    "exif 0.jpg": turned(0),
    "exif 99.jpg": turned(99),
    "bytes after the end.jpg": JPEG + b"<html>appended</html>" * 50,
    "image with a text file's name.txt.jpg": JPEG,
    "png that is called.jpg": PNG,
    "jpeg that is called.png": JPEG,
    "rgb.png": PNG,
    "palette.png": saved(photo().convert("P")),
    "palette with transparency.png": saved(photo().convert("P"), transparency=0),
    "one bit.png": saved(photo().convert("1")),
    "grey.png": saved(photo().convert("L")),
    "grey and alpha.png": saved(photo().convert("LA")),
    "alpha.png": saved(photo().convert("RGBA")),
    "fully transparent.png": saved(Image.new("RGBA", (40, 40))),
    "sixteen bits.png": saved(Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40)),
    "sixteen bits of colour.png": png(40, 40, 16, 2, (b"\0" + b"\x80\x01" * 120) * 40),
    "interlaced.png": saved(photo(), interlace=1),
    "one colour.png": saved(Image.new("RGB", (64, 64), "navy")),
    "one pixel.png": saved(Image.new("RGB", (1, 1), "red")),
    "small.png": saved(photo(3, 2)),
    "wide.png": saved(photo(600, 20)),
    "tall.png": saved(photo(20, 600)),
    "large.png": saved(photo(3000, 2000)),
    "grey.tiff": saved(photo().convert("L"), "TIFF"),
    "int.tiff": saved(photo().convert("I"), "TIFF"),
    "cmyk.tiff": saved(photo().convert("CMYK"), "TIFF"),
    "lab.tiff": saved(photo().convert("LAB"), "TIFF"),
    "pages.tiff": animation("TIFF"),
    "animated.gif": animation("GIF"),
    "animated.webp": animation("WEBP"),
    "animated.png": animation("PNG"),
    "lossless.webp": saved(photo(), "WEBP", lossless=True),
    "alpha.webp": saved(photo().convert("RGBA"), "WEBP"),
    "bitmap.bmp": saved(photo(), "BMP"),
    "targa.tga": saved(photo(), "TGA"),
    "portable.ppm": saved(photo(), "PPM"),
    "icon.ico": saved(photo(64, 64), "ICO"),
    "größe 大 😀.png": PNG,
    " leading space.png": PNG,
    "quote'\"s; rm -rf $HOME.png": PNG,
    "-rf.png": PNG,
    "percent %s %n.png": PNG,
    "new\nline.png": PNG,
    "dots.. .in...name.png": PNG,
    "n" * 200 + ".png": PNG,
}

SKIPPED = {
    "float.tiff": (saved(photo().convert("F"), "TIFF"), "its pixels are floats"),
    "wide.tiff": (saved(Image.fromarray(np.full((40, 40), 70000, np.int32)), "TIFF"), "its pixels go from 70000 to"),
    "negative.tiff": (saved(Image.fromarray(np.full((40, 40), -1, np.int32)), "TIFF"), "its pixels go from -1 to -1"),
    "empty.jpg": (b"", "not decodable"),
    "text.jpg": (b"not an image", "not decodable"),
    "html.jpg": (b"<!DOCTYPE html><html><body>404</body></html>" * 40, "not decodable"),
    "zeros.png": (bytes(4096), "not decodable"),
    "noise.png": (random.Random(0).randbytes(4096), "not decodable"),
    "signature alone.png": (PNG[:8], "not decodable"),
    "header alone.png": (PNG[:33], "not decodable"),
    "cut.png": (PNG[: len(PNG) // 2], "not decodable"),
    "cut.jpg": (JPEG[: len(JPEG) // 2], "not decodable"),
    "cut at the marker.jpg": (JPEG[:2], "not decodable"),
    "cut.gif": (animation("GIF")[:60], "not decodable"),
    "cut.webp": (animation("WEBP")[:60], "not decodable"),
    "cut.tiff": (saved(photo(), "TIFF")[:-900], "not decodable"),
    "cut.bmp": (saved(photo(), "BMP")[:-900], "not decodable"),
    "flipped bit.png": (PNG[:60] + bytes([PNG[60] ^ 4]) + PNG[61:], "not decodable"),
    "no pixels.png": (png(40, 40), "not decodable"),
    "nothing wide.png": (png(0, 40), "not decodable"),
    "bomb.png": (png(60000, 60000, data=bytes(1000)), "too large"),
    "long bomb.png": (png(2**31 - 1, 1, data=bytes(1000)), "too large"),
    "one pixel wide.png": (saved(photo(1, 3000)), "too thin"),
    "one pixel high.png": (saved(photo(3000, 1)), "too thin"),
    "archive.png": (b"PK\x03\x04" + bytes(300), "not decodable"),
    "vector.png": (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "not decodable"),
    "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/hostname) run\n", "not decodable"),
}


def test_the_corpus_is_large():
    assert len(TAKEN) + len(SKIPPED) >= 60


def test_every_image_is_taken_or_skipped_with_a_reason(teacher, tmp_path):
    """All of them, and several links, in one run of `encode`."""
    data = tmp_path / "data"
    data.mkdir()
    files = {**TAKEN, **{name: content for name, (content, _) in SKIPPED.items()}}
    for name, content in files.items():
        (data / name).write_bytes(content)
    (tmp_path / "outside.png").write_bytes(PNG)
    (data / "link out.png").symlink_to(tmp_path / "outside.png")
    (data / "link in.png").symlink_to(data / "rgb.png")
    (data / "link to nothing.png").symlink_to(data / "nothing.png")
    (data / "link to itself.png").symlink_to(data / "link to itself.png")
    (data / "folder.png").mkdir()
    links = ["link out.png", "link in.png", "link to nothing.png", "link to itself.png", "folder.png"]
    rows = [json.dumps({"file_name": name, "text": "a caption"}) for name in [*files, *links]]
    (data / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")

    out = run_encode(teacher, data, tmp_path / "out", entries_per_shard=100, max_skipped=1.0)
    reasons = {
        item["source_id"]: item["reason"] for item in map(json.loads, (out / "skipped.jsonl").read_text().splitlines())
    }
    expected = {name: reason for name, (_, reason) in SKIPPED.items()} | {
        "link out.png": "lies outside",
        "link to nothing.png": "No such file",
        "folder.png": "Is a directory",
        "link to itself.png": "",
    }
    assert set(reasons) == set(expected)
    for name, reason in expected.items():
        assert reason in reasons[name], (name, reasons[name])
    assert {entry.meta["source_id"] for entry in read_entries(out, "latents", ["latents"])} == {*TAKEN, "link in.png"}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_show_the_same_scene_upright(orientation):
    """The stored pixels are rotated, so the white corner is where the orientation puts it."""
    pixels = np.asarray(decode(turned(orientation)))
    corners = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert pixels[corners[orientation]].min() > 240
    assert pixels.shape[:2] == ((40, 48) if orientation < 5 else (48, 40))


@pytest.mark.parametrize("name", ["animated.gif", "animated.webp", "animated.png", "pages.tiff"])
def test_the_first_frame_of_an_animation_is_taken(name):
    difference = np.asarray(decode(TAKEN[name])).astype(int) - np.asarray(photo())
    assert np.abs(difference).mean() < 12


@pytest.mark.parametrize(
    "name", ["alpha.png", "alpha.webp", "palette.png", "cmyk.tiff", "bitmap.bmp", "interlaced.png"]
)
def test_colours_are_kept(name):
    difference = np.asarray(decode(TAKEN[name])).astype(int) - np.asarray(photo())
    assert np.abs(difference).mean() < (20 if name == "palette.png" else 12)


def test_integers_of_32_bits_that_are_those_of_16_keep_their_tones():
    grey = np.asarray(photo().convert("L")).astype(np.int32)
    image = decode(saved(Image.fromarray(grey * 257), "TIFF"))
    assert np.abs(np.asarray(image)[..., 0].astype(int) - grey).max() <= 1


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(TAKEN)), st.integers(0, 2**32 - 1), st.integers(1, 6), st.booleans())
def test_damage_never_raises_another_error(name, seed, count, cut):
    """Flipped bits and truncation anywhere give a square of pixels or an ImageProblem."""
    draw = random.Random(seed)
    data = bytearray(TAKEN[name])
    for _ in range(count):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    try:
        image = decode(bytes(data[: draw.randrange(len(data))] if cut else data))
        pixels, _ = framed(image, (SIDE, SIDE), center_crop=False, random_flip=True, draw=generator(0, name, 0, "crop"))
    except ImageProblem:
        return
    assert pixels.shape == (SIDE, SIDE, 3)
    assert pixels.dtype == np.uint8


@settings(max_examples=60, deadline=None)
@given(
    st.binary(max_size=300), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF", b"II*\0"])
)
def test_any_bytes_are_an_image_or_a_problem(data, start):
    with contextlib.suppress(ImageProblem):
        decode(start + data)

"""From records to pixels of one size, in threads and in order. Images that cannot be used are skipped with a reason."""

from __future__ import annotations

import errno
import functools
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.core import draws
from pipeline.data.files import reason_of
from pipeline.data.images import MAX_ASPECT, Crop, framed, memory_of, open_image, upright_rgb, upright_size
from pipeline.data.records import Record
from pipeline.data.source import OpenSource
from pipeline.system.echo import one_line
from pipeline.system.errors import UserError
from pipeline.system.threads import ordered_map

# What the system says of a file that is not there or not to be read. Anything else may pass: it says nothing of the
# image. An error without a number comes from the decoder.
OF_THE_IMAGE = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
}
# Images of which a shard may lose any share.
FEW = 5
# Seconds before another try.
PAUSES = (0.1, 1.0)


@dataclass(frozen=True)
class Framing:
    """How an image is cut to `size` (height, width). One whose shorter side has fewer than `min_size` pixels is
    skipped."""

    size: tuple[int, int]
    center_crop: bool
    random_flip: bool
    seed: int
    min_size: int = 0


@dataclass(frozen=True)
class LoadedImage:
    """A record with its pixels, (height, width, 3) uint8, or with the reason why it has none. `crc32` is of the encoded
    image, if it could be read."""

    index: int
    record: Record
    pixels: np.ndarray | None = None
    crop: Crop | None = None
    problem: str | None = None
    crc32: int | None = None


def load_images(
    source: OpenSource, framing: Framing, records: list[tuple[int, Record]], workers: int, ahead: int
) -> Iterator[LoadedImage]:
    """Decode and crop the images of (index, record) pairs in `workers` threads, and yield them in order."""
    return ordered_map(functools.partial(load_image, source, framing), records, workers, ahead)


def load_image(source: OpenSource, framing: Framing, indexed: tuple[int, Record]) -> LoadedImage:
    index, record = indexed
    if record.problem:
        return LoadedImage(index, record, problem=record.problem)
    draw = draws.generator(framing.seed, record.source_id, 0, "crop")
    crc32 = None
    try:
        data = read_patiently(source, record)
        crc32, image = zlib.crc32(data), open_image(data)
        if min(image.size) < framing.min_size:
            problem = f"too small: {image.width} x {image.height} pixels"
            return LoadedImage(index, record, problem=problem, crc32=crc32)
        with memory_of(image):
            pixels, crop = framed(
                upright_rgb(image),
                framing.size,
                center_crop=framing.center_crop,
                random_flip=framing.random_flip,
                draw=draw,
            )
    except OSError as error:
        refuse_passing(record, error)
        return LoadedImage(index, record, problem=reason_of(error))
    except ValueError as error:
        return LoadedImage(index, record, problem=str(error), crc32=crc32)
    return LoadedImage(index, record, pixels, crop, crc32=crc32)


def image_size(source: OpenSource, record: Record, min_size: int) -> tuple[int, int] | None:
    """(height, width) of an upright image, from its header; None for one that will be skipped, as far as that shows."""
    if record.problem:
        return None
    try:
        size = upright_size(read_patiently(source, record))
    except OSError as error:
        refuse_passing(record, error)
        return None
    except ValueError:
        return None
    return None if min(size) < min_size or max(size) > MAX_ASPECT * min(size) else size


def refuse_passing(record: Record, error: OSError) -> None:
    """Raise UserError if an image could not be read for a reason that may pass."""
    if may_pass(error):
        raise UserError(
            f"{one_line(record.source_id)} cannot be read: {reason_of(error)}. Nothing is skipped for that. Rerun "
            "the same command to go on; if it fails at this image again, remove it from the input."
        ) from None


def may_pass(error: OSError) -> bool:
    """Whether an error is of the disk or the network, and says nothing of the image."""
    return error.errno is not None and error.errno not in OF_THE_IMAGE


def read_patiently(source: OpenSource, record: Record) -> bytes:
    """The encoded image. A failure of the disk or the network is tried again, twice."""
    for pause in PAUSES:
        try:
            return source.read(record)
        except OSError as error:
            if not may_pass(error):
                raise
            time.sleep(pause)
    return source.read(record)


def without_skipped(
    loaded: Iterable[LoadedImage], skipped: list[dict[str, str]], allowed: float, advance: Callable[[int], Any]
) -> Iterator[LoadedImage]:
    """Yield the images that have pixels, and append the others to `skipped`.

    `advance(1)` is called for each skipped image. Raises UserError once there are more than `allowed` of them, of at
    least FEW images unless none is allowed: a share of fewer says nothing.
    """
    for seen, item in enumerate(loaded, 1):
        if item.problem is None:
            yield item
            continue
        skipped.append({"source_id": item.record.source_id, "reason": item.problem})
        advance(1)
        if len(skipped) > allowed and (seen >= FEW or not allowed):
            examples = "".join(f"\n  {one_line(skip['source_id'])}: {one_line(skip['reason'])}" for skip in skipped[:3])
            raise UserError(
                f"{len(skipped)} of the first {seen} images of a shard cannot be used, more than --max-skipped "
                f"allows. The first ones:{examples}\nFix the input or raise --max-skipped."
            )

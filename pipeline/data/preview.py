"""What a user should see of the input before a long run: captions as they are read, and sizes of images."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.core.buckets import aspect_distance, nearest
from pipeline.data.files import reason_of
from pipeline.data.images import open_image
from pipeline.data.records import Record
from pipeline.data.source import OpenSource
from pipeline.system.echo import one_line, plural, printable

CAPTIONS, LOOKED_AT = 3, 200
CAPTION_LENGTH = 100


def preview(
    source: OpenSource, resolution: int, min_size: int, buckets: Sequence[tuple[int, int]] | None = None
) -> list[str]:
    """Three captions; and of LOOKED_AT images, spread over all, how many cannot be read, are too small, enlarged, or
    much cropped. Each is cut to the nearest of the `buckets` (height, width), or to a square."""
    usable = [record for record in source.records if record.problem is None]
    lines = [f"caption of {one_line(record.source_id)}: {_caption(record)}" for record in _spread(usable, CAPTIONS)]
    sizes, unreadable = [], []
    for record in _spread(usable, LOOKED_AT):
        try:
            sizes.append(open_image(source.read(record)).size)
        except OSError as error:
            unreadable.append(one_line(f"{record.source_id}: {reason_of(error)}"))
        except ValueError as error:
            unreadable.append(one_line(f"{record.source_id}: {error}"))
    looked_at = f"of {plural(len(sizes) + len(unreadable), 'image')} looked at"
    if unreadable:
        lines.append(
            f"note: {len(unreadable)} {looked_at} cannot be read and will be skipped. The first is {unreadable[0]}"
        )
    kept = [size for size in sizes if min(size) >= min_size]
    if len(kept) < len(sizes):
        lines.append(f"note: {len(sizes) - len(kept)} {looked_at} have a side under {min_size} px and are skipped")
    if buckets is not None:
        return lines + _of_buckets(kept, buckets, looked_at)
    small = sum(min(size) < resolution for size in kept)
    if small and small == len(kept):
        lines.append(
            f"note: all images looked at have a side under {resolution} px and are enlarged; the shorter side of the "
            f"largest has {max(map(min, kept))} px. Give a smaller --resolution to leave them as they are"
        )
    elif small:
        lines.append(
            f"note: {small} {looked_at} have a side under {resolution} px and are enlarged. "
            f"--min-size {resolution} skips them"
        )
    if cropped := sum(2 * max(size) > 3 * min(size) for size in kept):
        lines.append(f"note: {cropped} {looked_at} lose more than a third to the square crop")
    return lines


def _of_buckets(images: list[tuple[int, int]], buckets: Sequence[tuple[int, int]], looked_at: str) -> list[str]:
    """How many of the images, (width, height), are enlarged or much cropped to fit their buckets."""
    fitted = [((height, width), buckets[nearest((height, width), buckets)]) for width, height in images]
    lines = []
    if small := sum(image[0] < size[0] or image[1] < size[1] for image, size in fitted):
        lines.append(f"note: {small} {looked_at} are smaller than their bucket and are enlarged")
    if cropped := sum(aspect_distance(image, size) > 1.5 for image, size in fitted):
        lines.append(f"note: {cropped} {looked_at} lose more than a third to the crop")
    return lines


def _spread(records: list[Record], count: int) -> list[Record]:
    """So many of the records, evenly spread over them."""
    count = min(count, len(records))
    return [records[i * len(records) // count] for i in range(count)]


def _caption(record: Record) -> str:
    caption = record.caption
    return printable(repr(caption if len(caption) <= CAPTION_LENGTH else caption[:CAPTION_LENGTH] + "..."))

"""What a user should see of the input before a long run: captions as they are read, and sizes of images."""

from __future__ import annotations

from pipeline.data.images import open_image
from pipeline.data.records import Record
from pipeline.data.source import OpenSource
from pipeline.system.echo import printable

CAPTIONS, LOOKED_AT = 3, 200
CAPTION_LENGTH = 100


def preview(source: OpenSource, resolution: int, min_size: int) -> list[str]:
    """Three captions; and of LOOKED_AT images, spread over all, how many are too small, enlarged, or much cropped."""
    usable = [record for record in source.records if record.problem is None]
    lines = [f"caption of {printable(record.source_id)}: {_caption(record)}" for record in _spread(usable, CAPTIONS)]
    sizes = [size for record in _spread(usable, LOOKED_AT) if (size := _size(source, record))]
    looked_at = f"of {len(sizes)} images looked at"
    kept = [size for size in sizes if min(size) >= min_size]
    if len(kept) < len(sizes):
        lines.append(f"note: {len(sizes) - len(kept)} {looked_at} have a side under {min_size} px and are skipped")
    if small := sum(min(size) < resolution for size in kept):
        lines.append(
            f"note: {small} {looked_at} have a side under {resolution} px and are enlarged. "
            f"--min-size {resolution} skips them"
        )
    if cropped := sum(2 * max(size) > 3 * min(size) for size in kept):
        lines.append(f"note: {cropped} {looked_at} lose more than a third to the square crop")
    return lines


def _spread(records: list[Record], count: int) -> list[Record]:
    """So many of the records, evenly spread over them."""
    count = min(count, len(records))
    return [records[i * len(records) // count] for i in range(count)]


def _caption(record: Record) -> str:
    caption = record.caption
    return printable(repr(caption if len(caption) <= CAPTION_LENGTH else caption[:CAPTION_LENGTH] + "..."))


def _size(source: OpenSource, record: Record) -> tuple[int, int] | None:
    """(width, height) of an image from its header; None if it cannot be read, which `encode` will say."""
    try:
        return open_image(source.read(record)).size
    except (OSError, ValueError):
        return None

"""Images in a table: a parquet or arrow file with their bytes, or a dataset of Hugging Face `datasets`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.data.records import ListedImage
from pipeline.data.settings import DataSettings
from pipeline.system.errors import UserError, first_line

BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
# The files by which to know a folder that `save_to_disk` wrote, for one dataset and for several splits.
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
# Columns that may hold an image's name when the image itself has no path.
NAME_COLUMNS = ("file_name", "key", "__key__")


class Table:
    """The images of a dataset, in the order of its rows.

    An image's name is its file name if the image has a path, else the value of a column `file_name`, `key` or
    `__key__`, else the row number. The table is memory-mapped, so reading a row reads only that row.
    Raises UserError if the dataset or one of its columns does not exist.
    """

    def __init__(self, dataset: Any, settings: DataSettings, may_read_paths: bool) -> None:
        """`may_read_paths`: whether to read image files by paths in the table; never for a table from elsewhere."""
        self.image_column = settings.image_column or "image"
        self.caption_column = settings.caption_column or "text"
        for column, flag in ((self.image_column, "--image-column"), (self.caption_column, "--caption-column")):
            if column not in dataset.column_names:
                raise UserError(
                    f"--data {settings.data} has no column {column!r}. It has "
                    f"{', '.join(map(repr, dataset.column_names))}: choose one with {flag}."
                )
        self.dataset = _undecoded(dataset, self.image_column, settings)
        self.may_read_paths = may_read_paths

    def images(self) -> list[ListedImage]:
        captions = self.dataset.data.column(self.caption_column).to_pylist()
        names = _names(self.dataset, self.image_column)
        return [
            ListedImage(name, row, caption) for row, (name, caption) in enumerate(zip(names, captions, strict=True))
        ]

    @classmethod
    def of_files(cls, tables: list[Path], settings: DataSettings) -> Table:
        files = [str(path.resolve()) for path in tables]
        load_dataset = _datasets(settings).load_dataset
        builder = BUILDERS[tables[0].suffix]
        dataset = _opened(settings, lambda: load_dataset(builder, data_files=files, split="train"))
        return cls(dataset, settings, may_read_paths=False)

    @classmethod
    def of_saved(cls, folder: Path, settings: DataSettings) -> Table:
        dataset = _opened(settings, lambda: _datasets(settings).load_from_disk(folder))
        if isinstance(dataset, dict):
            if settings.split not in dataset:
                raise UserError(
                    f"--data {folder} has no split {settings.split!r}. It has "
                    f"{', '.join(map(repr, dataset))}: choose one with --split."
                )
            dataset = dataset[settings.split]
        return cls(dataset, settings, may_read_paths=True)

    @classmethod
    def of_hub(cls, settings: DataSettings) -> Table:
        if settings.data.startswith((".", "/", "~")) or settings.data.count("/") > 1:
            raise UserError(f"--data {settings.data} does not exist")
        load_dataset = _datasets(settings).load_dataset
        chosen = {"split": settings.split, "revision": settings.dataset_revision}
        dataset = _opened(
            settings,
            lambda: load_dataset(settings.data, settings.dataset_config_name, **chosen),
            "does not exist and cannot be read as a dataset from the hub",
        )
        return cls(dataset, settings, may_read_paths=True)

    def read(self, row: int) -> bytes:
        image = self.dataset[row][self.image_column]
        if isinstance(image, bytes):
            return image
        data, path = (image or {}).get("bytes"), (image or {}).get("path")
        if data is not None:
            return data
        if path is None:
            raise OSError("the row has no image")
        if not self.may_read_paths:
            raise OSError(f"the row has a path ({path}), not the image's bytes")
        return Path(path).read_bytes()


def is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (SAVED, SAVED_SPLITS))


def tables_in(data: Path) -> list[Path]:
    """`data` itself if it is a parquet or arrow file, else the files of one of these kinds in it."""
    if data.suffix in BUILDERS and data.is_file():
        return [data]
    candidates = (sorted(data.glob(f"*{suffix}")) for suffix in BUILDERS)
    return next((tables for tables in candidates if tables), []) if data.is_dir() else []


def _datasets(settings: DataSettings) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"--data {settings.data} is neither a folder of images nor a tar. "
            "To read tables and datasets, install the library: pip install 'distill-sd[datasets]'"
        ) from None
    return datasets


def _opened(
    settings: DataSettings, open_dataset: Callable[[], Any], problem: str = "cannot be read as a dataset"
) -> Any:
    try:
        return open_dataset()
    # The library raises its own errors, the hub's and the file formats'.
    except Exception as error:
        raise UserError(f"--data {settings.data} {problem}: {first_line(error)}") from None


def _undecoded(dataset: Any, column: str, settings: DataSettings) -> Any:
    """The dataset with its images as bytes or paths, and without an index mapping, so that row i is stored row i."""
    datasets = _datasets(settings)
    feature = dataset.features[column]
    if isinstance(feature, datasets.Image):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    elif getattr(feature, "dtype", None) not in ("binary", "large_binary") and not (
        isinstance(feature, dict) and "bytes" in feature
    ):
        raise UserError(
            f"--data {settings.data}: column {column!r} holds {feature}, not images. "
            "Choose another one with --image-column."
        )
    return dataset.flatten_indices() if dataset._indices is not None else dataset


def _names(dataset: Any, image_column: str) -> list[str]:
    column = next((name for name in NAME_COLUMNS if name in dataset.column_names), None)
    named = dataset.data.column(column).to_pylist() if column else [None] * len(dataset)
    images, paths = dataset.data.column(image_column), [None] * len(dataset)
    if getattr(images.type, "num_fields", 0):
        paths = [path for chunk in images.chunks for path in chunk.field("path").to_pylist()]
    return [
        os.path.basename(path) if path else str(name) if name is not None else f"{row:09d}"
        for row, (path, name) in enumerate(zip(paths, named, strict=True))
    ]

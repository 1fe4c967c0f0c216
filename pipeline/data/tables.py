"""Pictures in a table: a parquet or arrow file with their bytes, or a dataset of Hugging Face `datasets`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.data.records import ListedImage
from pipeline.data.settings import DataSettings
from pipeline.system.errors import UserError

BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
# What `save_to_disk` leaves in the folder of a dataset, and of several splits.
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
# The columns that may hold a picture's name when the image itself does not.
NAME_COLUMNS = ("file_name", "key", "__key__")


class Table:
    """The pictures of a dataset, in the order of its rows.

    A picture's name is its file's where the image holds a path, else what stands in a column `file_name`, `key` or
    `__key__`, else the number of its row. The table is mapped into memory, so a row costs what it holds.
    Raises UserError for a dataset that is not there, and for columns that are not.
    """

    def __init__(self, dataset: Any, settings: DataSettings, paths_are_its_own: bool) -> None:
        """`paths_are_its_own`: whether images may be files whose paths the table holds; those of strangers may not."""
        self.image_column = settings.image_column or "image"
        self.caption_column = settings.caption_column or "text"
        for column, flag in ((self.image_column, "--image-column"), (self.caption_column, "--caption-column")):
            if column not in dataset.column_names:
                raise UserError(
                    f"--data {settings.data} has no column {column!r}; it has "
                    f"{', '.join(map(repr, dataset.column_names))}: choose one with {flag}"
                )
        self.dataset = _undecoded(dataset, self.image_column, settings)
        self.paths_are_its_own = paths_are_its_own

    def pictures(self) -> list[ListedImage]:
        captions = self.dataset.data.column(self.caption_column).to_pylist()
        names = _names(self.dataset, self.image_column)
        return [
            ListedImage(name, row, caption) for row, (name, caption) in enumerate(zip(names, captions, strict=True))
        ]

    @classmethod
    def of_files(cls, tables: list[Path], settings: DataSettings) -> Table:
        files = [str(path.resolve()) for path in tables]
        load = _datasets(settings).load_dataset
        builder = BUILDERS[tables[0].suffix]
        return cls(_loaded(settings, lambda: load(builder, data_files=files, split="train")), settings, False)

    @classmethod
    def of_saved(cls, folder: Path, settings: DataSettings) -> Table:
        dataset = _loaded(settings, lambda: _datasets(settings).load_from_disk(folder))
        if isinstance(dataset, dict):
            if settings.split not in dataset:
                raise UserError(
                    f"--data {folder} has no split {settings.split!r}; it has "
                    f"{', '.join(map(repr, dataset))}: choose one with --split"
                )
            dataset = dataset[settings.split]
        return cls(dataset, settings, True)

    @classmethod
    def of_hub(cls, settings: DataSettings) -> Table:
        if settings.data.startswith((".", "/", "~")) or settings.data.count("/") > 1:
            raise UserError(f"--data {settings.data} does not exist")
        load = _datasets(settings).load_dataset
        chosen = {"split": settings.split, "revision": settings.dataset_revision}
        dataset = _loaded(
            settings,
            lambda: load(settings.data, settings.dataset_config_name, **chosen),
            "does not exist here, and no hub gave it as a dataset",
        )
        return cls(dataset, settings, True)

    def read(self, row: int) -> bytes:
        image = self.dataset[row][self.image_column]
        if isinstance(image, bytes):
            return image
        data, path = (image or {}).get("bytes"), (image or {}).get("path")
        if data is not None:
            return data
        if path is None:
            raise OSError("there is no image in the row")
        if not self.paths_are_its_own:
            raise OSError(f"the row holds a path ({path}), not the image's bytes")
        return Path(path).read_bytes()


def is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (SAVED, SAVED_SPLITS))


def tables_in(data: Path) -> list[Path]:
    """The parquet or arrow files that `data` is or holds, of one kind."""
    if data.suffix in BUILDERS and data.is_file():
        return [data]
    found = (sorted(data.glob(f"*{suffix}")) for suffix in BUILDERS)
    return next((tables for tables in found if tables), []) if data.is_dir() else []


def _datasets(settings: DataSettings) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"--data {settings.data} is no folder of images and no tar; to read tables and datasets, "
            "install the library: pip install 'distill-sd[datasets]'"
        ) from None
    return datasets


def _loaded(settings: DataSettings, load: Callable[[], Any], failure: str = "cannot be read as a dataset") -> Any:
    try:
        return load()
    # The library raises errors of many kinds, its own, the hub's and the file formats'.
    except Exception as error:
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"--data {settings.data} {failure}: {told[0]}") from None


def _undecoded(dataset: Any, column: str, settings: DataSettings) -> Any:
    """The dataset with its images as bytes or paths, and its rows where they lie."""
    datasets = _datasets(settings)
    feature = dataset.features[column]
    if isinstance(feature, datasets.Image):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    elif getattr(feature, "dtype", None) not in ("binary", "large_binary") and not (
        isinstance(feature, dict) and "bytes" in feature
    ):
        raise UserError(
            f"--data {settings.data}: column {column!r} holds {feature}, no images: choose another with --image-column"
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

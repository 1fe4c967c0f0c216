"""Images in a table: a parquet or arrow file with their bytes, or a dataset of Hugging Face `datasets`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pipeline.data.fields import field
from pipeline.data.files import MAX_IMAGE_BYTES, FileState, files_in, refuse_special, state_of
from pipeline.data.records import ListedImage
from pipeline.settings.data import DataSettings
from pipeline.system.errors import UserError, first_line
from pipeline.system.extras import install_command
from shards.regular import read_regular

BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
# The files by which to know a folder that `save_to_disk` wrote, for one dataset and for several splits.
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
# Columns that may hold an image's name when the image itself has no path.
NAME_COLUMNS = ("file_name", "key", "__key__")
# A small parquet file that unfolds to more than a gigabyte, and to a thousand times its own size, is an attack.
SMALL_BYTES, MAX_UNFOLDED_BYTES, MAX_RATIO = 1 << 26, 1 << 30, 1000
HUB_TIMEOUT = 10


class Table:
    """The images of a dataset, in the order of its rows.

    An image's name is its file name if the image has a path, else the value of a column `file_name`, `key` or
    `__key__`, else the row number. The table is memory-mapped, so reading a row reads only that row.
    Raises UserError if the dataset or one of its columns does not exist.
    """

    def __init__(self, dataset: Any, settings: DataSettings, may_read_paths: bool, files: Iterable[Path] = ()) -> None:
        """`may_read_paths`: whether to read image files by paths in the table; never for a table from elsewhere.
        `files` hold the table, as far as they are known."""
        self.image_column = settings.image_column or "image"
        self.caption_column = settings.caption_column or "text"
        # Of nested columns, `column.field` leads to the captions.
        top = self.caption_column.partition(".")[0]
        self.outer = self.caption_column if self.caption_column in dataset.column_names else top
        for column, flag in ((self.image_column, "--image-column"), (self.outer, "--caption-column")):
            if column not in dataset.column_names:
                raise UserError(
                    f"--data {settings.data} has no column {column!r}. It has "
                    f"{', '.join(map(repr, dataset.column_names))}: choose one with {flag}."
                )
        fields = dataset.features[self.outer]
        if isinstance(fields, dict) and self.outer == self.caption_column:
            raise UserError(
                f"--data {settings.data}: column {self.outer!r} holds several fields, not one caption. Choose one: "
                f"{', '.join(f'--caption-column {self.outer}.{name}' for name in fields)}."
            )
        self.dataset = _undecoded(dataset, self.image_column, settings)
        self.rows = self.dataset.select_columns([self.image_column])
        self.may_read_paths = may_read_paths
        self.modified = max((state_of(file).modified or 0 for file in files), default=None)
        self.data = settings.data

    def images(self) -> list[ListedImage]:
        images = self.dataset.data.column(self.image_column)
        try:
            paths = _values(images, "path")
            outer = self.dataset.data.column(self.outer).to_pylist()
            captions = [field({self.outer: value}, self.caption_column) for value in outer]
            names = _names(self.dataset, paths)
        except UnicodeDecodeError as error:
            raise UserError(f"--data {self.data} holds text that is not UTF-8 ({error}). Write it again.") from None
        in_table = [FileState(size, self.modified) for size in _sizes(images)]
        states = [
            state_of(Path(path)) if state.size is None and self.may_read_paths and isinstance(path, str) else state
            for state, path in zip(in_table, paths, strict=True)
        ]
        return [
            ListedImage(name, row, caption, None, *state)
            for row, (name, caption, state) in enumerate(zip(names, captions, states, strict=True))
        ]

    @classmethod
    def of_files(cls, tables: list[Path], settings: DataSettings) -> Table:
        load_dataset = _datasets(settings).load_dataset
        for table in tables:
            _refuse_bomb(table)
        # The library fails for a file without rows.
        files = [str(path.resolve()) for path in tables if _has_rows(path)]
        if not files:
            raise UserError(f"--data {settings.data} has no rows. Give a table with images and captions.")
        builder = BUILDERS[tables[0].suffix]
        dataset = _opened(settings, lambda: load_dataset(builder, data_files=files, split="train"))
        return cls(dataset, settings, may_read_paths=False, files=tables)

    @classmethod
    def of_saved(cls, folder: Path, settings: DataSettings) -> Table:
        files = list(folder.rglob("*"))
        for path in files:
            refuse_special(path)
        dataset = _opened(settings, lambda: _datasets(settings).load_from_disk(folder))
        if isinstance(dataset, dict):
            if settings.split not in dataset:
                raise UserError(
                    f"--data {folder} has no split {settings.split!r}. It has "
                    f"{', '.join(map(repr, dataset))}: choose one with --split."
                )
            dataset = dataset[settings.split]
        return cls(dataset, settings, may_read_paths=True, files=files)

    @classmethod
    def of_hub(cls, settings: DataSettings) -> Table:
        if settings.data.startswith((".", "/", "~")) or settings.data.count("/") > 1:
            raise UserError(f"--data {settings.data} does not exist. Check the path.")
        load_dataset = _datasets(settings).load_dataset
        _ask_hub(settings)
        chosen = {"split": settings.split, "revision": settings.dataset_revision}
        dataset = _opened(
            settings,
            lambda: load_dataset(settings.data, settings.dataset_config_name, **chosen),
            "does not exist and cannot be read as a dataset from the hub",
        )
        return cls(dataset, settings, may_read_paths=True)

    def read(self, row: int) -> bytes:
        image = self.rows[row][self.image_column]
        data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
        if data is not None:
            if not isinstance(data, bytes):
                raise OSError(f"the row has {type(data).__name__} in place of the image's bytes")
            if len(data) > MAX_IMAGE_BYTES:
                raise OSError(f"the image has {len(data)} bytes, more than {MAX_IMAGE_BYTES}")
            return data
        if not isinstance(path, str):
            raise OSError("the row has no image" if path is None else f"the row has the path {path!r:.80}")
        if not self.may_read_paths:
            raise OSError(f"the row has a path ({path}), not the image's bytes")
        return read_regular(Path(path), MAX_IMAGE_BYTES)


def is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (SAVED, SAVED_SPLITS))


def tables_in(data: Path) -> list[Path]:
    """`data` itself if it is a parquet or arrow file, else the files of one of these kinds in it."""
    if data.suffix in BUILDERS and data.is_file():
        return [data]
    candidates = (files_in(data, suffix) for suffix in BUILDERS)
    return next((tables for tables in candidates if tables), []) if data.is_dir() else []


def _datasets(settings: DataSettings) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"--data {settings.data} is neither a folder of images nor a tar. "
            f"To read tables and datasets, install the library: {install_command('datasets')}"
        ) from None
    return datasets


def _opened(
    settings: DataSettings, open_dataset: Callable[[], Any], problem: str = "cannot be read as a dataset"
) -> Any:
    try:
        return open_dataset()
    # The library raises its own errors, the hub's and the file formats'.
    except Exception as error:
        # What it says itself is "An error occurred"; the file's own error is the cause.
        raise UserError(f"--data {settings.data} {problem}: {first_line(error.__cause__ or error)}") from None


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


def _field(images: Any, name: str) -> Any:
    """A field of the image structs as a column, null where the struct is. None without such a field."""
    import pyarrow.compute

    index = images.type.get_field_index(name) if pyarrow.types.is_struct(images.type) else -1
    return pyarrow.compute.struct_field(images, index) if index >= 0 else None


def _values(images: Any, name: str) -> list[Any]:
    field = _field(images, name)
    return [None] * len(images) if field is None else field.to_pylist()


def _sizes(images: Any) -> list[int | None]:
    """The lengths of the encoded images, without reading them. None where there are no bytes."""
    import pyarrow.compute

    field = _field(images, "bytes")
    data = images if field is None else field
    measurable = pyarrow.types.is_binary(data.type) or pyarrow.types.is_large_binary(data.type)
    return pyarrow.compute.binary_length(data).to_pylist() if measurable else [None] * len(images)


def _names(dataset: Any, paths: list[Any]) -> list[str]:
    column = next((name for name in NAME_COLUMNS if name in dataset.column_names), None)
    named = dataset.data.column(column).to_pylist() if column else [None] * len(dataset)
    return [
        os.path.basename(path) if path and isinstance(path, str) else str(name) if name is not None else f"{row:09d}"
        for row, (path, name) in enumerate(zip(paths, named, strict=True))
    ]


def _has_rows(table: Path) -> bool:
    """Whether a table has rows. A file that cannot be read counts, since the library says what is wrong with it."""
    import pyarrow
    import pyarrow.parquet

    try:
        if table.suffix == ".parquet":
            return pyarrow.parquet.read_metadata(table).num_rows > 0
        with pyarrow.memory_map(str(table)) as source:
            return any(batch.num_rows for batch in pyarrow.ipc.open_stream(source))
    except (pyarrow.ArrowException, OSError, ValueError):
        return True


def _refuse_bomb(table: Path) -> None:
    """Raise UserError for a small parquet file that repeats a long value until it fills the disk."""
    import pyarrow
    import pyarrow.parquet

    size = table.stat().st_size
    if table.suffix != ".parquet" or size > SMALL_BYTES:
        return
    try:
        unfolded = _unfolded_bytes(table)
    # A damaged file is reported when the library opens it.
    except (pyarrow.ArrowException, OSError, ValueError):
        return
    if unfolded > max(MAX_UNFOLDED_BYTES, size * MAX_RATIO):
        raise UserError(
            f"--data {table} has {size} bytes and unfolds to {unfolded}. Is it what it should be? "
            "If so, store its images and captions in another form."
        )


def _unfolded_bytes(table: Path) -> int:
    """The bytes of a parquet file's values. Repeated values are counted from their dictionary, not unfolded."""
    import pyarrow.compute
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(table) as plain:
        metadata = plain.metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        stated = sum(group.column(i).total_uncompressed_size for group in groups for i in range(group.num_columns))
        columns = [plain.schema.column(i).path for i in range(len(plain.schema))]
    if stated > MAX_UNFOLDED_BYTES:
        return stated
    unfolded = 0
    with pyarrow.parquet.ParquetFile(table, read_dictionary=columns) as file:
        for batch in file.iter_batches(batch_size=1024):
            arrays = list(batch.columns)
            while arrays:
                array = arrays.pop()
                if pyarrow.types.is_struct(array.type):
                    arrays += array.flatten()
                elif pyarrow.types.is_list(array.type):
                    arrays.append(array.flatten())
                elif pyarrow.types.is_dictionary(array.type):
                    lengths = pyarrow.compute.binary_length(array.dictionary)
                    unfolded += pyarrow.compute.sum(lengths.take(array.indices)).as_py() or 0
    return unfolded


def _ask_hub(settings: DataSettings) -> None:
    """Raise UserError if the hub does not know the dataset, after one question; the library would ask many times."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE or _datasets(settings).config.HF_HUB_OFFLINE:
        return
    try:
        HfApi().dataset_info(settings.data, revision=settings.dataset_revision, timeout=HUB_TIMEOUT)
    # The hub raises errors of its own, of its HTTP library, and for names that cannot be.
    except Exception as error:
        raise UserError(
            f"--data {settings.data} does not exist and cannot be read as a dataset from the hub: {first_line(error)}. "
            "Check the path or the name. Set HF_HUB_OFFLINE=1 to use a dataset that was downloaded before."
        ) from None

"""Parquet files with images in them, as Hugging Face's `datasets` writes them."""

import io
import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import InputError
from data_prep.sources.encoded import FileSource
from data_prep.sources.listed import Listed, listed_images

LARGEST_GROUP = 1 << 31
"""Bytes of images in a row group, which each worker holds one of."""
IMAGE_COLUMNS = ("image", "img", "jpg", "png")
LABEL_COLUMNS = ("label", "fine_label", "labels", "class", "target")


@dataclass(frozen=True)
class Rows:
    """Images in rows of parquet files; `encoded.Storage`.

    Attributes:
        files: their paths.
        where: int64 [N, 3], of each image its file's place in `files`, its row group, and its row in this.
        column: of the encoded images, with dots: `image.bytes`.
    """

    files: list[str]
    where: NDArray[np.int64]
    column: str

    def open(self, index: int) -> IO[bytes]:
        """The content of an image; of rows in their order, a row group is read once."""
        file, group, row = self.where[index].tolist()
        content: Any = _row_group(self.files[file], group, self.column)[row].as_py()
        for name in self.column.split(".")[1:]:
            content = content and content[name]
        if content is None:
            raise InputError("no image in this row: embed the images before they are saved, or leave it out")
        return io.BytesIO(content)

    def name(self, index: int) -> str:
        """What messages call an image."""
        file, group, row = self.where[index].tolist()
        return f"{self.files[file]}: row group {group}, row {row}"


@lru_cache(maxsize=1)
def _row_group(path: str, group: int, column: str) -> Any:
    from pyarrow.parquet import ParquetFile

    # Threads of its own do not survive the fork into workers.
    with ParquetFile(path) as file:
        return file.read_row_group(group, [column], use_threads=False).column(0)


def parquet(root: Path, train: bool) -> FileSource:
    """The images of the parquet file `root`, or of those in that folder, row by row.

    They are the column of Hugging Face's type Image or one named image; labels, that of type ClassLabel or one named
    label or fine_label.

    Raises:
        InputError: no pyarrow, a damaged file, or what it lacks.
    """
    return listed_images(root, ".parquet", train, _read)


class Columns(NamedTuple):
    """Of the encoded images, of their file names, if these are kept, and of the labels; and the classes' names."""

    image: str
    path: str | None
    label: str | None
    classes: list[str] | None


@cache  # the training images are asked for again, for the classes of the test images
def _read(files: tuple[Path, ...]) -> Listed:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError:
        raise InputError("--dataset parquet needs pyarrow: pip install 'ckd_dist[parquet]'") from None
    names: list[str] = []
    labels: list[int | str | None] = []
    where = [np.empty((0, 3), np.int64)]
    first: Columns | None = None
    for number, path in enumerate(files):
        try:
            with ParquetFile(path) as file:
                columns = _columns(file.schema_arrow, path)
                first = first or columns
                if columns != first:
                    raise InputError(f"{path}: other columns or classes than {files[0]}: write them alike")
                _require_small_groups(file, path, columns.image)
                where += _places(file, number)
                count = file.metadata.num_rows
                labels += _values(file, columns.label) or [None] * count
                paths = _values(file, columns.path) or [None] * count
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{path}: not a parquet file that can be read ({error}): get it anew") from error
        names += [str(name or f"{path.name}, row {row}") for row, name in enumerate(paths)]
    assert first is not None
    rows = Rows([str(path) for path in files], np.concatenate(where), first.image)
    return Listed(rows, names, labels, Counter(), first.classes)


def _columns(schema: Any, path: Path) -> Columns:
    import pyarrow

    features: dict[str, Any] = {}
    if told := (schema.metadata or {}).get(b"huggingface"):
        try:
            features = json.loads(told)["info"]["features"]
        except (ValueError, KeyError, TypeError):  # as good as none
            features = {}
    types = {name: each.get("_type") for name, each in features.items() if isinstance(each, dict)}
    image = _one(path, "images", schema, IMAGE_COLUMNS, [name for name in types if types[name] == "Image"])
    if image is None:
        raise InputError(f"{path}: no column of images among {', '.join(schema.names)}: name it image")
    label = _one(path, "labels", schema, LABEL_COLUMNS, [name for name in types if types[name] == "ClassLabel"])
    classes = features.get(label, {}).get("names") if label else None
    if label and not re.fullmatch("u?int[0-9]+|(large_)?string|null", str(schema.field(label).type)):
        raise InputError(
            f"{path}: its column {label} holds {schema.field(label).type}, not numbers or names of classes"
        )
    kind = schema.field(image).type
    if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        named = kind.get_field_index("path") >= 0
        return Columns(f"{image}.bytes", f"{image}.path" if named else None, label, classes)
    if pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
        return Columns(image, None, label, classes)
    raise InputError(f"{path}: its column {image} holds {kind}, not encoded images: save them as bytes")


def _one(path: Path, what: str, schema: Any, usual: tuple[str, ...], typed: list[str]) -> str | None:
    """The column of `what`: of its type or, where there are none or several of it, of a usual name."""
    candidates = [name for name in schema.names if name in typed] or schema.names
    if len(typed) == 1:
        return typed[0]
    if found := next((name for name in usual if name in candidates), None):
        return found
    if typed:
        raise InputError(f"{path}: several columns of {what} ({', '.join(typed)}): name the one to use {usual[0]}")
    return None


def _require_small_groups(file: Any, path: Path, column: str) -> None:
    """Raise `InputError` where a row group holds more than a worker should."""
    for group in range(file.metadata.num_row_groups):
        held = file.metadata.row_group(group)
        for place in range(held.num_columns):
            chunk = held.column(place)
            if chunk.path_in_schema == column and chunk.total_uncompressed_size > LARGEST_GROUP:
                raise InputError(
                    f"{path}: a row group of {chunk.total_uncompressed_size / 1e9:.1f} GB, of which each worker would "
                    "hold one: write it anew with row_group_size=100"
                )


def _places(file: Any, number: int) -> list[NDArray[np.int64]]:
    """For each row group int64 [rows, 3]: see `Rows`."""
    places = []
    for group in range(file.metadata.num_row_groups):
        rows = np.arange(file.metadata.row_group(group).num_rows)
        places.append(np.stack([np.full_like(rows, number), np.full_like(rows, group), rows], axis=1))
    return places


def _values(file: Any, column: str | None) -> list[Any] | None:
    """What a column holds, where there is one."""
    if column is None:
        return None
    values = file.read([column], use_threads=False).column(0).to_pylist()
    for name in column.split(".")[1:]:
        values = [each and each[name] for each in values]
    return values

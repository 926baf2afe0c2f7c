"""A CSV table of image files and their labels."""

import csv
import io
import os
from collections import Counter
from functools import cache, partial
from pathlib import Path

from data_prep.errors import InputError
from data_prep.sources.encoded import FileSource
from data_prep.sources.files import Paths, first_links, regular
from data_prep.sources.listed import Listed, listed_images
from data_prep.sources.pictures import left_out_as

PATH_COLUMNS = ("path", "image", "image_path", "file", "file_name", "filename", "filepath")
LABEL_COLUMNS = ("label", "class", "target", "class_name", "label_name")


def csv_table(root: Path, train: bool) -> FileSource:
    """The images that the table `root`, or train.csv and test.csv in the folder `root`, list, in their order.

    A row is a path, from the table's folder on, and a label, the name or the number of a class. A first row of names,
    such as `path,label`, says which columns these are, else they are the first two.

    Raises:
        InputError: what a table lacks.
    """
    return listed_images(root, ".csv", train, _read)


@cache  # the training images are asked for again, for the classes of the test images
def _read(tables: tuple[Path, ...]) -> Listed:
    paths: list[str] = []
    names: list[str] = []
    labels: list[int | str | None] = []
    left_out: Counter[str] = Counter()
    for table in tables:
        for name, label in _rows(table):
            path = os.path.join(table.parent, os.fsdecode(name.encode()))
            if kind := left_out_as(path, partial(regular, path)):
                left_out[kind] += 1
                continue
            paths.append(path)
            names.append(os.fsdecode(name.encode()))
            labels.append(os.fsdecode(label.encode()) or None)
    if missing := [path for path in paths if not os.path.exists(path)]:
        raise InputError(
            f"{tables[0]}: {len(missing):,} of the {len(paths):,} images listed are not there, first {missing[0]}: "
            "correct their paths, which count from the table's folder"
        )
    kept = first_links(paths, labels, left_out)
    return Listed(Paths([paths[i] for i in kept]), [names[i] for i in kept], [labels[i] for i in kept], left_out)


def _rows(table: Path) -> list[tuple[str, str]]:
    """(path, label) of each row."""
    try:
        text = table.read_text(encoding="utf-8-sig")
        head = text.partition("\n")[0]
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: not a CSV table that can be read ({error}): save it as CSV, in UTF-8") from error
    numbered = [(number, [cell.strip() for cell in row]) for number, row in enumerate(rows, start=1) if any(row)]
    first = [cell.lower() for cell in numbered[0][1]] if numbered else []
    columns = [
        next((first.index(name) for name in kind if name in first), -1) for kind in (PATH_COLUMNS, LABEL_COLUMNS)
    ]
    if -1 in columns:
        columns = [0, 1]
    else:
        numbered = numbered[1:]
    for number, row in numbered:
        if len(row) <= max(columns) or not row[columns[0]] or not row[columns[1]]:
            raise InputError(f"{table}: line {number} is no path and label ({','.join(row)!r}): correct or remove it")
    return [(row[columns[0]], row[columns[1]]) for _, row in numbered]

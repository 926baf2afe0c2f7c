"""results.csv, what a search leaves: a line for each student."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path

from ckd_dist.config import UserError, require
from ckd_dist.files import write_bytes_atomically

COLUMNS = {
    "student": str,
    "model": str,
    "teacher": str,
    "loss": str,
    "alpha": float,
    "temperature": float,
    "seed": int,
    "epochs": int,
    "val_top1": float,
    "val_top5": float,
    "val_loss": float,
    "train_seconds": float,
    "side_by_side": int,
    "chosen": int,
    "test_top1": float,
    "test_top5": float,
    "test_loss": float,
}
"""And their types; top-1 and top-5 in percent. `chosen` is 1 for students of their teacher's best setting; only these
have test figures. `train_seconds` are those of all the students that were trained side by side."""


def write_table(path: Path, rows: list[dict]) -> None:
    """Write results.csv, atomically; a figure that a row lacks is left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes_atomically(path, text.getvalue().encode())


def read_table(path: Path) -> list[dict]:
    """The rows of results.csv, None for what is empty; raises `UserError` where it is no such table."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        found = list(reader.fieldnames or [])
        require(
            found == list(COLUMNS),
            f"{path} is not a table of this version of ckd_dist.search: its columns are {', '.join(found)}",
        )
        try:
            return [{key: kind(row[key]) if row[key] else None for key, kind in COLUMNS.items()} for row in reader]
        except (ValueError, KeyError) as error:
            raise UserError(f"{path} is damaged ({error})") from None


def grouped(rows: Sequence[dict], *keys: str) -> list[tuple[tuple, list[dict]]]:
    """Rows with equal values of `keys`, in the order in which each group first appears."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(groups.items())


def mean_and_deviation(values: Sequence[float], sign: str = "") -> str:
    """As text, two digits; `sign` + shows that of positive means too. One value has no deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{deviation}"

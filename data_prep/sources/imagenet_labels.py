"""The classes of ImageNet's validation images, whose names do not tell them: from Kaggle's table or the devkit."""

import csv
import io
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

from data_prep.errors import InputError

KAGGLE = "LOC_val_solution.csv"
DEVKIT = "ILSVRC2012_devkit_t12"
WANTED = f"{KAGGLE} (Kaggle's) or {DEVKIT}.tar.gz (the organisers')"


class ValidationLabels(NamedTuple):
    """Name of a validation image, such as ILSVRC2012_val_00000001.JPEG -> WordNet id; and the file that says so."""

    wnids: dict[str, str]
    source: Path


def validation_labels(places: list[Path]) -> ValidationLabels | None:
    """From the first of the folders `places` that has Kaggle's table or the devkit, unpacked or not; None without.

    Raises:
        InputError: a damaged file.
    """
    for place in places:
        if (table := place / KAGGLE).is_file():
            return ValidationLabels(_from_kaggle(table), table)
        if (devkit := place / DEVKIT).is_dir():
            return ValidationLabels(_from_devkit(devkit, *(_read(devkit / "data" / name) for name in FILES)), devkit)
        if (archive := place / f"{DEVKIT}.tar.gz").is_file():
            return ValidationLabels(_from_devkit(archive, *_unpacked(archive)), archive)
    return None


def _from_kaggle(table: Path) -> dict[str, str]:
    """Of rows such as `ILSVRC2012_val_00048981,n03995372 85 1 499 272`, an id and the boxes, a class before each."""
    rows = list(csv.reader(io.StringIO(_text(table, _read(table)))))
    wnids = {}
    for row in rows[1:]:
        words = row[1].split() if len(row) == 2 else []
        if not words or not re.fullmatch(r"n\d+", words[0]):
            raise InputError(f"{table}: no image and class in the line {','.join(row)!r}: get it anew")
        wnids[f"{row[0]}.JPEG"] = words[0]
    if not wnids:
        raise InputError(f"{table}: names no image: get it anew")
    return wnids


FILES = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
"""In the devkit's folder data/: WordNet ids by number, and the number of each validation image's class."""


def _from_devkit(devkit: Path, meta: bytes, truth: bytes) -> dict[str, str]:
    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        wnid_of = dict(zip(synsets["ILSVRC2012_ID"].tolist(), synsets["WNID"].tolist(), strict=True))
        numbers = [int(line) for line in _text(devkit, truth).split()]
        return {f"ILSVRC2012_val_{i:08}.JPEG": wnid_of[number] for i, number in enumerate(numbers, start=1)}
    except InputError:
        raise
    except Exception as error:  # loadmat raises many kinds
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{devkit}: {' and '.join(FILES)} do not go together ({reason}): get it anew") from error


def _unpacked(archive: Path) -> list[bytes]:
    """The contents of `FILES` in the devkit as it is shipped."""
    found = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                if member.isreg() and (content := tar.extractfile(member)):
                    *_, folder, name = ["", "", *member.name.split("/")]
                    if folder == "data" and name in FILES:
                        found[name] = content.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{archive}: cannot be read ({error}): get it anew") from error
    if missing := [name for name in FILES if name not in found]:
        raise InputError(f"{archive}: no data/{missing[0]} in it: get it anew")
    return [found[name] for name in FILES]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: get it anew, or make it readable") from error


def _text(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file: get it anew") from error

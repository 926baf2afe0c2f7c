"""Images with labels as a table or shards list them: which files are of which part, and which classes labels mean.

A file is of the part that the last of the words train, val, validation and test in its path names. Where no path has
one, or one file is given, all images are one set, for training and for testing alike.
"""

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import InputError
from data_prep.sources.encoded import FileSource, Storage
from data_prep.sources.pictures import kinds, utf8_name

PART = re.compile(r"(?<![a-z])(?:(train|training)|(val|valid|validation|dev)|(test))(?![a-z])")
CLASS_FILES = ("classes.txt", "classnames.txt")
"""Beside the images: the name of each class on a line, in their order."""


@dataclass(frozen=True)
class Listed:
    """Images in the order in which they are listed.

    Attributes:
        storage: where they lie.
        names: N names, see `FileSource`.
        labels: N labels: the number of a class, or its name; None or -1: it has none.
        left_out: see `FileSource`.
        classes: names of the classes, where the files tell them.
    """

    storage: Storage
    names: list[str]
    labels: list[int | str | None]
    left_out: Counter[str]
    classes: list[str] | None = None

    @property
    def has_labels(self) -> bool:
        """Whether any image has one."""
        return any(label not in (None, -1) for label in self.labels)


def part_files(root: Path, suffix: str) -> dict[str, tuple[Path, ...]]:
    """The files of each part, "train", "validation" or "test", below `root`, or "all" of them; sorted by name."""
    if not root.is_dir():
        return {"all": (root,)}
    found: dict[str, list[Path]] = {}
    paths = [path for path in root.rglob(f"*{suffix}") if path.is_file()]
    for path in sorted(paths, key=os.fsencode):
        below = str(path.relative_to(root))
        if not any(name.startswith(".") for name in below.split("/")):
            words = list(PART.finditer(below.lower().removesuffix(suffix)))
            part = ("train", "validation", "test")[(words[-1].lastindex or 1) - 1] if words else "all"
            found.setdefault(part, []).append(path)
    if len(found) > 1:
        found.pop("all", None)
    return {part: tuple(files) for part, files in found.items()}


def listed_images(root: Path, suffix: str, train: bool, read: Callable[[tuple[Path, ...]], Listed]) -> FileSource:
    """The training or the test images below `root`, or all of one set; `read` lists those of some files.

    Test images are those of validation files where there are no test files, or these have no labels. Classes are those
    of the training images.

    Raises:
        InputError: no such files, images without labels, labels that are no classes, and what `read` refuses.
    """
    parts = part_files(root, suffix)
    if not parts:
        raise InputError(f"--root {root}: no {suffix} files there: name the folder, or the file")
    wanted = ["all"] if "all" in parts else ["train"] if train else ["test", "validation"]
    found = [part for part in wanted if part in parts]
    if not found:
        raise InputError(
            f"--root {root}: no {suffix} file of the {wanted[0]} images there, only of {', '.join(parts)}: say it in "
            f"the name, as {wanted[0]}{suffix}, or give --root the file"
        )
    part = next((part for part in found[:-1] if read(parts[part]).has_labels), found[-1])
    files, images = parts[part], read(parts[part])
    where = _span(files)
    if not images.labels:
        raise InputError(
            f"{where}: no images there (left out: {kinds(images.left_out) or 'nothing'}): name their files"
        )
    without = [place for place, label in enumerate(images.labels) if label in (None, -1)]
    if without:
        raise InputError(
            f"{where}: {len(without):,} of {len(images.labels):,} images without a label, first "
            f"{images.storage.name(without[0])}: give them one"
        )
    telling = parts.get("train", files)
    classes = images.classes or _classes_beside(root) or _classes_of(read(telling).labels, _span(telling))
    return FileSource(images.storage, images.names, _numbers(images, classes), classes, images.left_out, found=where)


def _span(files: Sequence[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{len(files):,} files {files[0]} to {files[-1].name}"


def _classes_beside(root: Path) -> list[str] | None:
    folder = root if root.is_dir() else root.parent
    for path in (folder / name for name in CLASS_FILES):
        if path.is_file():
            try:
                return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{path}: not a text file that can be read ({error}): correct or remove it") from error
    return None


def _classes_of(labels: list[int | str | None], where: str) -> list[str]:
    """Names of classes that nothing but labels names: sorted as folders are, or numbers without a gap."""
    numbers = {_number(label) for label in labels}
    if None in numbers:
        return [utf8_name(name) for name in sorted({str(label) for label in labels}, key=os.fsencode)]
    classes = list(itertools.takewhile(numbers.__contains__, itertools.count()))
    if len(classes) < len(numbers):
        raise InputError(
            f"{where}: labels are {len(numbers)} different numbers, but none is {len(classes)}: correct them, or name "
            f"the classes in {CLASS_FILES[0]} beside it, a line for each"
        )
    return list(map(str, classes))


def _numbers(images: Listed, classes: list[str]) -> NDArray[np.int64]:
    """The class of each image: by its name or, where labels are not all names of classes, by its number."""
    place = {name: number for number, name in enumerate(classes)}
    numbers = [place.get(utf8_name(label)) if isinstance(label, str) else None for label in images.labels]
    if None in numbers and None not in (by_number := list(map(_number, images.labels))):
        numbers = by_number
    for position, number in enumerate(numbers):
        if number is None or not 0 <= number < len(classes):
            raise InputError(
                f"{images.storage.name(position)}: its label {images.labels[position]!r} is none of the {len(classes)} "
                "classes: correct it"
            )
    return np.array(numbers, np.int64)


def _number(label: int | str | None) -> int | None:
    """A label as the number of a class, None where it is a name."""
    if isinstance(label, str):
        return int(label) if re.fullmatch("-?[0-9]+", label) else None
    return label

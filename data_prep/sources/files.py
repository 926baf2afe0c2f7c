"""Image files in trees of folders: each of them once, and what is left out."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np

from data_prep.errors import InputError
from data_prep.sources.encoded import FileSource
from data_prep.sources.pictures import is_image, kinds, left_out_as, utf8_name, wanted_folders


@dataclass(frozen=True)
class Paths:
    """Images that are files of their own; `encoded.Storage`."""

    paths: list[str]

    def open(self, index: int) -> str:
        """The path of an image."""
        return self.paths[index]

    def name(self, index: int) -> str:
        """What messages call an image."""
        return self.paths[index]


def class_folders(root: Path, folders: dict[str, Path], left_out: Counter[str]) -> FileSource:
    """All images below one folder a class; the classes are numbered in the order given. Counts in `left_out` too.

    Raises:
        InputError: a class without images, a folder that cannot be read, a folder or a file of two classes.
    """
    paths: list[str] = []
    labels: list[int] = []
    seen: dict[str, Path] = {}
    for label, folder in enumerate(folders.values()):
        here: Counter[str] = Counter()
        images = images_below(folder, seen, here)
        if not images:
            found = f" ({kinds(here)})" if kinds(here) else ""
            raise InputError(f"{folder}: a class without images{found}: add some, or remove the folder")
        paths += images
        labels += [label] * len(images)
        left_out.update(here)
    return each_file_once(paths, names_below(root, paths), labels, list(map(utf8_name, folders)), left_out)


def names_below(root: Path, paths: list[str]) -> list[str]:
    """The paths as they are below the folder `root`, which they begin with."""
    start = len(str(root / "x")) - 1  # of a root "." nothing stands in the paths
    return [path[start:] for path in paths]


def each_file_once(
    paths: list[str], names: list[str], labels: list[int], classes: list[str], left_out: Counter[str]
) -> FileSource:
    """The files of these labels and names, without those that `first_links` drops. Counts in `left_out` too.

    Raises:
        InputError: one file is of two classes.
    """
    kept = first_links(paths, labels, left_out)
    storage = Paths([paths[i] for i in kept])
    return FileSource(storage, [names[i] for i in kept], np.array(labels, np.int64)[kept], classes, left_out)


def first_links(paths: list[str], labels: Sequence[object], left_out: Counter[str]) -> list[int]:
    """The places of the files under their first name each, whatever links lead to them. Counts in `left_out` too.

    Raises:
        InputError: one file has two labels.
    """
    first: dict[tuple[int, int], int] = {}
    kept = []
    for number, path in enumerate(paths):
        try:
            status = os.stat(path)
            before = first.setdefault((status.st_dev, status.st_ino), number)
        except OSError:  # whoever reads it says so
            before = number
        if before == number:
            kept.append(number)
        elif labels[before] == labels[number]:
            left_out["files linked twice"] += 1
        else:
            raise InputError(f"{path}: the same file as {paths[before]}, of another class: remove one of them")
    return kept


def images_below(folder: Path, seen: dict[str, Path], left_out: Counter[str]) -> list[str]:
    """The images of a class, from each real folder once, whatever links lead to it. `seen`: the class folder of each
    real folder of this class and of those before it. Counts in `left_out` too.

    Raises:
        InputError: a folder that cannot be read, or is another class's.
    """

    def refuse(error: OSError) -> NoReturn:  # os.walk would skip the folder in silence
        raise InputError(f"{error.filename}: {error.strerror}: the layout needs this folder, readable")

    parent = os.path.realpath(folder.parent)
    above = {parent, *map(str, Path(parent).parents), *map(str, Path(os.path.realpath(folder)).parents)}
    images = []
    for here, subfolders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(here)
        if real in above or seen.get(real) == folder:
            left_out["folders linked in a loop or twice"] += 1
            subfolders.clear()
            continue
        if seen.setdefault(real, folder) != folder:
            raise InputError(f"{here}: the same folder is below {seen[real]}, another class: remove the link")
        subfolders[:] = wanted_folders(subfolders, left_out)
        for name in sorted(files, key=os.fsencode):
            path = os.path.join(here, name)
            if kind := left_out_as(path, partial(regular, path)):
                left_out[kind] += 1
            else:
                images.append(path)
    return images


def regular(path: str) -> str | None:
    """The path, if a file is there that may be looked into: no pipe."""
    return path if os.path.isfile(path) else None


def subfolders(folder: Path, left_out: Counter[str]) -> list[str]:
    """Names of class folders; other folders, and images beside them, are counted in `left_out`.

    Raises:
        InputError: the folder cannot be read.
    """
    names = []
    try:
        for entry in folder.iterdir():
            if entry.is_dir():
                names.append(entry.name)
            elif not entry.name.startswith(".") and is_image(entry.name, partial(regular, str(entry))):
                left_out["images beside the class folders"] += 1
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}: make it readable") from error
    return wanted_folders(names, left_out)

"""Image files in trees of folders: which files are images, each of them once, and what is left out."""

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.errors import InputError
from data_prep.sources.decoding import Check, Decoding, decode

NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PCD", "WMF"}
"""What PIL registers a reader for, but cannot decode, or only by running a program; most .pcd are clouds of points."""
SYSTEM_FOLDERS = {
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "@eadir",
    "@recently-snapshot",
    "@recycle",
    "@tmp",
    "__macosx",
    "lost+found",
    "network trash folder",
    "system volume information",
    "temporary items",
    "~snapshot",
}
"""Where file servers and systems keep thumbnails, metadata and what was deleted; names in lower case."""


@dataclass(frozen=True)
class FileSource:
    """Image files of any size.

    Attributes:
        root: the folder that they lie in.
        paths: N files, each of them `root` and what follows.
        labels: int64 [N].
        classes: name of each class.
        left_out: how many files and folders of each kind lie between them and are not among them.
        decoding: how they become pixels.
    """

    root: Path
    paths: list[str]
    labels: NDArray[np.int64]
    classes: list[str]
    left_out: Counter[str]
    decoding: Decoding = field(default_factory=Decoding)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, check: Check) -> tuple[NDArray[np.uint8], int]:
        """An image and its label. PIL's own limit of pixels must be off.

        Raises what PIL raises (OSError, ValueError, SyntaxError, ...) for a file that it cannot read, `InputError`,
        without the file's name, for one that needs another option, and whatever `check` raises.
        """
        with Image.open(self.paths[index]) as image:
            return decode(image, self.decoding, check), int(self.labels[index])

    def name(self, index: int) -> str:
        """What messages call an image."""
        return self.paths[index]

    def identity(self) -> Iterator[bytes]:
        """What tells this source from others, in pieces: each image's class and its path below the root."""
        start = len(str(self.root / "x")) - 1  # of a root "." nothing stands in the paths
        for path, label in zip(self.paths, self.labels.tolist(), strict=True):
            yield self.classes[label].encode() + b"\0" + os.fsencode(path[start:]) + b"\0"

    @property
    def max_side(self) -> int | None:
        """The longest side of any image, in pixels; None where only reading every file could tell."""
        return None


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
        images = _images_below(folder, seen, here)
        if not images:
            found = f" ({kinds(here)})" if kinds(here) else ""
            raise InputError(f"{folder}: a class without images{found}: add some, or remove the folder")
        paths += images
        labels += [label] * len(images)
        left_out.update(here)
    return each_file_once(root, paths, labels, list(map(utf8_name, folders)), left_out)


def each_file_once(
    root: Path, paths: list[str], labels: list[int], classes: list[str], left_out: Counter[str]
) -> FileSource:
    """The files under their first name each, whatever links lead to them. Counts in `left_out` too.

    Raises:
        InputError: one file is of two classes.
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
    return FileSource(root, [paths[i] for i in kept], np.array(labels, np.int64)[kept], classes, left_out)


def _images_below(folder: Path, seen: dict[str, Path], left_out: Counter[str]) -> list[str]:
    """The images of a class, from each real folder once, whatever links lead to it. `seen`: the class folder of each
    real folder of this class and of those before it."""

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
        subfolders[:] = _wanted(subfolders, left_out)
        for name in sorted(files, key=os.fsencode):
            path = os.path.join(here, name)
            # Hidden files are no images: macOS leaves a "._photo.jpg" beside every photo.jpg.
            if name.startswith("."):
                left_out["hidden"] += 1
            elif _is_image(path):
                images.append(path)
            else:
                left_out[os.path.splitext(name)[1].lower() or "without suffix"] += 1
    return images


def _is_image(path: str) -> bool:
    """Whether PIL reads files of this suffix or, where there is none, this file by its first bytes."""
    suffix = os.path.splitext(path)[1].lower()
    suffixes, formats = _readable()
    if suffix or not os.path.isfile(path):
        return suffix in suffixes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, about a file that is just looked at
            with Image.open(path, formats=formats):
                return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # as many kinds as PIL has formats
        return False


@cache
def _readable() -> tuple[frozenset[str], list[str]]:
    """The suffixes of pictures that PIL can decode on this machine, and the formats that it tells by first bytes."""
    Image.init()
    formats = {name: accept for name, (_, accept) in Image.OPEN.items() if name not in NO_PICTURES}
    suffixes = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)
    return suffixes, [name for name, accept in formats.items() if accept]


def kinds(left_out: Counter[str], most: int = 8) -> str:
    """What was left out, e.g. "60 .txt, 2 hidden": the `most` frequent kinds, and the others in one."""
    named = (+left_out).most_common(most)
    others = left_out.total() - sum(count for _, count in named)
    return ", ".join([f"{count:,} {kind}" for kind, count in named] + [f"{others:,} of other kinds"] * bool(others))


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
            elif not entry.name.startswith(".") and _is_image(str(entry)):
                left_out["images beside the class folders"] += 1
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}: make it readable") from error
    return _wanted(names, left_out)


def _wanted(folders: list[str], left_out: Counter[str]) -> list[str]:
    """The names of folders that may hold images, sorted; the others are counted in `left_out`."""
    wanted = []
    for name in sorted(folders, key=os.fsencode):
        if name.startswith("."):
            left_out["hidden"] += 1
        elif name.lower() in SYSTEM_FOLDERS:
            left_out["system folders"] += 1
        else:
            wanted.append(name)
    return wanted


def utf8_name(name: str) -> str:
    """A file's name, which Python read by the locale's encoding, as the text that it is in UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")

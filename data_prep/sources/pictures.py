"""Which files are images, told by their names, or by their first bytes where the name has no suffix."""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from typing import IO

from PIL import Image

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


def left_out_as(path: str, content: Callable[[], str | IO[bytes] | None]) -> str | None:
    """What kind of file is left out under this path, whose folders are wanted; None where it is an image. `content` is
    what PIL can open, or gives None where there is nothing to look into."""
    name = os.path.basename(path)
    if name.startswith("."):  # macOS leaves a "._photo.jpg" beside every photo.jpg
        return "hidden"
    if is_image(path, content):
        return None
    return os.path.splitext(name)[1].lower() or "without suffix"


def is_image(path: str, content: Callable[[], str | IO[bytes] | None]) -> bool:
    """Whether PIL reads files of this suffix or, where there is none, this content by its first bytes."""
    suffix = os.path.splitext(path)[1].lower()
    suffixes, formats = _readable()
    if suffix:
        return suffix in suffixes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, about a file that is just looked at
            file = content()
            if file is None:
                return False
            with Image.open(file, formats=formats):
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


def unwanted_folder(name: str) -> str | None:
    """What kind of folder is left out; None: one that may hold images."""
    if name.startswith("."):
        return "hidden"
    return "system folders" if name.lower() in SYSTEM_FOLDERS else None


def unwanted_below(folders: Iterable[str]) -> str | None:
    """What kind of file is left out that lies below folders of these names; None: one that may be an image."""
    found = {unwanted_folder(name) for name in folders}
    return next((kind for kind in ("hidden", "system folders") if kind in found), None)


def wanted_folders(folders: list[str], left_out: Counter[str]) -> list[str]:
    """The names of folders that may hold images, sorted; the others are counted in `left_out`."""
    kept = []
    for name in sorted(folders, key=os.fsencode):
        if kind := unwanted_folder(name):
            left_out[kind] += 1
        else:
            kept.append(name)
    return kept


def utf8_name(name: str) -> str:
    """A file's name, which Python read by the locale's encoding, as the text that it is in UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")

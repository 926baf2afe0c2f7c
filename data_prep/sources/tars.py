"""Images inside tar files, read in place: the headers are read once, then every image from where it lies."""

import io
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import InputError
from data_prep.sources.pictures import left_out_as, unwanted_below

LARGE = 10**9  # bytes of a tar file whose headers take a while


class Member(NamedTuple):
    """A file inside a tar file: its name there, and where its `size` bytes start."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class Members:
    """Images inside tar files; `encoded.Storage`. Nothing is shared between the processes that read.

    Attributes:
        tars: paths of the tar files.
        where: int64 [N, 3], of each image its tar file's place in `tars`, and its start and size in it, in bytes.
        members: its name there.
    """

    tars: list[str]
    where: NDArray[np.int64]
    members: list[str]

    def open(self, index: int) -> IO[bytes]:
        """The content of an image."""
        tar, start, size = self.where[index].tolist()
        return io.BytesIO(read_at(self.tars[tar], start, size))

    def name(self, index: int) -> str:
        """What messages call an image."""
        return f"{self.tars[self.where[index, 0]]}: {self.members[index]}"


def read_at(path: str, start: int, size: int) -> bytes:
    """`size` bytes of a file from `start` on, fewer where it ends before; raises OSError."""
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), size, start)


def index(path: Path, within: Member | None = None) -> Iterator[Member]:
    """The files in a tar file, or in the tar file that is its member `within`, in their order; starts count from the
    beginning of `path`. Reads nothing but headers.

    Raises:
        InputError: it cannot be read, is compressed, or damaged, or cut short.
    """
    called = f"{path}: {within.name}" if within else str(path)
    try:
        with path.open("rb") as file:
            end = within.start + within.size if within else os.fstat(file.fileno()).st_size
            if within is None and end > LARGE:
                print(f"{path}: reading the headers of its {end / 1e9:,.0f} GB", file=sys.stderr, flush=True)
            file.seek(within.start if within else 0)
            # Names as of files on disk, whatever they are encoded in.
            with tarfile.TarFile(fileobj=file, encoding=sys.getfilesystemencoding(), errors="surrogateescape") as tar:
                for each in tar:
                    if each.offset >= end:  # an inner tar file without an end: this is the outer one's header
                        break
                    if each.offset_data + each.size > end:
                        raise InputError(f"{called}: cut short in {each.name}: get it anew")
                    if each.isreg() and not each.issparse():
                        yield Member(each.name.removeprefix("./"), each.offset_data, each.size)
                else:
                    # A header that is damaged ends it for tarfile, in silence.
                    file.seek(tar.offset)
                    if tar.offset < end and file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                        raise InputError(f"{called}: damaged at byte {tar.offset:,}: get it anew")
    except tarfile.TarError as error:
        raise InputError(f"{called}: not a whole tar file ({error}): decompress it, or get it anew") from error
    except OSError as error:
        raise InputError(f"{called}: {error.strerror}: make it readable") from error


def only_images(path: Path, members: Iterator[Member], left_out: Counter[str]) -> dict[str, Member]:
    """Name -> member, of those that are images; others are counted in `left_out`, and so is one that a later member of
    the same name replaces."""
    images: dict[str, Member] = {}
    for member in members:
        if kind := _kind(path, member):
            left_out[kind] += 1
            continue
        left_out["replaced in the tar file"] += member.name in images
        images[member.name] = member
    return images


def _kind(path: Path, member: Member) -> str | None:
    """What is left out, as of files in folders; None: an image."""
    return unwanted_below(member.name.split("/")[:-1]) or left_out_as(
        member.name, lambda: io.BytesIO(read_at(str(path), member.start, member.size))
    )

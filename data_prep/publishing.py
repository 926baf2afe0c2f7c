"""Files under temporary names until they are whole: what a killed program leaves is told from what another still
writes, and no reader meets a .beton beside what describes another one."""

import fcntl
import glob
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from data_prep.errors import InputError


class BetonFiles(NamedTuple):
    """A .beton file and what goes with it, in the order in which they get their final names."""

    digests: Path
    description: Path
    beton: Path

    @classmethod
    def final(cls, out: Path) -> "BetonFiles":
        """X.beton.digests.npy, X.beton.json and X.beton, which is `out`."""
        return cls(out.with_name(f"{out.name}.digests.npy"), out.with_name(f"{out.name}.json"), out)

    @classmethod
    def temporary(cls, data: Path) -> "BetonFiles":
        """.X.beton.1234abcd.digests.tmp, .X.beton.1234abcd.json.tmp and .X.beton.1234abcd.data.tmp, which is `data`."""
        stem = data.name.removesuffix("data.tmp")
        return cls(data.with_name(f"{stem}digests.tmp"), data.with_name(f"{stem}json.tmp"), data)


@contextmanager
def temporary_files(out: Path) -> Iterator[BetonFiles]:
    """Hidden names beside `out`, of a .beton, which exists, and what goes with it; none is there at the end.

    The .beton is locked as long as this process or one of its workers lives. By that lock, those that another left
    behind when it was killed are told from those of one that still writes the same `out`, and removed at first.

    Raises:
        InputError: the folder does not take a file.
    """
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.data.tmp"):
        with suppress(OSError), left.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(BetonFiles.temporary(left))
    lock = None
    try:
        # Refuses a folder that is not ours before hours of reading. Somebody may remove the file before it is locked.
        while lock is None or not os.fstat(lock.fileno()).st_nlink:
            data = out.with_name(f".{out.name}.{secrets.token_hex(4)}.data.tmp")
            lock = data.open("xb")
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}: choose a folder that you may write to") from error
    files = BetonFiles.temporary(data)
    try:
        yield files
    finally:
        _remove(files)
        lock.close()


def _remove(files: BetonFiles) -> None:
    for path in files:  # the .beton last, since by its name the others are found
        path.unlink(missing_ok=True)


def publish(files: BetonFiles, out: Path, outdated: list[Path]) -> None:
    """Moves the files to their final names, those of the .beton file `out`, when the .beton files `outdated` are gone.

    A reader must never see a .beton with the JSON or the digests of another one. So what is outdated goes first, each
    .beton before its companions, then the new companions come, then the .beton: killed in between, this leaves
    companions alone, and readers miss the .beton.

    Raises:
        OSError: a file cannot be written or moved.
    """
    for path in files:
        _sync(path)
    for old in outdated:
        for path in reversed(BetonFiles.final(old)):
            path.unlink(missing_ok=True)
    for path, final in zip(files, BetonFiles.final(out), strict=True):
        path.replace(final)
    _sync(out.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Files that are whole or absent, locks that die with their process, and JSON that is checked as it is read."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, TypeVar

from ckd_dist.core.errors import UserError, require

if TYPE_CHECKING:
    import pydantic

T = TypeVar("T")


# ------------------------------------------------------------------------------------------- writing


class NewFile:
    """A file that appears as `path` only when whole.

    Until `publish` gives it its name, it has a hidden one of its own beside it: writers of the same file do not meet,
    and the last to publish wins. Its writer holds a lock on it, by which `remove_leftovers` tells the file of a dead
    writer from one that is being written.
    """

    def __init__(self, path: Path):
        self.path = path
        while True:
            self.temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
            self.file: BinaryIO = open(self.temporary, "xb")  # noqa: SIM115  closed by publish or discard
            # A cleaner may have taken it for a leftover before it was locked.
            if lock(self.file) and os.fstat(self.file.fileno()).st_nlink:
                return
            self.file.close()

    def sync(self) -> None:
        """Make the content durable."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def publish(self) -> None:
        """Make the content durable, then give it its name. Whoever calls in between `discard`s it on an error."""
        self.sync()
        os.replace(self.temporary, self.path)
        self.file.close()
        sync_folder(self.path.parent)

    def discard(self) -> None:
        """Remove what was written, if it is not published."""
        with suppress(OSError):
            self.file.close()
        self.temporary.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a `NewFile`, which gets the name `path` when whole: a process killed at any moment leaves the
    old file or the new one, an error the old one. An `OSError` names `path`."""
    new = NewFile(path)
    try:
        with errors_name(path):
            write(new.file)
            new.publish()
    finally:
        new.discard()


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """An `OSError` of the block that names no file, as that of a full disk, names `path`."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """`write_atomically` of what is in memory."""
    write_atomically(path, lambda file: file.write(content))


def remove_leftovers(folder: Path) -> None:
    """Remove the files of dead writers, see `NewFile`, directly in `folder`."""
    for path in folder.glob(".*.tmp"):
        with suppress(OSError), open(path, "r+b") as file:
            if lock(file, unless_known=False):
                path.unlink()


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------- locks


def lock(file: IO, *, wait: bool = False, unless_known: bool = True) -> bool:
    """Lock a file that is open for writing; False where somebody else holds it, on any node (NFS too), unless this is
    to `wait` for it.

    The lock ends when the file is closed, and when the process dies. `unless_known` is the answer of a file system that
    has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            return unless_known
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


# ------------------------------------------------------------------------------------------- reading


def require_regular(path: Path, option: str) -> None:
    """Raise `UserError` unless `path` is a file that can be read to its end: not a folder, not a FIFO."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UserError(f"{option}: no such file: {path}") from None
    except OSError as error:
        raise UserError(f"{option}: {path}: {error.strerror}") from None
    require(stat.S_ISREG(mode), f"{option}: {path} is not a regular file")


def read_json(path: Path, kind: type[T], option: str, mend: str) -> T:
    """The JSON file `path` as a `kind`: a dataclass, or any other type that pydantic knows, its types and ranges
    checked, nothing converted.

    Raises `UserError` with one line that names the file, what is wrong with it and the `mend`.
    """
    require_regular(path, option)
    try:
        return parse_json(path.read_bytes(), kind)
    except ValueError as error:
        raise UserError(f"{option}: {path} is damaged ({error}): {mend}") from None
    except OSError as error:
        raise UserError(f"{option}: {path}: {error.strerror}") from None


def parse_json(content: bytes | str, kind: type[T]) -> T:
    """JSON as a `kind`, see `read_json`; raises `ValueError` with one line."""
    import pydantic  # takes a fifth of a second

    try:
        return schema(kind).validate_json(content, strict=True)  # type: ignore[arg-type]  # types have hashes
    except pydantic.ValidationError as error:
        raise ValueError(first_fault(error)) from None


def first_fault(error: pydantic.ValidationError) -> str:
    """What is wrong, and where, on one line."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]


@cache
def schema(kind: Any) -> pydantic.TypeAdapter:
    """What checks values against a type, built once."""
    import pydantic

    return pydantic.TypeAdapter(kind)


def file_sha256(path: Path) -> str:
    """sha256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def content_sha256(path: Path) -> str:
    """sha256 of a file's content, or of the names and contents of all files of a folder."""
    if not path.is_dir():
        return file_sha256(path)
    digest = hashlib.sha256()
    for each in sorted(each for each in path.rglob("*") if each.is_file()):
        digest.update(f"{each.relative_to(path)} {file_sha256(each)}\n".encode())
    return digest.hexdigest()

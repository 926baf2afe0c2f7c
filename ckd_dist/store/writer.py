"""Writing shards: whole or absent, and the same bytes whoever writes them."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import xxhash

from ckd_dist.core.files import NewFile, errors_name, lock, remove_leftovers, write_bytes_atomically
from ckd_dist.store.manifest import Manifest, Shard


@contextmanager
def locked(store: Path) -> Iterator[bool]:
    """Hold the store against other commands that add to it, on any node; creates the folder. Yields whether this file
    system has locks: without them, nothing is held."""
    store.mkdir(parents=True, exist_ok=True)
    with open(store / ".lock", "w", encoding="utf-8") as file:
        yield lock(file, wait=True, unless_known=False)


def clear_leftovers(store: Path) -> None:
    """Remove what dead writers left."""
    for folder in (store, *store.rglob("view_*")):
        remove_leftovers(folder)


def is_written(store: Path, shard: Shard) -> bool:
    """Whether the shard stands under its name."""
    path = shard.path(store)
    return path.is_file() and path.with_suffix(".json").is_file()


def make_room(store: Path, shard: Shard) -> None:
    """Remove whatever stands in the place of a shard, of its sidecar, or of the folders that they are in."""
    path = shard.path(store)
    for folder in reversed(path.parents[: len(path.relative_to(store).parents) - 1]):
        if not folder.is_dir():
            folder.unlink(missing_ok=True)
    remove_with_sidecar(path)


def remove_with_sidecar(path: Path) -> None:
    """Remove a file and the .json of its name, or whatever stands in their place."""
    for each in (path, path.with_suffix(".json")):
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)
        else:
            each.unlink(missing_ok=True)


def array_header(manifest: Manifest, shard: Shard) -> bytes:
    """First bytes of a shard's .npy file."""
    dtype, shape = manifest.recorded.array(shard.count)
    header = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()


def sidecar_content(manifest: Manifest, shard: Shard, xxh3_128: str, basis_sha256: str | None) -> bytes:
    """The .json beside a shard whose content has the checksum `xxh3_128`, and its checkpoint's basis the other."""
    values = asdict(manifest.sidecar(shard, basis_sha256, xxh3_128))
    return (json.dumps({key: each for key, each in values.items() if each is not None}, indent=2) + "\n").encode()


class ShardWriter:
    """Writes one shard, records in order, to a file of its own that `commit` gives its name.

    Others may write the same shard meanwhile: the first to commit wins, and what the others have is discarded.
    """

    def __init__(self, store: Path, shard: Shard, manifest: Manifest, basis_sha256: str | None = None):
        """`basis_sha256`: of the basis that its records are encoded with, if they are with any."""
        self.shard, self._store, self._manifest, self._basis_sha256 = shard, store, manifest, basis_sha256
        path = shard.path(store)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._record_bytes = manifest.recorded.record_bytes
        self._digest = xxhash.xxh3_128()
        self._written = 0
        self._new = NewFile(path)
        self._write(array_header(manifest, shard))

    def append(self, records: np.ndarray) -> None:
        """Write the next records, uint8 [n, bytes]."""
        assert records.shape[1:] == (self._record_bytes,)
        self._write(np.ascontiguousarray(records).data)
        self._written += len(records)

    def _write(self, data: bytes | memoryview) -> None:
        with errors_name(self._new.path):
            self._new.file.write(data)
        self._digest.update(data)

    def commit(self) -> None:
        """Make the shard stand, unless another writer has: its checksum first, its name last.

        A sidecar never stands beside a file of another writer: the store is locked, and what is there of a shard that
        is not whole is removed first. So a kill at any moment leaves a whole shard or none.
        """
        assert self._written == self.shard.count
        with errors_name(self._new.path):
            self._new.sync()  # all but the names, so that the lock is held for a moment only
            with locked(self._store):
                if not is_written(self._store, self.shard):
                    make_room(self._store, self.shard)
                    sidecar = sidecar_content(self._manifest, self.shard, self._digest.hexdigest(), self._basis_sha256)
                    write_bytes_atomically(self._new.path.with_suffix(".json"), sidecar)
                    self._new.publish()
        self._new.discard()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove what was written, unless it stands."""
        self._new.discard()

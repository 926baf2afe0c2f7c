"""Writing shards: whole or absent, and the same bytes whoever writes them."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from ckd_dist.config import require
from ckd_dist.files import sync_folder, write_bytes_atomically
from ckd_dist.log import say
from ckd_dist.store import codecs
from ckd_dist.store.manifest import Manifest, Shard


@contextmanager
def locked(store: Path) -> Iterator[None]:
    """Hold the store's manifest against other commands that add to it, on any node; creates the folder."""
    store.mkdir(parents=True, exist_ok=True)
    with open(store / ".lock", "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            say(f"warning: {store}: this file system has no locks: let no two commands begin a store at the same time")
        yield


def merged(store: Path, wanted: Manifest) -> Manifest:
    """The manifest of `store` with the views and checkpoints of `wanted` added; `wanted` where there is no store yet.

    Raises `UserError` naming the field that differs when the store holds other logits.
    """
    # In this order: another command may be making the store, and all but these two come after the manifest.
    beginning = {".lock", ".manifest.json.tmp"}
    foreign = store.exists() and any(path.name not in beginning for path in store.iterdir())
    if not (store / "manifest.json").exists():
        require(
            not foreign,
            f"store: {store} is not empty and has no manifest.json: choose another --store",
        )
        return wanted
    found = Manifest.load(store, "store")
    found.require_same(wanted, f"store: {store}", "this command")
    for name, values in wanted.checkpoints.items():
        known = found.checkpoints.get(name, values)
        require(
            known == values,
            f"store: {store} holds {name} of a model {known['model']} with weights "
            f"{known['weights_sha256'][:12]}, this run has {values['model']} {values['weights_sha256'][:12]}: "
            "choose another --store",
        )
    checkpoints = dict(sorted({**found.checkpoints, **wanted.checkpoints}.items()))
    return replace(found, checkpoints=checkpoints, views=max(found.views, wanted.views))


def open_store(store: Path, manifest: Manifest) -> None:
    """Create the store, or let it grow to what `manifest`, of `merged`, says."""
    store.mkdir(parents=True, exist_ok=True)
    path = store / "manifest.json"
    if not path.exists() or path.read_bytes() != manifest.content():
        manifest.save(store)


def is_written(store: Path, shard: Shard) -> bool:
    """Whether the shard stands under its name."""
    path = shard.path(store)
    return path.exists() and path.with_suffix(".json").exists()


def array_header(manifest: Manifest, shard: Shard) -> bytes:
    """First bytes of a shard's .npy file."""
    dtype, shape = manifest.recorded.array(shard.count)
    header = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()


def sidecar_content(manifest: Manifest, shard: Shard, sha256: str) -> bytes:
    """The .json beside a shard whose content has the checksum `sha256`."""
    return (json.dumps({**manifest.sidecar(shard), "sha256": sha256}, indent=2) + "\n").encode()


def shard_size(manifest: Manifest, shard: Shard) -> int:
    """Bytes of a shard's .npy file."""
    return len(array_header(manifest, shard)) + codecs.record_bytes(manifest.recorded) * shard.count


def store_size(manifest: Manifest) -> tuple[int, int]:
    """(bytes, files) of the whole store when it is complete: the sum of its files' lengths, to the byte."""
    shards = [shard for name in manifest.checkpoints for shard in manifest.checkpoint_shards(name)]
    sidecars = sum(len(sidecar_content(manifest, shard, 64 * "0")) for shard in shards)
    total = len(manifest.content()) + sidecars + sum(shard_size(manifest, shard) for shard in shards)
    return total, 1 + 2 * len(shards)


class ShardWriter:
    """Writes one shard, records in order, to a temporary file that `commit` gives its name."""

    def __init__(self, store: Path, shard: Shard, manifest: Manifest):
        self.shard, self._manifest = shard, manifest
        self._path = shard.path(store)
        self._temporary = self._path.with_name(f".{self._path.name}.tmp")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._record_bytes = codecs.record_bytes(manifest.recorded)
        self._digest = hashlib.sha256()
        self._written = 0
        self._file = open(self._temporary, "wb")  # noqa: SIM115  closed by commit
        self._write(array_header(manifest, shard))

    def append(self, records: np.ndarray) -> None:
        """Write the next records, uint8 [n, bytes]."""
        assert records.shape[1:] == (self._record_bytes,)
        self._write(np.ascontiguousarray(records).data)
        self._written += len(records)

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)

    def commit(self) -> None:
        """Make the shard stand: contents and checksum first, its name last."""
        assert self._written == self.shard.count
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        sidecar = sidecar_content(self._manifest, self.shard, self._digest.hexdigest())
        write_bytes_atomically(self._path.with_suffix(".json"), sidecar)
        os.replace(self._temporary, self._path)
        sync_folder(self._path.parent)

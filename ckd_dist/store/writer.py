"""Writing shards: whole or absent, and the same bytes whoever writes them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from ckd_dist.checkpoint import sync_folder, write_atomically
from ckd_dist.config import TrainingError, UserError, require
from ckd_dist.store.manifest import Manifest, Shard


def open_store(store: Path, wanted: Manifest) -> Manifest:
    """Create the store, or go on in one of the same identity, adding `wanted`'s views and checkpoints to it.

    Raises `UserError` naming the field that differs when the store holds other logits.
    """
    if (store / "manifest.json").exists():
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
        wanted.checkpoints = dict(sorted({**found.checkpoints, **wanted.checkpoints}.items()))
        wanted.views = max(found.views, wanted.views)
        if wanted == found:
            return wanted
    elif store.exists() and any(store.iterdir()):
        raise UserError(f"store: {store} is not empty and has no manifest.json: choose another --store")
    store.mkdir(parents=True, exist_ok=True)
    wanted.save(store)
    return wanted


def is_written(store: Path, shard: Shard) -> bool:
    """Whether the shard stands under its name."""
    path = shard.path(store)
    return path.exists() and path.with_suffix(".json").exists()


class ShardWriter:
    """Writes one dense shard, records in order, to a temporary file that `commit` gives its name."""

    def __init__(self, store: Path, shard: Shard, manifest: Manifest):
        self.shard, self._manifest = shard, manifest
        self._path = shard.path(store)
        self._temporary = self._path.with_name(f".{self._path.name}.tmp")
        self._classes = manifest.dataset["num_classes"]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._digest = hashlib.sha256()
        self._written = 0
        self._file = open(self._temporary, "wb")  # noqa: SIM115  closed by commit
        np.lib.format.write_array_header_1_0(
            _Tee(self._file, self._digest),
            {"descr": "<f2", "fortran_order": False, "shape": (shard.count, self._classes)},
        )

    def append(self, logits: np.ndarray) -> None:
        """Write the next records: float32 [n, classes], rounded to float16."""
        if not np.isfinite(logits).all() or np.abs(logits).max(initial=0) > 65504:
            raise TrainingError(
                f"{self.shard.checkpoint} gives logits that float16 cannot hold: is it a good checkpoint?"
            )
        records = np.ascontiguousarray(logits, dtype="<f2")
        self._file.write(records.data)
        self._digest.update(records.data)
        self._written += len(records)

    def commit(self) -> None:
        """Make the shard stand: contents and checksum first, its name last."""
        assert self._written == self.shard.count
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        sidecar = {**self._manifest.sidecar(self.shard), "sha256": self._digest.hexdigest()}
        text = json.dumps(sidecar, indent=2) + "\n"
        write_atomically(self._path.with_suffix(".json"), lambda file: file.write(text.encode()))
        os.replace(self._temporary, self._path)
        sync_folder(self._path.parent)


class _Tee:
    """File and digest as one target."""

    def __init__(self, *targets):
        self._write, self._update = targets[0].write, targets[1].update

    def write(self, data: bytes) -> None:
        self._write(data)
        self._update(data)

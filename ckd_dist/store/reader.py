"""Reading: the records of any samples, in any order, from memory-mapped shards."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numba import types

from ckd_dist import checkpoint
from ckd_dist.config import KDConfig, require
from ckd_dist.data import DatasetInfo
from ckd_dist.store import codecs
from ckd_dist.store.check import faults
from ckd_dist.store.manifest import Manifest
from ckd_dist.views import ViewRecipe, compiled

_memcpy: Any = types.ExternalFunction("memcpy", types.uintp(types.uintp, types.uintp, types.uintp))


@compiled
def _gather(addresses, shard_size, ids, out):
    """Copy record ids[i] to out[i], uint8 [n, bytes]: numpy's own indexing, shard by shard, takes twice as long."""
    target, step, size = out.ctypes.data, out.strides[0], out.shape[1]
    for i in range(len(ids)):
        shard, row = divmod(ids[i], shard_size)
        _memcpy(target + i * step, addresses[shard] + np.uint64(row * size), size)


def require_images(manifest: Manifest, info: DatasetInfo, option: str, store: Path) -> None:
    """Raise `UserError` unless `store` is of the images of `info`."""
    for key, ours in (("content_hash", info.content_hash), ("count", info.count), ("num_classes", info.num_classes)):
        found = manifest.dataset[key]
        require(found == ours, f"{option}: {store} is of images with {key} {found}, data.train has {ours}")


class StoreReader:
    """The records of some of a store's checkpoints."""

    def __init__(
        self,
        store: str,
        epochs: list[int],
        info: DatasetInfo | None = None,
        kd: KDConfig | None = None,
        combine: str | None = None,
        *,
        check: bool = True,
    ):
        """Open `store`, if given for the images of `info` and for the loss `kd`, with `combine` saying how several
        checkpoints teach at once; collective. `check` compares every shard that may be read with its checksum.

        Raises `UserError`, on every rank, for a store of other images, a checkpoint that it lacks, a loss that its
        codec cannot serve, or a shard that is missing or does not match its checksum.
        """
        self.store = Path(store)
        self.manifest = Manifest.load(self.store, "teacher.store")
        if info:
            require_images(self.manifest, info, "teacher.store", self.store)
        available = {values["epoch"]: name for name, values in self.manifest.checkpoints.items()}
        self.epochs = checkpoint.choose(dict(sorted(available.items())), epochs, "teacher.checkpoints")
        self._members = [available[epoch] for epoch in self.epochs]
        self.codec = self.manifest.recorded
        self._record_bytes = codecs.record_bytes(self.codec)
        size = self._record_bytes * self.manifest.dataset["count"] * self.manifest.views * len(self._members)
        self._outgrows_memory = size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
        if kd:
            codecs.require_served(self.codec, kd, combine)
        self._views: dict[tuple[str, int], tuple[list, np.ndarray]] = {}
        if check:
            self._check_shards()

    @property
    def recipe(self) -> ViewRecipe:
        """How the cached views were drawn."""
        return ViewRecipe.from_dict(self.manifest.recipe)

    def rows(self, ids: np.ndarray, view: int, members: list[int] | None = None) -> np.ndarray:
        """Records of samples `ids` [n] under `view`, uint8 [n, members, bytes]; `members` counts among the epochs that
        the reader was opened for, and defaults to all of them."""
        names = [self._members[m] for m in members] if members else self._members
        ids = ids.astype(np.int64)
        assert ((ids >= 0) & (ids < self.manifest.dataset["count"])).all()  # from here on, nothing else looks
        out = np.empty((len(ids), len(names), self._record_bytes), dtype=np.uint8)
        for m, name in enumerate(names):
            _gather(self._addresses(name, view), self.manifest.shard_size, ids, out[:, m])
        return out

    def _addresses(self, member: str, view: int) -> np.ndarray:
        """Where the records of each shard of a view begin in memory, uint64 [shards]."""
        if (member, view) not in self._views:
            arrays = []
            for shard in self.manifest.shards(member, view):
                array = np.load(shard.path(self.store), mmap_mode="r")
                assert array.flags.c_contiguous and array.nbytes == shard.count * self._record_bytes
                if self._outgrows_memory:  # rows come in random order: what is read ahead of them is read for nothing
                    array._mmap.madvise(mmap.MADV_RANDOM)
                arrays.append(array)
            self._views[member, view] = arrays, np.array([a.ctypes.data for a in arrays], dtype=np.uint64)
        return self._views[member, view][1]

    def _check_shards(self) -> None:
        """Compare every shard that will be read with its checksum; ranks share the work."""
        found = faults(self.store, self.manifest, self._members)
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        require(not found, f"teacher.store: {found and found[0][1]}{more}: run python -m ckd_dist.store repair")

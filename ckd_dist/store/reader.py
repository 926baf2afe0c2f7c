"""Reading: the records of any samples, in any order, from memory-mapped shards."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numba import types

from ckd_dist import checkpoint
from ckd_dist.config import require
from ckd_dist.data import DatasetInfo
from ckd_dist.recipe import ViewRecipe
from ckd_dist.store import codecs
from ckd_dist.store.check import faults
from ckd_dist.store.manifest import Manifest
from ckd_dist.views import compiled

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
        checkpoints: list[int | str],
        info: DatasetInfo | None = None,
    ):
        """Open `store`, if given for the images of `info`; `checkpoints` as users call them (`Manifest.members`),
        default: the last. Shards are not looked at before `check_shards` or `rows`.

        Raises `UserError` for a store of other images, or a checkpoint that it lacks.
        """
        self.store = Path(store)
        self.manifest = Manifest.load(self.store, "teacher.store")
        if info:
            require_images(self.manifest, info, "teacher.store", self.store)
        available = self.manifest.members
        self.checkpoints = checkpoint.choose(available, checkpoints, "teacher.checkpoints")
        self._members = [available[name] for name in self.checkpoints]
        self.codec = self.manifest.recorded
        self._record_bytes = codecs.record_bytes(self.codec)
        size = self._record_bytes * self.manifest.dataset["count"] * self.manifest.views * len(self._members)
        self._outgrows_memory = size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
        self._views: dict[tuple[str, int], tuple[list, np.ndarray]] = {}

    @property
    def recipe(self) -> ViewRecipe:
        """How the cached views were drawn."""
        return ViewRecipe.from_dict(self.manifest.recipe)

    def rows(self, ids: np.ndarray, view: int, members: list[int] | None = None) -> np.ndarray:
        """Records of samples `ids` [n] under `view`, uint8 [n, members, bytes]; `members` counts among
        `self.checkpoints`, and defaults to all of them."""
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

    def check_shards(self) -> None:
        """Compare every shard that may be read with its checksum; collective: ranks share the work. Raises `UserError`,
        on every rank, for one that is missing or does not match."""
        found = faults(self.store, self.manifest, self._members)
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        require(not found, f"teacher.store: {found and found[0][1]}{more}: run python -m ckd_dist.store repair")

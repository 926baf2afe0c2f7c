"""Reading: the records of any samples, in any order, from memory-mapped shards."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numba import types

from ckd_dist.core import checkpoint
from ckd_dist.core.errors import UserError, require
from ckd_dist.data.dataset import DatasetInfo
from ckd_dist.data.jit import compiled
from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.store import bases
from ckd_dist.store.check import faults, records_begin
from ckd_dist.store.manifest import Manifest, Shard

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
    label_map = manifest.dataset.get("label_map")
    require(
        label_map == (None if info.label_map is None else list(info.label_map)),
        f"{option}: {store} was written {'with' if label_map else 'without'} --data.map_classes by_name: do as it does",
    )


def as_cached(info: DatasetInfo, manifest: Manifest, option: str, store: Path) -> DatasetInfo:
    """The images of a store, their labels mapped as they were when it was written, and with its classes where they have
    none; raises `UserError` where they are others."""
    if not info.labelled:
        info = replace(info, num_classes=manifest.dataset["num_classes"])
    label_map = manifest.dataset.get("label_map")
    if label_map is not None and len(label_map) == info.num_classes:
        info = replace(info, label_map=tuple(label_map), num_classes=manifest.dataset["num_classes"])
    require_images(manifest, info, option, store)
    return info


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class _MappedFile:
    """A file in memory, read-only, from `address` on, for as long as this object lives. Python's own mmap keeps a file
    descriptor for each, and a process may have 1024 of them."""

    def __init__(self, file: BinaryIO, *, random: bool):
        """`random`: parts of it will be read in random order, and what lies beside them is not worth reading ahead."""
        size = os.fstat(file.fileno()).st_size
        self.address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        if self.address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), file.name)
        weakref.finalize(self, _libc.munmap, self.address, size).atexit = False
        if random:
            _libc.madvise(self.address, size, mmap.MADV_RANDOM)


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
        """Of the records; where it is fitted to checkpoints, each has its own of `codecs`."""
        encodings = bases.encodings(self.store, self.manifest, self._members)
        self.codecs = [encodings[name].codec for name in self._members]
        self._record_bytes = self.codec.record_bytes
        size = self._record_bytes * self.manifest.dataset["count"] * self.views * len(self._members)
        self._outgrows_memory = size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
        self._mapped: dict[tuple[str, int], tuple[list[_MappedFile], np.ndarray]] = {}

    def __getstate__(self) -> dict:
        """Without what is in this process's memory."""
        return {**vars(self), "_mapped": {}}

    @property
    def views(self) -> int:
        """Number of views that all of the checkpoints have."""
        return self.manifest.views(self.checkpoints)

    @property
    def recipe(self) -> ViewRecipe:
        """How the cached views were drawn."""
        return ViewRecipe.from_dict(self.manifest.recipe)

    def rows(self, ids: np.ndarray, view: int, members: list[int] | None = None) -> np.ndarray:
        """Records of samples `ids` [n] under `view`, uint8 [n, members, bytes]; `members` counts among
        `self.checkpoints`, and defaults to all of them."""
        names = [self._members[m] for m in members] if members else self._members
        ids = ids.astype(np.int64)
        count = self.manifest.dataset["count"]
        if not ((ids >= 0) & (ids < count)).all():  # from here on, nothing else looks
            raise IndexError(f"sample ids from {ids.min()} to {ids.max()}, the store has 0 to {count - 1}")
        # What is mapped of other views is not needed again soon. A new dict each time: threads may call this at once.
        mapped = {key: each for key, each in self._mapped.items() if key[1] == view}
        out = np.empty((len(ids), len(names), self._record_bytes), dtype=np.uint8)
        for m, name in enumerate(names):
            if (name, view) not in mapped:
                mapped[name, view] = self._map(self.manifest.shards(name, view))
            _gather(mapped[name, view][1], self.manifest.shard_size, ids, out[:, m])
        self._mapped = mapped
        return out

    def logits(self, ids: np.ndarray, view: int, member: int = 0) -> torch.Tensor:
        """What the records of one of the checkpoints tell of its logits, at T = 1 where that matters: float32 [n,
        classes]; see `rows`."""
        return self.codecs[member].decode(torch.from_numpy(self.rows(ids, view, [member])[:, 0]), 1.0)

    def _map(self, shards: list[Shard]) -> tuple[list[_MappedFile], np.ndarray]:
        """The shards in memory, and where the records of each begin there, uint64 [shards]."""
        files, addresses = [], []
        for shard in shards:
            path = shard.path(self.store)
            with open(path, "rb") as file:
                try:
                    offset = records_begin(file, self.manifest, shard)
                except ValueError as error:
                    raise UserError(f"teacher.store: {path} is no shard of this store ({error})") from None
                files.append(_MappedFile(file, random=self._outgrows_memory))
            addresses.append(files[-1].address + offset)
        return files, np.array(addresses, dtype=np.uint64)

    def check_shards(self, views: int | None = None) -> None:
        """Compare every shard of the first `views` (default: of all) with its checksum; collective: ranks share the
        work. Raises `UserError`, on every rank, for one that is missing or does not match."""
        found = faults(self.store, self.manifest, self._members, views)
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        require(not found, f"teacher.store: {found and found[0][1]}{more}: run python -m ckd_dist.store repair")

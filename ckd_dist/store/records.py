"""The records of a view where they can be copied from: in files mapped into memory, or in memory of our own."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from ckd_dist.store.manifest import Manifest, Shard
from ckd_dist.store.size import shard_size
from ckd_dist.store.writer import array_header

View = tuple[str, int]
"""A checkpoint's member name, and the number of a view."""


class Records(Protocol):
    """All records of a view of a checkpoint, where they can be copied from."""

    addresses: np.ndarray
    """Of the first record of each shard, uint64 [shards]."""


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


class MappedView:
    """A view's shards, mapped into memory."""

    def __init__(self, store: Path, manifest: Manifest, shards: list[Shard], *, random: bool):
        self._files = []
        for shard in shards:
            with open(shard.path(store), "rb") as file:
                self._files.append(_MappedFile(file, random=random))
        starts = [len(array_header(manifest, shard)) for shard in shards]
        addresses = [file.address + start for file, start in zip(self._files, starts, strict=True)]
        self.addresses = np.array(addresses, dtype=np.uint64)


class HeldView:
    """A view's shards in memory of our own, one after another as their files are."""

    def __init__(self, manifest: Manifest, shards: list[Shard], memory: np.ndarray):
        """`memory`: uint8, of the size of all the files."""
        self.memory = memory
        ends = np.cumsum([shard_size(manifest, shard) for shard in shards]).tolist()
        starts = [0, *ends[:-1]]
        self._files = {shard: memory[a:b] for shard, a, b in zip(shards, starts, ends, strict=True)}
        headers = [len(array_header(manifest, shard)) for shard in shards]
        addresses = [memory.ctypes.data + a + header for a, header in zip(starts, headers, strict=True)]
        self.addresses = np.array(addresses, dtype=np.uint64)

    def file(self, shard: Shard) -> np.ndarray:
        """The place of a shard's file, uint8."""
        return self._files[shard]

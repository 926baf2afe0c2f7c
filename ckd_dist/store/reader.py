"""Reading: the records of any samples, in any order, from memory-mapped shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import types

from ckd_dist.core import checkpoint, memory
from ckd_dist.core.errors import require
from ckd_dist.data.dataset import DatasetInfo
from ckd_dist.data.jit import compiled
from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.store import bases
from ckd_dist.store.check import faults, shard_fault
from ckd_dist.store.manifest import Manifest, Shard
from ckd_dist.store.records import HeldView, MappedView, Records, View

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
        require(found == ours, f"{option}: {store} is of images with {key} {found}, {info.path} has {ours}")
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


class StoreReader:
    """The records of some of a store's checkpoints.

    No record is given out of a shard that was not compared with its checksum: that is done when its view is first read,
    unless `check_shards`, or `ahead.ReadAhead`, did it before.
    """

    def __init__(
        self,
        store: str,
        checkpoints: list[int | str],
        info: DatasetInfo | None = None,
        option: str = "teacher.store",
    ):
        """Open `store`, if given for the images of `info`; `checkpoints` as users call them (`Manifest.members`),
        default: the last. Shards are not looked at yet. Errors name the `option`.

        Raises `UserError` for a store of other images, or a checkpoint that it lacks.
        """
        self.store, self._option = Path(store), option
        self.manifest = Manifest.load(self.store, option)
        if info:
            require_images(self.manifest, info, option, self.store)
        available, named = self.manifest.members, "teacher.checkpoints" if option == "teacher.store" else option
        self.checkpoints = checkpoint.choose(available, checkpoints, named)
        self._members = [available[name] for name in self.checkpoints]
        self.codec = self.manifest.recorded
        """Of the records; where it is fitted to checkpoints, each has its own of `codecs`."""
        encodings = bases.encodings(self.store, self.manifest, self._members)
        self.codecs = [encodings[name].codec for name in self._members]
        self._basis_sha256 = {name: encodings[name].basis_sha256 for name in self._members}
        self._record_bytes = self.codec.record_bytes
        size = self._record_bytes * self.manifest.dataset["count"] * self.views * len(self._members)
        self.outgrows_memory = size > memory.limit() / 2
        """Whether the system cannot be expected to keep what it has read."""
        self._checked: set[View] = set()
        self._mapped: dict[View, Records] = {}
        self._held: dict[View, HeldView] = {}

    def __getstate__(self) -> dict:
        """Without what is in this process's memory."""
        return {**vars(self), "_mapped": {}, "_held": {}}

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
        `self.checkpoints`, and defaults to all of them. Raises `UserError` where a shard is missing or bad, of which
        all of a view's are compared with their checksums when the first of its records is asked for."""
        names = [self._members[m] for m in members] if members else self._members
        ids = ids.astype(np.int64)
        count = self.manifest.dataset["count"]
        if not ((ids >= 0) & (ids < count)).all():  # from here on, nothing else looks
            raise IndexError(f"sample ids from {ids.min()} to {ids.max()}, the store has 0 to {count - 1}")
        # What is mapped of other views is not needed again soon. A new dict each time: threads may call this at once.
        mapped = {key: each for key, each in self._mapped.items() if key[1] == view}
        out = np.empty((len(ids), len(names), self._record_bytes), dtype=np.uint8)
        for m, name in enumerate(names):
            records = self._held.get((name, view)) or mapped.get((name, view))
            if records is None:
                records = mapped[name, view] = self._map(name, view)
            _gather(records.addresses, self.manifest.shard_size, ids, out[:, m])
        self._mapped = mapped
        return out

    def logits(self, ids: np.ndarray, view: int, member: int = 0) -> torch.Tensor:
        """What the records of one of the checkpoints tell of its logits, at T = 1 where that matters: float32 [n,
        classes]; see `rows`."""
        return self.codecs[member].decode(torch.from_numpy(self.rows(ids, view, [member])[:, 0]), 1.0)

    def _map(self, name: str, view: int) -> Records:
        shards = self.manifest.shards(name, view)
        content = (name, view) not in self._checked
        self.require_no([fault for shard in shards if (fault := self.fault(shard, content=content))])
        self._checked.add((name, view))
        return MappedView(self.store, self.manifest, shards, random=self.outgrows_memory)

    # -------------------------------------------------------------------------------------- checks

    def views_of(self, members: list[int], view: int) -> set[View]:
        """What is read where records of `members`, counted among `self.checkpoints`, are under `view`."""
        return {(self._members[m], view) for m in members}

    def fault(self, shard: Shard, *, content: bool = True, into: np.ndarray | None = None) -> str | None:
        """See `check.shard_fault`."""
        basis_sha256 = self._basis_sha256[shard.checkpoint]
        return shard_fault(self.store, self.manifest, shard, basis_sha256, content=content, into=into)

    def check_shards(self, views: int | None = None, *, content: bool = True) -> None:
        """Look at every shard of the first `views` (default: of all), and compare all of it with its checksum unless
        the `content` can wait until it is read; collective: ranks share the work. Raises `UserError`, on every rank,
        for one that is missing or does not match."""
        self.require_no(
            [fault for _, fault in faults(self.store, self.manifest, self._members, views, content=content)]
        )
        if content:
            self._checked |= {(name, view) for name in self._members for view in range(views or self.views)}

    def require_no(self, found: list[str]) -> None:
        """Raise `UserError` where shards have faults."""
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        require(not found, f"{self._option}: {found and found[0]}{more}: run python -m ckd_dist.store repair")

    def take(self, views: Mapping[View, HeldView | None]) -> None:
        """Views that were checked, and those that are in memory."""
        self._checked |= views.keys()
        self._held |= {key: held for key, held in views.items() if held}

    def release(self, but: set[View]) -> None:
        """Forget what is in memory of other views than these."""
        self._held = {key: held for key, held in self._held.items() if key in but}

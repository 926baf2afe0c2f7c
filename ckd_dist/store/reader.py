"""Reading logits: rows of any samples, in any order, from memory-mapped shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ckd_dist import checkpoint, dist
from ckd_dist.config import UserError, require
from ckd_dist.data import DatasetInfo
from ckd_dist.store.check import shard_fault
from ckd_dist.store.manifest import Manifest
from ckd_dist.views import ViewRecipe


class StoreReader:
    """The logits of one checkpoint, or the mean of several (the paper's ensemble)."""

    def __init__(self, store: str, epochs: list[int], info: DatasetInfo):
        """Open `store` for the images of `info`; collective.

        Raises `UserError`, on every rank, for a store of other images, a checkpoint that it lacks, or a shard that is
        missing or does not match its checksum.
        """
        self.store = Path(store)
        self.manifest = Manifest.load(self.store, "teacher.store")
        dataset = self.manifest.dataset
        for key, ours in (
            ("content_hash", info.content_hash),
            ("count", info.count),
            ("num_classes", info.num_classes),
        ):
            require(
                dataset[key] == ours,
                f"teacher.store: {store} is of images with {key} {dataset[key]}, data.train has {ours}",
            )
        available = {values["epoch"]: name for name, values in self.manifest.checkpoints.items()}
        self.epochs = checkpoint.choose(dict(sorted(available.items())), epochs, "teacher.checkpoints")
        self._members = [available[epoch] for epoch in self.epochs]
        self._maps: dict[tuple[str, int, int], np.ndarray] = {}
        self._check_shards()

    @property
    def recipe(self) -> ViewRecipe:
        """How the cached views were drawn."""
        return ViewRecipe.from_dict(self.manifest.recipe)

    def rows(self, ids: np.ndarray, view: int) -> np.ndarray:
        """Teacher logits of samples `ids` [n] under `view`: float32 [n, classes], the mean over the members."""
        size, classes = self.manifest.shard_size, self.manifest.dataset["num_classes"]
        total = np.zeros((len(ids), classes), dtype=np.float32)
        shard_of, offset = np.divmod(ids.astype(np.int64), size)
        for shard in np.unique(shard_of):
            where = np.flatnonzero(shard_of == shard)
            for member in self._members:
                total[where] += self._map(member, view, int(shard))[offset[where]]
        return total / len(self._members) if len(self._members) > 1 else total

    def _map(self, member: str, view: int, index: int) -> np.ndarray:
        key = (member, view, index)
        if key not in self._maps:
            path = self.manifest.shards(member, view)[index].path(self.store)
            self._maps[key] = np.load(path, mmap_mode="r")
        return self._maps[key]

    def _check_shards(self) -> None:
        """Compare every shard that will be read with its checksum; ranks share the work."""
        shards = [shard for member in self._members for shard in self.manifest.checkpoint_shards(member)]
        mine = shards[dist.rank() :: dist.world_size()]
        faults = [fault for shard in mine if (fault := shard_fault(self.store, self.manifest, shard))]
        everyones = [fault for faults in dist.gather_objects(faults) for fault in faults]
        if everyones:
            more = f" (and {len(everyones) - 1} more)" if len(everyones) > 1 else ""
            raise UserError(f"teacher.store: {everyones[0]}{more}: run cache_logits again with the same options")

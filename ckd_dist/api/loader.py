"""The FFCV loader, as a training loop of one's own uses it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ckd_dist.api.store import Store
from ckd_dist.core.errors import require
from ckd_dist.data.batch import Batch
from ckd_dist.data.beton import open_beton
from ckd_dist.data.loader import BetonLoader
from ckd_dist.data.options import LoaderConfig
from ckd_dist.data.order import rank_share, shuffled_ids, train_ids
from ckd_dist.store.reader import as_cached


@dataclass(kw_only=True)
class TaughtBatch(Batch):
    """A `Batch` of images with what the teacher says of them."""

    view: int
    """Under which the images are seen."""
    store: Store

    @property
    def logits(self) -> torch.Tensor:
        """The teacher's, float32 [n, checkpoints, classes], on the device: `Store.decode` of `teacher_records`."""
        assert self.teacher_records is not None
        return self.store.decode(self.teacher_records)


class Loader:
    """Batches of a .beton file with the teacher's logits, in the order and under the views that `distill` has for the
    same seed: an iterable of `TaughtBatch`, whose images are normalised and on the device.

    Under torch.distributed each rank has its share of every batch.
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        store: Store,
        *,
        batch_size: int,
        seed: int = 0,
        size: int | None = None,
        workers: int | None = None,
        device: torch.device | str = "cpu",
    ):
        """Open the .beton file `images`, of which `store` is. Collective.

        Args:
            images: a file of data_prep.write_beton.
            store: of `open_store`.
            batch_size: images an optimiser step, over all ranks.
            seed: of the order.
            size: side of the square images, in pixels; default: the teacher's.
            workers: decoding threads of each rank; default: as `--data.workers`.
            device: where batches are put; on a GPU the next one is copied while a step computes.

        Raises:
            UserError: the file is missing, damaged, or not the one that the store is of.
        """
        reader = store.reader
        reader.manifest.require_plain_views("store", reader.store)
        info = as_cached(open_beton(Path(images), "images"), reader.manifest, "store", reader.store)
        require(batch_size <= info.count, f"batch_size {batch_size} is larger than the {info.count} images of {images}")
        self.store, self.batch_size, self.seed = store, batch_size, seed
        share = rank_share(batch_size)
        self._loader = BetonLoader(
            info,
            LoaderConfig(workers=workers),
            store.recipe,
            batch_size=share.stop - share.start,
            image_size=size or store.image_size,
            device=torch.device(device),
            view_seed=store.seed,
            mean=reader.manifest.forward["mean"],
            std=reader.manifest.forward["std"],
        )
        self.epoch = self.first_step = 0

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Have the next iteration give epoch `epoch`: view epoch mod `store.views` of all images, shuffled by (seed,
        epoch), from step `first_step` on, for a training that goes on."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        """Steps of the next iteration; what remains of the images after the last whole batch is left out."""
        return self.store.count // self.batch_size - self.first_step

    def __iter__(self) -> Iterator[TaughtBatch]:
        view = self.epoch % self.store.views
        ids = train_ids(shuffled_ids(self.store.count, self.seed, self.epoch), self.batch_size, self.first_step)
        for batch in self._loader.batches(ids, view, self.store.reader.rows):
            fields = {each.name: getattr(batch, each.name) for each in dataclasses.fields(Batch)}
            yield TaughtBatch(**fields, view=view, store=self.store)

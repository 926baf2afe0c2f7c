"""What the teacher says of the images of a batch: fetched from a store, or made by its networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ckd_dist.data.batch import Rows
from ckd_dist.nn.features import FeatureLayer, forward_maps
from ckd_dist.nn.forward import forward_logits
from ckd_dist.store.codecs import Dense
from ckd_dist.store.reader import StoreReader


@dataclass(frozen=True)
class StoredRecords:
    """Records of some of the checkpoints of an open store; `data.batch.Rows`."""

    reader: StoreReader
    checkpoints: list[int]
    """Positions among the reader's."""

    def __call__(self, ids: np.ndarray, view: int) -> np.ndarray:
        """Of samples `ids`, int64 [n]: uint8 [n, checkpoints, bytes]."""
        return self.reader.rows(ids, view, self.checkpoints)


@dataclass(frozen=True)
class OnlineRecords:
    """Makes the records of a batch, as a dense store of these networks would hold them."""

    networks: Sequence[nn.Module]
    codec: Dense
    amp: str
    stages: Sequence[FeatureLayer] = ()
    """Of the only network, those whose maps are wanted too."""

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(logits of each network, uint8 [n, networks, bytes], rounded as the dense store rounds them, so that cached
        and online teachers give the same numbers; maps of the `stages`)."""
        if self.stages:
            (network,) = self.networks
            logits, maps = forward_maps(network, self.stages, images, self.amp)
            return self.codec.encode(logits)[:, None], maps
        records = [self.codec.encode(forward_logits(network, images, self.amp)) for network in self.networks]
        return torch.stack(records, dim=1).clone(), []  # made outside inference mode: autograd may save it


@dataclass(frozen=True)
class EpochInputs:
    """What an epoch trains on."""

    views: list[int]
    """Of the images: each comes under all of them in a step."""
    rows: Rows | None = None
    """Fetches the teacher's records from a store, in the loader's thread."""
    teacher: OnlineRecords | None = None
    """Makes the teacher's records of every batch."""

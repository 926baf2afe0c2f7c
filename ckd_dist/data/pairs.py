"""Mixup and cutmix of the images of a step, each with its neighbour, on the device: no image is decoded for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from ckd_dist.core import dist
from ckd_dist.core.errors import require
from ckd_dist.data.batch import Batch, Mixed
from ckd_dist.data.options import TrainDataConfig
from ckd_dist.data.order import rank_share
from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.data.views.mixing import mixes


@dataclass(frozen=True)
class PairMixing:
    """Mixes the images of every step in pairs, neighbours in the order of the epoch: each of the two with the other, by
    the same weight or box. A function of (seed, step) alone, on any number of processes.

    Zhang et al., "mixup" (arXiv 1710.09412); Yun et al., "CutMix" (arXiv 1905.04899).
    """

    config: TrainDataConfig
    seed: int

    @classmethod
    def of(cls, config: TrainDataConfig, seed: int) -> PairMixing | None:
        """As the options say; None where they ask for none. Raises `UserError` for a batch that is not all pairs."""
        if not (config.pair_mixup or config.pair_cutmix):
            return None
        pairs = 2 * dist.world_size() * config.repeats
        require(
            config.batch_size % pairs == 0,
            f"data.batch_size {config.batch_size}: data.pair_mixup and data.pair_cutmix mix pairs of images, on "
            f"{dist.world_size()} processes: make it a multiple of {pairs}",
        )
        return cls(config, seed)

    def __call__(self, batch: Batch, step: int) -> Batch:
        """This rank's part of the batch of a step, whose images [n] lie in pairs: images 0 and 1, 2 and 3, and so on.
        What a store says of the partners goes with it."""
        device, size = batch.images.device, batch.images.shape[-1]
        boxes, blended, weights = (
            torch.from_numpy(each).to(device, non_blocking=True) for each in self._draws(step, size)
        )
        partner = torch.arange(len(batch.images), device=device) ^ 1
        others = batch.images[partner].contiguous(memory_format=torch.channels_last)
        images = torch.lerp(others, batch.images, blended[:, None, None, None])
        if self.config.pair_cutmix:
            images = torch.where(_inside(boxes, size), others, images)
        records = batch.teacher_records
        mixed, theirs = Mixed(batch.labels[partner], weights), None if records is None else records[partner]
        return replace(batch, images=images, mixed=mixed, partner_records=theirs)

    def _draws(self, step: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each image of this rank the box (top, left, bottom, right) in pixels that shows its partner, int64
        [n, 4]; the weight that it is blended by, float32 [n], 1 where it has a box; its share of the result, float32
        [n]."""
        turns, batch_size = self.config.repeats, self.config.batch_size // self.config.repeats
        own = rank_share(batch_size)
        pairs = np.arange(turns * batch_size // 2).reshape(turns, -1)[:, own.start // 2 : own.stop // 2].reshape(-1)
        recipe = ViewRecipe(kind="center_crop", mixup=self.config.pair_mixup, cutmix=self.config.pair_cutmix)
        _, blended, boxes = mixes(recipe, self.seed, -1 - step, pairs, 1)  # no view has such a number
        edges = np.floor(boxes * size + 0.5).astype(np.int64)  # as pixel_box
        top, left, bottom, right = edges.T
        cuts = boxes[:, 2] > boxes[:, 0]
        blended = np.where(cuts, np.float32(1), blended)
        shares = blended * (1 - (bottom - top) * (right - left) / size**2).astype(np.float32)
        return np.repeat(edges, 2, axis=0), np.repeat(blended, 2), np.repeat(shares, 2)


def _inside(boxes: torch.Tensor, size: int) -> torch.Tensor:
    """Which pixels are in a box of int64 [n, 4]: bool [n, 1, size, size]."""
    places = torch.arange(size, device=boxes.device)
    top, left, bottom, right = boxes.T[:, :, None]
    rows, columns = (places >= top) & (places < bottom), (places >= left) & (places < right)
    return (rows[:, :, None] & columns[:, None, :])[:, None]

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
        config, rng = self.config, np.random.default_rng([self.seed, step, 2])
        batch_size = config.batch_size // config.repeats
        shape = (config.repeats, batch_size // 2)  # of pairs, for each of the views
        kinds, y, x = rng.random((3, *shape))
        cuts = kinds < (0 if not config.pair_cutmix else 0.5 if config.pair_mixup else 1)
        blended = rng.beta(config.pair_mixup, config.pair_mixup, shape) if config.pair_mixup else np.ones(shape)
        kept = rng.beta(config.pair_cutmix, config.pair_cutmix, shape) if config.pair_cutmix else np.ones(shape)
        half = 0.5 * np.sqrt(1 - np.where(cuts, kept, 1))
        edges = np.rint(np.clip([y - half, x - half, y + half, x + half], 0, 1) * size).astype(np.int64)
        own = rank_share(batch_size)
        pairs = slice(own.start // 2, own.stop // 2)
        boxes, blended = np.moveaxis(edges, 0, -1)[:, pairs], np.where(cuts, 1, blended)[:, pairs]
        top, left, bottom, right = np.moveaxis(boxes, -1, 0)
        shares = blended * (1 - (bottom - top) * (right - left) / size**2)
        weights, shares = (np.repeat(each.reshape(-1), 2).astype(np.float32) for each in (blended, shares))
        return np.repeat(boxes.reshape(-1, 4), 2, axis=0), weights, shares


def _inside(boxes: torch.Tensor, size: int) -> torch.Tensor:
    """Which pixels are in a box of int64 [n, 4]: bool [n, 1, size, size]."""
    places = torch.arange(size, device=boxes.device)
    top, left, bottom, right = boxes.T[:, :, None]
    rows, columns = (places >= top) & (places < bottom), (places >= left) & (places < right)
    return (rows[:, :, None] & columns[:, None, :])[:, None]

"""The order of the images of an epoch, and each rank's share of it."""

from __future__ import annotations

import numpy as np

from ckd_dist.core import dist
from ckd_dist.core.errors import require


def digested_ids(count: int) -> np.ndarray:
    """A few sample ids, spread over all of `count`, int64: those whose views a store keeps the hashes of."""
    return np.unique(np.linspace(0, count - 1, 4).astype(np.int64))


def shuffled_ids(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a permutation of all sample ids, int64 [count], the same on every rank."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def quasi_random_ids(pages: np.ndarray, window: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch that reads few pages of the file at a time, int64 [count], the same on every rank: pages
    in random order, and the images, whose `pages` int64 [count] are given, shuffled within every `window` pages."""
    shuffled = np.random.default_rng([seed, epoch, 1]).permutation(np.unique(pages))
    place = np.empty(pages.max() + 1, dtype=np.int64)
    place[shuffled] = np.arange(len(shuffled))
    order = shuffled_ids(len(pages), seed, epoch)
    return order[np.argsort(place[pages[order]] // window, kind="stable")]


def part_of_order(order: np.ndarray, batch_size: int, repeats: int, epoch: int) -> np.ndarray:
    """What of an `order` of all images epoch `epoch` trains on where a step has each image `repeats` times: so many
    epochs, each of as many steps as ever, share the order out."""
    images = len(order) // batch_size * (batch_size // repeats)
    part = epoch % repeats
    return order[part * images : (part + 1) * images] if repeats > 1 else order


def rank_share(batch_size: int) -> slice:
    """The part of every global batch that this rank takes; parts differ by one image at most."""
    rank, world = dist.rank(), dist.world_size()
    require(batch_size >= world, f"data.batch_size {batch_size} is smaller than the {world} processes that share it")
    return slice(batch_size * rank // world, batch_size * (rank + 1) // world)


def train_ids(order: np.ndarray, batch_size: int, first_step: int = 0) -> np.ndarray:
    """This rank's sample ids of an epoch, batch after batch, from step `first_step` of it; int64.

    Step s trains on ids [s * batch_size, (s + 1) * batch_size) of the epoch's `order`, whatever the world size. What
    remains after the last whole batch is left out.
    """
    steps = len(order) // batch_size
    batches = order[: steps * batch_size].reshape(steps, batch_size)
    return batches[first_step:, rank_share(batch_size)].reshape(-1)

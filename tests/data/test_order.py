"""The order in which images are trained on: the same for every number of ranks, random, and kind to the disk."""

from __future__ import annotations

import numpy as np
import pytest

from ckd_dist.core import dist
from ckd_dist.data import dataset
from ckd_dist.data.loader import BetonLoader, sample_pages
from ckd_dist.data.options import TrainDataConfig
from ckd_dist.data.order import quasi_random_ids, rank_share, shuffled_ids, train_ids
from tests.helpers.views import CPU, PAD


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_share_every_global_batch(world, monkeypatch):
    batch_size, parts, order = 10, [], shuffled_ids(103, 5, 2)
    for rank in range(world):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(dist, "world_size", lambda: world)
        share = rank_share(batch_size)
        assert share.stop - share.start in (batch_size // world, -(-batch_size // world))
        parts.append(train_ids(order, batch_size).reshape(10, -1))
        np.testing.assert_array_equal(train_ids(order, batch_size, first_step=4).reshape(6, -1), parts[-1][4:])
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), order[:100].reshape(10, 10))


def test_quasi_random_order_takes_every_image_once_few_pages_at_a_time():
    images, pages = 20_000, np.repeat(np.arange(400, 600), 100)  # 200 pages after 400 of something else
    order, again, next_epoch, other_seed = (
        quasi_random_ids(pages, 20, seed, epoch) for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    np.testing.assert_array_equal(order, again)
    windows = []
    for ids in (order, next_epoch, other_seed):
        np.testing.assert_array_equal(np.sort(ids), np.arange(images))
        windows += [set(pages[part]) for part in ids.reshape(10, 2000)]
        assert all(len(window) == 20 for window in windows[-10:])
        # Within a window the order is random: of 256 images one expects all 20 pages, each 12.8 times.
        for batch in ids[: 256 * 70].reshape(70, 256):
            assert len(np.unique(pages[batch])) >= 20 and np.unique(pages[batch], return_counts=True)[1].max() < 40
    assert not any(a == b for n, a in enumerate(windows) for b in windows[:n])  # nor are the windows those of before


def test_an_epoch_has_the_order_that_the_options_ask_for(fashion):
    info = dataset.read_info(fashion["train"], "")
    config = TrainDataConfig(train=str(info.path), order="quasi_random", window_pages=1)
    pages, size = sample_pages(info)
    assert size >= 2**20 and pages.min() >= 0 and len(pages) == info.count
    images = BetonLoader(info, config, PAD, batch_size=50, image_size=28, device=CPU)
    np.testing.assert_array_equal(images.epoch_ids(config, 3, 2), quasi_random_ids(pages, 1, 3, 2))

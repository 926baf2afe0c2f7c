"""Images of a step mixed in pairs, or under several views at once: what they are, and the same on every rank count."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ckd_dist.core import dist
from ckd_dist.core.errors import UserError
from ckd_dist.data.batch import Batch
from ckd_dist.data.options import TrainDataConfig
from ckd_dist.data.order import part_of_order, rank_share, train_ids
from ckd_dist.data.pairs import PairMixing


def config(**more) -> TrainDataConfig:
    return TrainDataConfig(**{"train": "-", "batch_size": 48, "pair_mixup": 0.7, "pair_cutmix": 0.9, **more})


def random_batch(count: int, size: int = 8) -> Batch:
    """Images that tell every pixel apart, with what a store says of them."""
    images = torch.arange(count * 3 * size * size).reshape(count, 3, size, size).float()
    records = torch.arange(count, dtype=torch.uint8)[:, None, None]
    images = images.to(memory_format=torch.channels_last)
    return Batch(images, torch.arange(count) + 100, torch.arange(count), teacher_records=records)


def test_each_of_a_pair_is_mixed_with_the_other_by_what_its_weight_says():
    batch, cuts = random_batch(48), 0
    mixed = PairMixing(config(), 3)(batch, 5)
    assert mixed.images.is_contiguous(memory_format=torch.channels_last)
    partner = torch.arange(48) ^ 1
    assert torch.equal(mixed.labels, batch.labels) and torch.equal(mixed.mixed.labels, batch.labels[partner])
    assert torch.equal(mixed.partner_records, batch.teacher_records[partner])
    assert torch.equal(mixed.teacher_records, batch.teacher_records)
    weights = mixed.mixed.weights
    assert torch.equal(weights, weights[partner]) and len(weights.unique()) > 15
    for n in range(48):
        own, other, image, weight = batch.images[n], batch.images[partner[n]], mixed.images[n], weights[n]
        if ((image == own) | (image == other)).all():  # a box of each shows the other
            shown = (image == other).all(dim=0)
            rows, columns = shown.any(dim=1).nonzero(), shown.any(dim=0).nonzero()
            assert shown.sum() == len(rows) * len(columns) == round(64 * (1 - float(weight)))
            cuts += 1
        else:
            torch.testing.assert_close(image, weight * own + (1 - weight) * other, rtol=1e-6, atol=1e-3)
    assert 12 < cuts < 40


@pytest.mark.parametrize(
    ("more", "expected", "deviation"),
    [
        ({"pair_mixup": 1.0, "pair_cutmix": 0}, 0.5, 12**-0.5),  # uniform
        ({"pair_mixup": 0.2, "pair_cutmix": 0}, 0.5, 0.5 * (1 / 1.4) ** 0.5),  # Beta(a, a): 1 / sqrt(4 (2 a + 1))
    ],
)
def test_weights_are_of_the_beta_distribution(more, expected, deviation):
    mixing = PairMixing(config(batch_size=2000, **more), 0)
    weights = torch.cat([mixing(random_batch(2000, 2), step).mixed.weights[::2] for step in range(10)])
    assert len(weights) == 10_000
    assert float(weights.mean()) == pytest.approx(expected, abs=4 * deviation / 100)
    assert float(weights.std()) == pytest.approx(deviation, abs=0.01)


@pytest.mark.parametrize(("world", "repeats"), [(2, 1), (3, 1), (3, 2), (2, 3)])
def test_ranks_mix_as_one_process_does(world, repeats, monkeypatch):
    options, batch = config(repeats=repeats), random_batch(48)
    whole = PairMixing.of(options, 3)(batch, 5)
    monkeypatch.setattr(dist, "world_size", lambda: world)
    seen = []
    for rank in range(world):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        share, each = rank_share(48 // repeats), 48 // repeats
        own = np.concatenate([np.arange(48)[turn * each : (turn + 1) * each][share] for turn in range(repeats)])
        records = batch.teacher_records[own]
        part = Batch(batch.images[own], batch.labels[own], batch.ids[own], teacher_records=records)
        mixed = PairMixing.of(options, 3)(part, 5)
        assert torch.equal(mixed.images, whole.images[own])
        for found, wanted in zip(
            (*mixed.mixed, mixed.partner_records), (*whole.mixed, whole.partner_records), strict=True
        ):
            assert torch.equal(found, wanted[own])
        seen += own.tolist()
    assert sorted(seen) == list(range(48))


def test_a_batch_that_is_not_all_pairs_is_refused(monkeypatch):
    monkeypatch.setattr(dist, "world_size", lambda: 4)
    assert PairMixing.of(config(pair_mixup=0.0, pair_cutmix=0.0, batch_size=50), 0) is None
    with pytest.raises(UserError, match=r"data\.batch_size 52: .* on 4 processes: make it a multiple of 8"):
        PairMixing.of(config(batch_size=52), 0)
    with pytest.raises(UserError, match=r"data\.repeats 5 does not divide data\.batch_size 48"):
        config(repeats=5)


@pytest.mark.parametrize(("batch_size", "repeats"), [(12, 3), (16, 2), (10, 1)])
def test_repeated_images_have_every_view_once_in_as_many_epochs(batch_size, repeats):
    order = np.random.default_rng(0).permutation(100)
    seen = []
    for epoch in range(6, 6 + repeats):
        ids = train_ids(part_of_order(order, batch_size, repeats, epoch), batch_size // repeats)
        assert len(ids) == 100 // batch_size * (batch_size // repeats)  # as many steps as without
        seen += ids.tolist()
    assert len(set(seen)) == len(seen) == 100 // batch_size * batch_size

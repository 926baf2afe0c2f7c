"""The FFCV loader in a loop of one's own has the images, labels and logits that the views and the store have."""

from __future__ import annotations

import pytest
import torch

import ckd_dist
from ckd_dist.core.errors import UserError
from tests.helpers.here import cache_here
from tests.helpers.stores import cache_options


def test_batches_are_those_of_the_views_without_ffcv(fashion, teacher, tmp_path):
    cache_here(
        *cache_options(fashion, teacher, tmp_path / "store", "--data.mixup", 0.5, "--teacher.checkpoints", "[1,3]")
    )
    store = ckd_dist.open_store(tmp_path / "store", [1, 3])
    loader = ckd_dist.Loader(fashion["train"], store, batch_size=100, seed=7, size=20)
    views = ckd_dist.Views(ckd_dist.BetonImages(fashion["train"]), store.recipe, seed=store.seed, size=20)
    sampler = ckd_dist.ViewSampler(len(views), views=store.views, batch_size=100, seed=7)
    for epoch in (0, 3):
        loader.set_epoch(epoch)
        sampler.set_epoch(epoch)
        plain = torch.utils.data.DataLoader(views, batch_size=100, sampler=sampler)
        assert len(loader) == len(plain) == 12
        for ours, theirs in zip(loader, plain, strict=True):
            assert torch.equal(ours.images, store.normalize(theirs["image"]))
            assert torch.equal(ours.labels, theirs["label"]) and torch.equal(ours.ids, theirs["id"])
            assert [ours.view] * 100 == theirs["view"].tolist() == [epoch % 2] * 100
            assert torch.equal(ours.logits, store.logits(theirs["id"], theirs["view"]))
            mixed = (theirs["other_label"], theirs["weight"])
            assert all(torch.equal(a, b) for a, b in zip(ours.mixed, mixed, strict=True))
            student = torch.randn(100, 10)
            loss = store.loss(student, ours.ids, ours.view, ours.labels, mixed=ours.mixed, records=ours.teacher_records)
            assert torch.equal(loss, store.loss(student, theirs["id"], theirs["view"], theirs["label"], mixed=mixed))
    whole = [batch.ids.tolist() for batch in loader]
    loader.set_epoch(3, first_step=10)
    assert len(loader) == 2 and [batch.ids.tolist() for batch in loader] == whole[10:]


def test_what_does_not_go_together_is_refused(fashion, store):
    opened = ckd_dist.open_store(store)
    with pytest.raises(UserError, match="is of images with content_hash"):
        ckd_dist.Loader(fashion["holdout"], opened, batch_size=10)
    with pytest.raises(UserError, match="batch_size 2000 is larger than the 1201 images"):
        ckd_dist.Loader(fashion["train"], opened, batch_size=2000)

"""Batches are what was decoded, however long it takes to copy them."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ckd_dist.core.errors import UserError
from ckd_dist.data import dataset
from ckd_dist.data.loader import BetonLoader, decode_view
from ckd_dist.data.options import LoaderConfig
from ckd_dist.data.order import quasi_random_ids
from ckd_dist.data.recipe import ViewRecipe
from tests.helpers.views import CPU, EVERYTHING, PAD, RRC, loader


class LateCopy(threading.Thread):
    """A copy by a stream of its own, as a GPU's: it is done some time after it was asked for."""

    def __init__(self, target, source):
        super().__init__()
        self._target, self._source = target, source
        self.start()

    def run(self):
        time.sleep(0.01)
        self._target.copy_(self._source)

    def synchronize(self):
        self.join()


def test_a_batch_is_copied_before_its_buffers_are_written_again(fashion, monkeypatch):
    def start_copy(self, arrays):
        images, labels, ids, _ = arrays
        copy = torch.empty_like(images)
        return ids[:, 0].clone(), [copy, labels[:, 0].clone(), None, None, None], LateCopy(copy, images)

    def batches():
        info = dataset.read_info(fashion["train"], "")
        recipe, cpu = ViewRecipe(kind="pad_crop"), torch.device("cpu")
        loader = BetonLoader(info, LoaderConfig(), recipe, batch_size=16, image_size=28, device=cpu)
        return [batch.images for batch in loader.batches(np.arange(info.count))]

    at_once = batches()
    monkeypatch.setattr(BetonLoader, "_start_copy", start_copy)
    late = batches()
    assert len(at_once) == 76
    assert [n for n, (a, b) in enumerate(zip(at_once, late, strict=True)) if not torch.equal(a, b)] == []


def test_an_error_in_the_loader_thread_reaches_the_user(photographs):
    def rows(ids, view_id):
        raise RuntimeError("no such row")

    with pytest.raises(RuntimeError, match="no such row"):
        list(loader(photographs, RRC, 48).batches(np.arange(101), 0, rows))


def test_leaving_an_epoch_early_ends_its_thread(photographs):
    beton_loader = loader(photographs, RRC, 48, batch_size=4)
    threads = threading.active_count()
    for _ in range(3):
        batches = beton_loader.batches(np.arange(101))
        next(batches)
        batches.close()
    assert threading.active_count() == threads


def test_a_batch_stays_as_it_is_when_later_ones_come(fashion):
    beton_loader = loader(fashion["train"], PAD, 28, batch_size=16)
    kept = list(beton_loader.batches(np.arange(320)))
    again = [(b.images.clone(), b.labels.clone(), b.ids.clone()) for b in beton_loader.batches(np.arange(320))]
    for batch, (images, labels, ids) in zip(kept, again, strict=True):
        assert torch.equal(batch.images, images) and torch.equal(batch.labels, labels) and torch.equal(batch.ids, ids)
    assert [b.ids.tolist() for b in kept] == [list(range(i, i + 16)) for i in range(0, 320, 16)]


def test_pages_are_asked_for_once_before_their_images_turn(fashion, monkeypatch):
    info = dataset.read_info(fashion["train"], "")
    pages = np.arange(info.count) // 100
    asked = []
    monkeypatch.setattr("ckd_dist.data.loader.sample_pages", lambda info: (pages, 4096))
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, size, advice: asked.append(start // size))
    order = quasi_random_ids(pages, 3, 0, 0)
    config = LoaderConfig()
    ahead = BetonLoader(info, config, PAD, batch_size=50, image_size=28, device=CPU, pages_ahead=3)
    seen = set()
    for batch in ahead.batches(order):
        seen |= set(pages[batch.ids.numpy()].tolist())
        assert seen <= set(asked)
    assert sorted(asked) == list(range(13)) and len(asked) == len(seen)


@pytest.mark.parametrize(
    ("name", "recipe", "size"),
    [("photographs", replace(RRC, **EVERYTHING), 48), ("fashion", PAD, 28), ("fashion", PAD, 40)],
)
def test_a_view_decoded_alone_is_that_of_the_loader(name, recipe, size, request):
    path = request.getfixturevalue(name)
    info = dataset.read_info(path if isinstance(path, Path) else path["train"], "")
    ids = np.array([5, 0, 77, 3])
    (batch,) = loader(info.path, recipe, size, seed=9).batches(ids, 4)
    alone = torch.from_numpy(decode_view(info, recipe, 9, 4, ids, size))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (info.mean, info.std))
    torch.testing.assert_close(batch.images, (alone.permute(0, 3, 1, 2) / 255 - mean) / std, rtol=0, atol=1e-5)


def test_mixing_without_the_page_cache_is_refused(photographs):
    with pytest.raises(UserError, match=r"data\.os_cache"):
        loader(photographs, replace(RRC, mixup=0.2), 48, os_cache=False)

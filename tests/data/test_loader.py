"""Batches are what was decoded, however long it takes to copy them."""

from __future__ import annotations

import threading
import time

import numpy as np
import torch

from ckd_dist.data import dataset
from ckd_dist.data.loader import BetonLoader
from ckd_dist.data.options import LoaderConfig
from ckd_dist.data.recipe import ViewRecipe


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

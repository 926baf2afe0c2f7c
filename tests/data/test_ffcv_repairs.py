"""What FFCV is mended to do: buffers are for a batch, not for the largest image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ckd_dist.data.ffcv_repairs import Epoch
from tests.helpers.views import EVERYTHING, RRC, loader


@pytest.mark.parametrize("recipe", [RRC, replace(RRC, **EVERYTHING)], ids=["plain", "mixed"])
def test_buffers_are_in_proportion_to_a_batch_whatever_the_largest_image(photographs, recipe):
    epoch = Epoch(loader(photographs, recipe, 48).pipeline, np.arange(64, dtype=np.uint64), lambda ids: [])

    def held(value):
        return sum(map(held, value)) if isinstance(value, (list, tuple)) else getattr(value, "nbytes", 0)

    slots = epoch.loader.batches_ahead + 2
    images = slots * 32 * 48 * 48 * 3
    labels_and_ids = slots * 32 * 2 * 8
    assert held([*epoch.memory_allocations["operation"].values()]) == (1 + recipe.mixes) * images + labels_and_ids
    epoch.close()

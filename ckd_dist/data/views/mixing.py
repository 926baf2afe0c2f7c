"""Mixup and cutmix: with which other image a view is mixed, and how."""

from __future__ import annotations

import math

import numpy as np
from numba import int64

from ckd_dist.data.jit import compiled
from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.data.views.draws import (
    CUTMIX_X,
    CUTMIX_Y,
    MIX_WEIGHT,
    MIXED,
    MIXUP_OR_CUTMIX,
    PARTNER,
    stream_key,
    uniform,
)
from ckd_dist.data.views.geometry import pixel_box
from ckd_dist.data.views.parameters import Parameters, parameters


def mixes(
    recipe: ViewRecipe, seed: int, view_id: int, ids: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """With what each image `ids` [n] of a view that mixes is mixed, as `draw_mix` says: partners among `count` samples,
    int64 [n]; the weight of the image itself, float32 [n]; boxes that show the partner, float64 [n, 4]."""
    return _mixes(parameters(recipe), seed, view_id, ids.astype(np.int64), count)


@compiled
def _mixes(values, seed, view_id, ids, count):
    partners, weights = np.empty(len(ids), dtype=np.int64), np.empty(len(ids), dtype=np.float32)
    boxes = np.empty((len(ids), 4))
    for i in range(len(ids)):
        partners[i], weights[i], box = draw_mix(seed, view_id, ids[i], count, values)
        for edge in range(4):
            boxes[i, edge] = box[edge]
    return partners, weights, boxes


@compiled
def draw_mix(seed, view_id, sample, count, values):
    """(partner, weight of the image itself, box of the partner (top, left, bottom, right) in shares of the sides): of
    mixup the box is empty, of cutmix the weight is what the box leaves. At weight 1 the partner has no part in the
    image: it need not be made. An image that is not drawn to be mixed is its own partner."""
    key, recipe = stream_key(seed, view_id, sample), Parameters(*values)
    if uniform(key, MIXED) >= recipe.mix:
        return int64(sample), 1.0, (0.0, 0.0, 0.0, 0.0)
    partner = int64(uniform(key, PARTNER) * count)
    n = int64(uniform(key, MIX_WEIGHT) * 4096)
    if recipe.mixup and not (recipe.cutmix and uniform(key, MIXUP_OR_CUTMIX) < 0.5):
        return partner, recipe.mixup_weights[n] / 256.0, (0.0, 0.0, 0.0, 0.0)
    half = 0.5 * math.sqrt(1 - recipe.cutmix_weights[n] / 256.0)
    y, x = uniform(key, CUTMIX_Y), uniform(key, CUTMIX_X)
    top, bottom, left, right = max(y - half, 0.0), min(y + half, 1.0), max(x - half, 0.0), min(x + half, 1.0)
    return partner, 1 - (bottom - top) * (right - left), (top, left, bottom, right)


@compiled
def blend(image, partner, weight, box):
    """Mix `partner` into `image`, both uint8 [size, size, 3], by the weight or the box of `draw_mix`."""
    size = image.shape[0]
    if box[2] > box[0]:
        top, left, bottom, right = pixel_box(box, size)
        image[top:bottom, left:right] = partner[top:bottom, left:right]
        return
    ours = int64(256 * weight)
    for y in range(size):
        for x in range(size):
            for c in range(3):
                image[y, x, c] = (ours * image[y, x, c] + (256 - ours) * partner[y, x, c] + 128) >> 8

"""Gaussian blur."""

from __future__ import annotations

import numpy as np
from numba import float32, int32, int64, uint8

from ckd_dist.data.jit import compiled
from ckd_dist.data.views.draws import exp


@compiled
def blur(image, deviation):
    """Blur an image uint8 [height, width, 3] in place by a Gaussian of a standard deviation in pixels, mirrored at the
    border; as torchvision's gaussian_blur.

    Its kernel reaches to three deviations, rounded up: what lies beyond has 0.12 % of the weight at most, and would
    change a value by less than a third of a grey level.
    """
    height, width, _ = image.shape
    weights = _kernel(deviation, min(height, width) - 1)
    reach, count = len(weights) - 1, 3 * width
    source, values = image.copy().reshape(-1), image.reshape(-1)
    line = np.empty(count + 6 * reach, dtype=np.float32)
    for y in range(height):
        middle = line[3 * reach : 3 * reach + count]
        _add_rows(source, y, height, weights, middle)
        for x in range(1, reach + 1):
            for c in range(3):
                line[3 * (reach - x) + c] = middle[3 * x + c]
                line[3 * (reach + width - 1 + x) + c] = middle[3 * (width - 1 - x) + c]
        _add_neighbours(line, weights, values[y * count : (y + 1) * count])


@compiled
def _kernel(deviation, longest):
    """Weights of a pixel and of those at each distance to one side, float32 [reach + 1]; all of them add up to 1."""
    reach = min(int64(np.ceil(3 * deviation)), longest)
    weights, total = np.ones(reach + 1, dtype=np.float64), 1.0
    for distance in range(1, reach + 1):
        power = 0.5 * (distance / deviation) ** 2
        weight = 0.0
        if power < 64:  # else it is less than float32 can tell from nothing
            weight = exp(-power / 64)
            for _ in range(6):
                weight *= weight
        weights[distance] = weight
        total += 2 * weight
    return (weights / total).astype(np.float32)


@compiled
def _add_rows(source, y, height, weights, out):
    """Row y of the image `source`, flat, blurred along columns: float32 [values of a row]."""
    count = out.size
    row = source[y * count : (y + 1) * count]
    weight = weights[0]
    for i in range(count):
        out[i] = weight * float32(row[i])
    for distance in range(1, len(weights)):
        weight = weights[distance]
        up, down = abs(y - distance), height - 1 - abs(height - 1 - y - distance)
        above, below = source[up * count : (up + 1) * count], source[down * count : (down + 1) * count]
        for i in range(count):
            out[i] += weight * float32(int32(above[i]) + int32(below[i]))


@compiled
def _add_neighbours(line, weights, out):
    """Values of a row, blurred along it, to the nearest whole ones; `line` has its neighbours at both ends."""
    reach, count = len(weights) - 1, out.size
    sums, weight, middle = np.empty(count, dtype=np.float32), weights[0], line[3 * reach : 3 * reach + count]
    for i in range(count):
        sums[i] = float32(0.5) + weight * middle[i]
    for distance in range(1, reach + 1):
        weight, left, right = weights[distance], 3 * (reach - distance), 3 * (reach + distance)
        near, far = line[left : left + count], line[right : right + count]
        for i in range(count):
            sums[i] += weight * (near[i] + far[i])
    for i in range(count):
        out[i] = uint8(int32(min(sums[i], float32(255))))

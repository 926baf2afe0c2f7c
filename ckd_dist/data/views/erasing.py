"""Random erasing: a box that is filled with one colour."""

from __future__ import annotations

import math

from numba import uint8

from ckd_dist.data.jit import compiled
from ckd_dist.data.views.draws import (
    ERASE,
    ERASE_COLOUR,
    ERASE_LEFT,
    ERASE_SHAPES,
    ERASE_TOP,
    exp,
    lerp,
    uniform,
)
from ckd_dist.data.views.geometry import pixel_box


@compiled
def erased_box(key, recipe):
    """Box (top, left, bottom, right) in shares of the sides, empty where nothing is erased, and its colour, uint8 three
    times; as torchvision's RandomErasing.get_params."""
    box, colour = (0.0, 0.0, 0.0, 0.0), (uint8(0), uint8(0), uint8(0))
    if uniform(key, ERASE) >= recipe.erase:
        return box, colour
    for n in range(ERASE_SHAPES, ERASE_SHAPES + 20, 2):
        area = lerp(0.02, 0.33, uniform(key, n))
        ratio = exp(lerp(-1.2039728043259361, 1.1939224684724346, uniform(key, n + 1)))  # logs of 0.3 and 3.3
        height, width = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if height < 1 and width < 1:
            top, left = uniform(key, ERASE_TOP) * (1 - height), uniform(key, ERASE_LEFT) * (1 - width)
            box = (top, left, top + height, left + width)
            colour = (
                uint8(256 * uniform(key, ERASE_COLOUR)),
                uint8(256 * uniform(key, ERASE_COLOUR + 1)),
                uint8(256 * uniform(key, ERASE_COLOUR + 2)),
            )
            break
    return box, colour


@compiled
def fill(image, box, colour):
    """Set a box, in shares of the sides, of an image uint8 [size, size, 3] to a colour."""
    top, left, bottom, right = pixel_box(box, image.shape[0])
    for c in range(3):
        image[top:bottom, left:right, c] = colour[c]

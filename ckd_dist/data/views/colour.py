"""Colour jitter: brightness, contrast and saturation."""

from __future__ import annotations

import math

from ckd_dist.data.jit import compiled
from ckd_dist.data.views.draws import BRIGHTNESS, CONTRAST, SATURATION, lerp, uniform


@compiled
def colour_factors(key, recipe):
    """Factors of brightness, contrast and saturation, each within `recipe.color_jitter` of 1 and not negative."""
    low, high = max(0.0, 1 - recipe.color_jitter), 1 + recipe.color_jitter
    return (
        lerp(low, high, uniform(key, BRIGHTNESS)),
        lerp(low, high, uniform(key, CONTRAST)),
        lerp(low, high, uniform(key, SATURATION)),
    )


@compiled
def jitter(image, brightness, contrast, saturation):
    """Multiply each in place, image uint8 [height, width, 3], rounding down and clipping in between, as torchvision's
    adjust_ functions do."""
    height, width, _ = image.shape
    total = 0.0
    for y in range(height):
        for x in range(width):
            for c in range(3):
                image[y, x, c] = min(brightness * image[y, x, c], 255.0)
            total += _grey(image[y, x])
    mean = math.floor(total / (height * width))
    for y in range(height):
        for x in range(width):
            for c in range(3):
                image[y, x, c] = min(max(lerp(mean, image[y, x, c], contrast), 0.0), 255.0)
            grey = _grey(image[y, x])
            for c in range(3):
                image[y, x, c] = min(max(lerp(grey, image[y, x, c], saturation), 0.0), 255.0)


@compiled
def _grey(pixel):
    return math.floor(0.2989 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2])

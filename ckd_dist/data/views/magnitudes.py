"""Operations on images, and the tables of how strong policies make them.

Numbers are those of torchvision's TrivialAugmentWide, RandAugment and AutoAugment (IMAGENET). Lengths are in pixels of
a view of `REFERENCE` px and scale with the view: so a view shows the same at every size.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from ckd_dist.data.recipe import Policy

REFERENCE = 224
"""Side in pixels that lengths are given at: that of ImageNet's views."""
IDENTITY, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE, BRIGHTNESS, COLOR, CONTRAST, SHARPNESS = range(10)
POSTERIZE, SOLARIZE, AUTO_CONTRAST, EQUALIZE, INVERT, GRAYSCALE, BLUR = range(10, 17)
NAMES = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast"),
    *("Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize", "Invert", "Grayscale", "Blur"),
)
"""Of the operations, in the order of their numbers."""
DRAWN = 14
"""TrivialAugment and RandAugment draw one of so many first operations."""
BINS = 31
"""Strengths of TrivialAugment and RandAugment."""

_AUTO_AUGMENT = """
Posterize 0.4 8, Rotate 0.6 9; Solarize 0.6 5, AutoContrast 0.6 0; Equalize 0.8 0, Equalize 0.6 0;
Posterize 0.6 7, Posterize 0.6 6; Equalize 0.4 0, Solarize 0.2 4; Equalize 0.4 0, Rotate 0.8 8;
Solarize 0.6 3, Equalize 0.6 0; Posterize 0.8 5, Equalize 1 0; Rotate 0.2 3, Solarize 0.6 8;
Equalize 0.6 0, Posterize 0.4 6; Rotate 0.8 8, Color 0.4 0; Rotate 0.4 9, Equalize 0.6 0;
Equalize 0 0, Equalize 0.8 0; Invert 0.6 0, Equalize 1 0; Color 0.6 4, Contrast 1 8;
Rotate 0.8 8, Color 1 2; Color 0.8 8, Solarize 0.8 7; Sharpness 0.4 7, Invert 0.6 0;
ShearX 0.6 5, Equalize 1 0; Color 0.4 0, Equalize 0.6 0; Equalize 0.4 0, Solarize 0.2 4;
Solarize 0.6 5, AutoContrast 0.6 0; Invert 0.6 0, Equalize 1 0; Color 0.6 4, Contrast 1 8;
Equalize 0.8 0, Equalize 0.6 0
"""
"""The pairs that were found for ImageNet: operation, probability, strength of 0 to 9."""


@cache
def magnitudes(policy: Policy | None) -> np.ndarray:
    """How strong each operation is in each bin, float64 [operations, bins, 2]; none for a policy without a table.

    The first number is what the operation takes: shift per pixel of a shear, pixels of a translation, change of a
    factor, bits that are kept, threshold; of a rotation it is the sine of the angle, and the second its cosine. Where
    an operation has two directions, the first number negated is the other one.
    """
    if policy not in ("trivial_augment", "rand_augment", "auto_augment"):
        return np.zeros((0, 0, 2))
    wide, bins = policy == "trivial_augment", 10 if policy == "auto_augment" else BINS
    translation = 32 if wide else 150 / 331 * REFERENCE
    most = {SHEAR_X: 0.99 if wide else 0.3, TRANSLATE_X: translation, BRIGHTNESS: 0.99 if wide else 0.9}
    most |= {SHEAR_Y: most[SHEAR_X], TRANSLATE_Y: translation}
    most |= dict.fromkeys((COLOR, CONTRAST, SHARPNESS), most[BRIGHTNESS])
    table = np.zeros((len(NAMES), bins, 2))
    for n in range(bins):
        share = n / (bins - 1)
        for operation, value in most.items():
            table[operation, n, 0] = value * n / (bins - 1)
        table[ROTATE, n] = _sine_and_cosine((135 if wide else 30) * share)
        table[POSTERIZE, n, 0] = 8 - round((6 if wide else 4) * share)
        table[SOLARIZE, n, 0] = 255 * (bins - 1 - n) / (bins - 1)
    return table


@cache
def pairs(policy: Policy | None) -> np.ndarray:
    """AutoAugment's pairs of operations, float64 [25, 2, 3]: operation, probability, bin; none for another policy."""
    if policy != "auto_augment":
        return np.zeros((0, 2, 3))
    found = [[each.split() for each in pair.split(",")] for pair in _AUTO_AUGMENT.split(";")]
    return np.array([[(NAMES.index(name), float(p), float(n)) for name, p, n in pair] for pair in found])


def _sine_and_cosine(degrees: float) -> tuple[float, float]:
    """From + and * alone, for angles up to 180: what libraries give differs by an ulp between machines."""
    angle, sums, term = degrees * (math.pi / 180), [0.0, 0.0], 1.0
    for k in range(40):
        sums[k % 2] += -term if k % 4 > 1 else term
        term *= angle / (k + 1)
    return sums[1], sums[0]

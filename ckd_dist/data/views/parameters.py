"""A `ViewRecipe` as the numbers that compiled code reads."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np

from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.data.views.draws import beta_quantiles
from ckd_dist.data.views.magnitudes import magnitudes, pairs

RANDOM_RESIZED_CROP, PAD_CROP, CENTER_CROP = 0, 1, 2
_KINDS = {"random_resized_crop": RANDOM_RESIZED_CROP, "pad_crop": PAD_CROP, "center_crop": CENTER_CROP}
NO_POLICY, TRIVIAL_AUGMENT, RAND_AUGMENT, AUTO_AUGMENT, THREE_AUGMENT = range(5)
_POLICIES = {
    None: NO_POLICY,
    "trivial_augment": TRIVIAL_AUGMENT,
    "rand_augment": RAND_AUGMENT,
    "auto_augment": AUTO_AUGMENT,
    "three_augment": THREE_AUGMENT,
}


class Parameters(NamedTuple):
    """The fields of a `ViewRecipe`, the kind of crop and the policy as integers, and what is computed of them once."""

    kind: int
    scale_min: float
    scale_max: float
    ratio_min: float
    ratio_max: float
    log_ratio_min: float
    log_ratio_max: float
    padding: int
    center_share: float
    flip: float
    color_jitter: float
    erase: float
    mixup: bool
    cutmix: bool
    mixup_weights: np.ndarray
    """`beta_quantiles` of mixup's alpha."""
    cutmix_weights: np.ndarray
    mix: float
    policy: int
    operations: int
    magnitude: int
    magnitudes: np.ndarray
    """Of the policy's operations: see the function."""
    pairs: np.ndarray
    """Of AutoAugment."""
    grayscale: float
    blur: float
    solarize: float
    draws: np.ndarray
    """Empty; of two dimensions where a policy, grey, blur or solarise may be drawn, else of one: a type that tells."""


@cache
def parameters(recipe: ViewRecipe) -> tuple:
    """The fields of `Parameters`, as a plain tuple: numba refuses named ones in parallel loops."""
    return tuple(
        Parameters(
            _KINDS[recipe.kind],
            *recipe.scale,
            *recipe.ratio,
            math.log(recipe.ratio[0]),
            math.log(recipe.ratio[1]),
            recipe.padding,
            recipe.center_share,
            recipe.flip,
            recipe.color_jitter,
            recipe.erase,
            recipe.mixup > 0,
            recipe.cutmix > 0,
            beta_quantiles(recipe.mixup),
            beta_quantiles(recipe.cutmix),
            float(recipe.mix),
            _POLICIES[recipe.policy],
            recipe.operations,
            recipe.magnitude,
            magnitudes(recipe.policy),
            pairs(recipe.policy),
            float(recipe.grayscale),
            float(recipe.blur),
            float(recipe.solarize),
            np.zeros((0, 0) if recipe.policy or recipe.grayscale or recipe.blur or recipe.solarize else 0),
        )
    )

"""What policies do to a view: which operations are drawn, how strong, and which way."""

from __future__ import annotations

import math

from numba import int64

from ckd_dist.data.jit import compiled
from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.data.views.blurring import blur
from ckd_dist.data.views.draws import POLICY, POLICY_DRAWS, lerp, stream_key, uniform
from ckd_dist.data.views.magnitudes import (
    AUTO_CONTRAST,
    BINS,
    BLUR,
    BRIGHTNESS,
    COLOR,
    CONTRAST,
    DRAWN,
    EQUALIZE,
    GRAYSCALE,
    IDENTITY,
    INVERT,
    NAMES,
    POSTERIZE,
    REFERENCE,
    ROTATE,
    SHARPNESS,
    SHEAR_X,
    SHEAR_Y,
    SOLARIZE,
    TRANSLATE_X,
    TRANSLATE_Y,
)
from ckd_dist.data.views.moving import move_columns, move_down, move_rows, rotate
from ckd_dist.data.views.operations import (
    brighten,
    change_contrast,
    equalize,
    invert_from,
    keep_bits,
    saturate,
    sharpen,
    stretch,
    take_colours,
)
from ckd_dist.data.views.parameters import (
    AUTO_AUGMENT,
    NO_POLICY,
    RAND_AUGMENT,
    THREE_AUGMENT,
    TRIVIAL_AUGMENT,
    Parameters,
    parameters,
)

HALF = 128
"""Solarising outside of the tables inverts values from here on, as BYOL, DINO and DeiT III do."""


def drawn(recipe: ViewRecipe, seed: int, view_id: int, sample_id: int) -> list[tuple[str, float, float]]:
    """The pure function: each operation of the recipe's policy on a view, with the two numbers that `operate` takes."""
    values = parameters(recipe)
    found = [_drawn(values, seed, view_id, sample_id, n) for n in range(_count(Parameters(*values)))]
    return [(NAMES[operation], first, second) for operation, first, second in found]


@compiled
def _drawn(values, seed, view_id, sample, n):
    return _draw(stream_key(seed, view_id, sample), n, Parameters(*values))


@compiled
def apply_policy(image, key, recipe):
    """Change a view, uint8 [size, size, 3], in place."""
    for n in range(_count(recipe)):
        operation, first, second = _draw(key, n, recipe)
        operate(image, operation, first, second)


@compiled
def _count(recipe):
    if recipe.policy == RAND_AUGMENT:
        return recipe.operations
    return 0 if recipe.policy == NO_POLICY else 2 if recipe.policy == AUTO_AUGMENT else 1


@compiled
def _draw(key, n, recipe):
    """Operation n of a view's, and the two numbers that `operate` takes."""
    counter = POLICY + POLICY_DRAWS * n
    which, strength = uniform(key, counter), uniform(key, counter + 2)
    if recipe.policy == THREE_AUGMENT:
        kind = int64(3 * which)
        if kind == 2:
            return BLUR, drawn_deviation(strength), 0.0
        return (SOLARIZE if kind else GRAYSCALE), HALF + 0.0, 0.0
    operation, place = int64(DRAWN * which), recipe.magnitude
    if recipe.policy == TRIVIAL_AUGMENT:
        place = int64(BINS * strength)
    elif recipe.policy == AUTO_AUGMENT:
        pair = int64(len(recipe.pairs) * uniform(key, POLICY))
        operation, place = int64(recipe.pairs[pair, n, 0]), int64(recipe.pairs[pair, n, 2])
        if uniform(key, counter + 1) >= recipe.pairs[pair, n, 1]:
            operation = IDENTITY
    first, second = recipe.magnitudes[operation, place, 0], recipe.magnitudes[operation, place, 1]
    if SHEAR_X <= operation <= SHARPNESS and uniform(key, counter + 3) < 0.5:
        first = -first
    return operation, first, second


@compiled
def drawn_deviation(share):
    """Standard deviation of a blur, in pixels of a view of `REFERENCE`: any from 0.1 to 2 is as likely."""
    return lerp(0.1, 2.0, share)


@compiled
def operate(image, operation, first, second):
    """Do one operation to a square image uint8 [size, size, 3], in place; its numbers are those of `magnitudes`, of a
    blur the deviation. Lengths are in pixels of a view of `REFERENCE`."""
    scale = image.shape[0] / REFERENCE
    if operation == SHEAR_X:
        move_rows(image, first, 0)
    elif operation == SHEAR_Y:
        move_columns(image, first)
    elif operation == TRANSLATE_X:
        move_rows(image, 0.0, _whole(first * scale))
    elif operation == TRANSLATE_Y:
        move_down(image, _whole(first * scale))
    elif operation == ROTATE:
        rotate(image, first, second)
    elif operation == BRIGHTNESS:
        brighten(image, 1 + first)
    elif operation == COLOR:
        saturate(image, 1 + first)
    elif operation == CONTRAST:
        change_contrast(image, 1 + first)
    elif operation == SHARPNESS:
        sharpen(image, 1 + first)
    elif operation == POSTERIZE:
        keep_bits(image, int64(first))
    elif operation == SOLARIZE:
        invert_from(image, int64(math.ceil(first)))
    elif operation == AUTO_CONTRAST:
        stretch(image)
    elif operation == EQUALIZE:
        equalize(image)
    elif operation == INVERT:
        invert_from(image, 0)
    elif operation == GRAYSCALE:
        take_colours(image)
    elif operation == BLUR:
        blur(image, first * scale)


@compiled
def _whole(pixels):
    """Rounded towards zero, but for what is whole and was rounded in between."""
    return int64(pixels + 1e-9) if pixels > 0 else int64(pixels - 1e-9)

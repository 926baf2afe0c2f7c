"""What is done to the pixels of a crop: it is mirrored, changed by a policy and in its colours, and a box is erased."""

from __future__ import annotations

from numba.extending import overload

from ckd_dist.data.jit import compiled
from ckd_dist.data.views.blurring import blur
from ckd_dist.data.views.colour import colour_factors, jitter
from ckd_dist.data.views.draws import BLUR, BLUR_DEVIATION, GRAYSCALE, SOLARIZE, uniform
from ckd_dist.data.views.erasing import erased_box, fill
from ckd_dist.data.views.geometry import mirror
from ckd_dist.data.views.magnitudes import REFERENCE
from ckd_dist.data.views.operations import invert_from, take_colours
from ckd_dist.data.views.policies import HALF, apply_policy, drawn_deviation


@compiled
def finish(image, flip, key, recipe):
    """Mirror, change, recolour, blur and erase in place, as the draws of `key` say, a resized crop, uint8
    [size, size, 3]."""
    if flip:
        mirror(image)
    _change(image, key, recipe)
    if recipe.color_jitter > 0:
        brightness, contrast, saturation = colour_factors(key, recipe)
        jitter(image, brightness, contrast, saturation)
    _filter(image, key, recipe)
    box, colour = erased_box(key, recipe)
    fill(image, box, colour)


# What few recipes draw is not compiled for the others: it takes twice as long as all the rest.


def _change(image, key, recipe):
    raise NotImplementedError


def _filter(image, key, recipe):
    raise NotImplementedError


def _nothing(image, key, recipe):
    pass


def _draws(recipe):
    return recipe.types[recipe.fields.index("draws")].ndim > 1


@overload(_change)
def _change_as_drawn(image, key, recipe):
    def change(image, key, recipe):
        apply_policy(image, key, recipe)

    return change if _draws(recipe) else _nothing


@overload(_filter)
def _filter_as_drawn(image, key, recipe):
    def change(image, key, recipe):
        if uniform(key, GRAYSCALE) < recipe.grayscale:
            take_colours(image)
        if uniform(key, BLUR) < recipe.blur:
            blur(image, drawn_deviation(uniform(key, BLUR_DEVIATION)) * image.shape[0] / REFERENCE)
        if uniform(key, SOLARIZE) < recipe.solarize:
            invert_from(image, HALF)

    return change if _draws(recipe) else _nothing

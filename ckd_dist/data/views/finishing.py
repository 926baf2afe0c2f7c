"""What is done to the pixels of a crop: it is mirrored, its colours are changed, a box of it is erased."""

from __future__ import annotations

from ckd_dist.data.jit import compiled
from ckd_dist.data.views.colour import colour_factors, jitter
from ckd_dist.data.views.erasing import erased_box, fill
from ckd_dist.data.views.geometry import mirror


@compiled
def finish(image, flip, key, recipe):
    """Mirror, recolour and erase in place, as the draws of `key` say, a resized crop, uint8 [size, size, 3]."""
    if flip:
        mirror(image)
    if recipe.color_jitter > 0:
        brightness, contrast, saturation = colour_factors(key, recipe)
        jitter(image, brightness, contrast, saturation)
    box, colour = erased_box(key, recipe)
    fill(image, box, colour)

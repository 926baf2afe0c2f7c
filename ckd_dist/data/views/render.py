"""A view of an image of FFCV's, put together: decoded, cropped, finished and mixed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import int64

from ckd_dist.data.ffcv_repairs import IMAGE_MODES
from ckd_dist.data.jit import compiled
from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.data.views.draws import stream_key
from ckd_dist.data.views.finishing import finish
from ckd_dist.data.views.geometry import box_and_flip, copy_padded
from ckd_dist.data.views.libffcv import decode_jpeg, resize_crop
from ckd_dist.data.views.mixing import blend, draw_mix
from ckd_dist.data.views.parameters import Parameters, parameters

_JPEG = IMAGE_MODES["jpg"]


def render(
    read: Callable[[int], tuple[np.ndarray, np.void]],
    count: int,
    recipe: ViewRecipe,
    seed: int,
    view_id: int,
    sample_id: int,
    size: int,
) -> np.ndarray:
    """A view of one of `count` images as the decoder gives it, uint8 [size, size, 3]; `read` fetches an image as FFCV
    keeps it: its bytes, uint8, and its metadata."""
    values = parameters(recipe)

    def unmixed(sample: int) -> np.ndarray:
        data, field = read(sample)
        out = np.empty((size, size, 3), dtype=np.uint8)
        render_stored(data, field, seed, view_id, sample, values, out)
        return out

    image = unmixed(sample_id)
    if recipe.mixes:
        partner, weight, box = draw_mix(seed, view_id, sample_id, count, values)
        if weight < 1:
            blend(image, unmixed(partner), weight, box)
    return image


@compiled
def render_stored(data, field, seed, view_id, sample, values, out):
    """Fill `out`, uint8 [size, size, 3], with a view, not yet mixed, of the image that FFCV keeps as the bytes `data`
    and the metadata `field`.

    Memory to decode into is allocated for each image: buffers of FFCV's would have, for every slot and image of a
    batch, the size of the largest image, and on a GPU be pinned: gigabytes.
    """
    key, recipe = stream_key(seed, view_id, sample), Parameters(*values)
    height, width = int64(field["height"]), int64(field["width"])
    image = data
    if field["mode"] == _JPEG:
        image = decode_jpeg(data, height, width)
    _render_image(image.reshape(height, width, 3), key, recipe, out)


@compiled
def _render_image(image, key, recipe, out):
    height, width, _ = image.shape
    (top, left, h, w), flip = box_and_flip(key, height, width, recipe)
    if top >= 0 and left >= 0 and top + h <= height and left + w <= width:
        resize_crop(image, top, left, h, w, out)
    elif h == out.shape[0] and w == out.shape[1]:
        copy_padded(image, top, left, out)
    else:
        crop = np.empty((h, w, 3), dtype=np.uint8)
        copy_padded(image, top, left, crop)
        resize_crop(crop, 0, 0, h, w, out)
    finish(out, flip, key, recipe)

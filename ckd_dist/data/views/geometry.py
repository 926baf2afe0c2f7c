"""Crop boxes and flips: how they are drawn, and cutting, padding and mirroring of pixels."""

from __future__ import annotations

import math

from numba import int64

from ckd_dist.data.jit import compiled
from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.data.views.draws import CROP_LEFT, CROP_TOP, FLIP, exp, lerp, stream_key, uniform
from ckd_dist.data.views.parameters import CENTER_CROP, PAD_CROP, Parameters, parameters


def view(
    recipe: ViewRecipe, seed: int, view_id: int, sample_id: int, height: int, width: int
) -> tuple[tuple[int, int, int, int], bool]:
    """The pure function: box (top, left, height, width) in pixels of a height x width image, and whether to mirror.

    A pad_crop's box may reach over the image's border: what lies outside is black.
    """
    return _view(seed, view_id, sample_id, height, width, parameters(recipe))


@compiled
def _view(seed, view_id, sample_id, height, width, values):
    return box_and_flip(stream_key(seed, view_id, sample_id), height, width, Parameters(*values))


@compiled
def box_and_flip(key, height, width, recipe):
    """Crop box of an image of height x width pixels, and whether it is mirrored."""
    return _crop_box(key, height, width, recipe), uniform(key, FLIP) < recipe.flip


@compiled
def _crop_box(key, height, width, recipe):
    """Box (top, left, height, width) in pixels; random_resized_crop as torchvision's RandomResizedCrop.get_params."""
    if recipe.kind == PAD_CROP:
        top = int64(uniform(key, CROP_TOP) * (2 * recipe.padding + 1)) - recipe.padding
        left = int64(uniform(key, CROP_LEFT) * (2 * recipe.padding + 1)) - recipe.padding
        return top, left, height, width
    if recipe.kind == CENTER_CROP:
        side = max(int64(recipe.center_share * min(height, width)), int64(1))
        return (height - side) // 2, (width - side) // 2, side, side
    area = float(height) * float(width)
    n = 0
    for _ in range(10):
        target = area * lerp(recipe.scale_min, recipe.scale_max, uniform(key, n))
        ratio = exp(lerp(recipe.log_ratio_min, recipe.log_ratio_max, uniform(key, n + 1)))
        n += 2
        w = int64(math.floor(math.sqrt(target * ratio) + 0.5))
        h = int64(math.floor(math.sqrt(target / ratio) + 0.5))
        if 0 < w <= width and 0 < h <= height:
            top = int64(uniform(key, CROP_TOP) * (height - h + 1))
            left = int64(uniform(key, CROP_LEFT) * (width - w + 1))
            return top, left, h, w
    w, h = width, height
    if width < height * recipe.ratio_min:
        h = min(h, int64(math.floor(width / recipe.ratio_min + 0.5)))
    elif width > height * recipe.ratio_max:
        w = min(w, int64(math.floor(height * recipe.ratio_max + 0.5)))
    return (height - h) // 2, (width - w) // 2, h, w


@compiled
def copy_padded(image, top, left, out):
    """out[y, x] = image[top + y, left + x], black where that lies outside; both uint8 [height, width, 3]."""
    height, width, _ = image.shape
    out[:] = 0
    for y in range(max(0, -top), min(out.shape[0], height - top)):
        for x in range(max(0, -left), min(out.shape[1], width - left)):
            for c in range(3):
                out[y, x, c] = image[top + y, left + x, c]


@compiled
def mirror(image):
    """Flip an image [height, width, channels] horizontally, in place."""
    height, width, channels = image.shape
    for y in range(height):
        for x in range(width // 2):
            for c in range(channels):
                image[y, x, c], image[y, width - 1 - x, c] = image[y, width - 1 - x, c], image[y, x, c]


@compiled
def pixel_box(box, size):
    """A box in shares of the sides as pixels (top, left, bottom, right) of a square, each edge at the nearest pixel
    boundary."""
    return _edge(box[0], size), _edge(box[1], size), _edge(box[2], size), _edge(box[3], size)


@compiled
def _edge(share, size):
    return int64(math.floor(share * size + 0.5))

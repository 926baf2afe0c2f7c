"""The pixels of a view, and the FFCV decoder that makes them: decoded, cropped, mirrored, coloured, erased, mixed.

What is drawn is `views`' business; pixels are computed here, in integers or with the operations of one order alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from llvmlite import binding
from numba import int64, types

from ckd_dist.ffcv_mended import IMAGE_MODES, AllocationQuery, Compiler, IntDecoder, SimpleRGBImageDecoder, libffcv
from ckd_dist.views import (
    Numbers,
    ViewRecipe,
    between,
    box_and_flip,
    colour_factors,
    compiled,
    erased_box,
    mix,
    stream_key,
)

# FFCV's C functions are named symbols, not addresses, so that numba can keep what calls them in its disk cache.
binding.load_library_permanently(libffcv.lib._name)
_resize: Any = types.ExternalFunction("resize", types.void(*[int64] * 11))
_imdecode: Any = types.ExternalFunction(
    "imdecode", types.void(types.uintp, types.uint64, *[types.uint32] * 2, types.uintp, *[types.uint32] * 8)
)

_JPEG = IMAGE_MODES["jpg"]


@compiled
def _resize_crop(image, top, left, height, width, out):
    _resize(
        0,
        image.ctypes.data,
        image.shape[0],
        image.shape[1],
        top,
        top + height,
        left,
        left + width,
        out.ctypes.data,
        out.shape[0],
        out.shape[1],
    )


@compiled
def _copy_padded(image, top, left, out):
    """out[y, x] = image[top + y, left + x], black where that lies outside."""
    height, width, _ = image.shape
    out[:] = 0
    for y in range(max(0, -top), min(out.shape[0], height - top)):
        for x in range(max(0, -left), min(out.shape[1], width - left)):
            for c in range(3):
                out[y, x, c] = image[top + y, left + x, c]


@compiled
def _mirror(image):
    height, width, channels = image.shape
    for y in range(height):
        for x in range(width // 2):
            for c in range(channels):
                image[y, x, c], image[y, width - 1 - x, c] = image[y, width - 1 - x, c], image[y, x, c]


@compiled
def _jitter(image, brightness, contrast, saturation):
    """Multiply each, rounding down and clipping in between, as torchvision's adjust_ functions do."""
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
                image[y, x, c] = min(max(between(mean, image[y, x, c], contrast), 0.0), 255.0)
            grey = _grey(image[y, x])
            for c in range(3):
                image[y, x, c] = min(max(between(grey, image[y, x, c], saturation), 0.0), 255.0)


@compiled
def _grey(pixel):
    return math.floor(0.2989 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2])


@compiled
def _edge(share, size):
    """The pixel boundary nearest to a share of a side."""
    return int64(math.floor(share * size + 0.5))


@compiled
def _pixels(box, size):
    """A box in shares of the sides as pixels (top, left, bottom, right) of a square."""
    return _edge(box[0], size), _edge(box[1], size), _edge(box[2], size), _edge(box[3], size)


@compiled
def _fill(image, box, colour):
    top, left, bottom, right = _pixels(box, image.shape[0])
    for c in range(3):
        image[top:bottom, left:right, c] = colour[c]


@compiled
def _blend(image, partner, weight, box):
    """Mix `partner` into `image`, both uint8 [size, size, 3], as `views.mix` says."""
    size = image.shape[0]
    if box[2] > box[0]:
        top, left, bottom, right = _pixels(box, size)
        image[top:bottom, left:right] = partner[top:bottom, left:right]
        return
    ours = int64(256 * weight)
    for y in range(size):
        for x in range(size):
            for c in range(3):
                image[y, x, c] = (ours * image[y, x, c] + (256 - ours) * partner[y, x, c] + 128) >> 8


@compiled
def _render(data, field, seed, view_id, sample, numbers, decoded, padded, out):
    """Fill `out`, uint8 [size, size, 3], with a view, not yet mixed, of the image that FFCV keeps as the bytes `data`
    and the metadata `field`; `decoded` and `padded` are room to work."""
    key, recipe = stream_key(seed, view_id, sample), Numbers(*numbers)
    height, width = int64(field["height"]), int64(field["width"])
    image = data
    if field["mode"] == _JPEG:
        _imdecode(data.ctypes.data, data.size, height, width, decoded.ctypes.data, height, width, 0, 0, 1, 1, 0, 0)
        image = decoded[: 3 * height * width]
    _render_image(image.reshape(height, width, 3), key, recipe, padded, out)


@compiled
def _render_image(image, key, recipe, padded, out):
    height, width, _ = image.shape
    (top, left, h, w), flip = box_and_flip(key, height, width, recipe)
    if top >= 0 and left >= 0 and top + h <= height and left + w <= width:
        _resize_crop(image, top, left, h, w, out)
    elif h == out.shape[0] and w == out.shape[1]:
        _copy_padded(image, top, left, out)
    else:
        crop = padded[: 3 * h * w].reshape(h, w, 3)
        _copy_padded(image, top, left, crop)
        _resize_crop(crop, 0, 0, h, w, out)
    if flip:
        _mirror(out)
    if recipe.color_jitter > 0:
        brightness, contrast, saturation = colour_factors(key, recipe)
        _jitter(out, brightness, contrast, saturation)
    box, colour = erased_box(key, recipe)
    _fill(out, box, colour)


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
    numbers = recipe.numbers()

    def unmixed(sample: int) -> np.ndarray:
        data, field = read(sample)
        pixels = 3 * int(field["height"]) * int(field["width"])
        decoded, padded = (np.empty(pixels, dtype=np.uint8) for _ in range(2))
        out = np.empty((size, size, 3), dtype=np.uint8)
        _render(data, field, seed, view_id, sample, numbers, decoded, padded, out)
        return out

    image = unmixed(sample_id)
    if recipe.mixes:
        partner, weight, box = mix(seed, view_id, sample_id, count, numbers)
        _blend(image, unmixed(partner), weight, box)
    return image


def _channel(*values: int) -> tuple[AllocationQuery, ...]:
    """Buffers that carry integers in [0, 2**31) into compiled code as their shape, and hold no bytes.

    FFCV asks an operation for its buffers anew at each epoch and hands them to the compiled function as arguments:
    so a value that changes between epochs needs no recompilation, and belongs to that epoch's iterator alone.
    """
    return tuple(AllocationQuery((0, value), np.dtype("u1")) for value in values)


class ViewDecoder(SimpleRGBImageDecoder):
    """FFCV decoder of the field `image`: view `view` of every sample, uint8 [batch, size, size, 3].

    `view` and `size` may be set between epochs; they are read when an epoch starts.
    """

    def __init__(self, recipe: ViewRecipe, size: int, seed: int = 0, view: int = 0):
        super().__init__()
        self.recipe, self.size, self.seed, self.view = recipe, size, seed, view

    def declare_state_and_memory(self, previous_state):
        byte = np.dtype("u1")
        height, width = self.metadata["height"], self.metadata["width"]
        largest = int((height.astype("u8") * width).max()) * 3
        any_jpeg = bool((self.metadata["mode"] == IMAGE_MODES["jpg"]).any())
        shape = (self.size, self.size, 3)
        resized_padding = self.recipe.kind == "pad_crop" and (self.size, self.size) != (height[0], width[0])
        return (
            replace(previous_state, jit_mode=True, shape=shape, dtype=byte),
            (
                AllocationQuery(shape, byte),
                AllocationQuery((largest if any_jpeg else 0,), byte),
                AllocationQuery((largest if resized_padding else 0,), byte),
                AllocationQuery(shape if self.recipe.mixes else (0, 0, 3), byte),
                *_channel(self.seed >> 31, self.seed & 0x7FFFFFFF, self.view),
            ),
        )

    def generate_code(self):
        read, parallel_range = self.memory_read, Compiler.get_iterator()
        recipe, mixes = self.recipe.numbers(), self.recipe.mixes

        def decode(batch_indices, memory, metadata, storage_state):
            out, decoded, padded, partners, seed_high, seed_low, view = memory
            seed, view_id = (seed_high.shape[2] << 31) | seed_low.shape[2], view.shape[2]
            for b in parallel_range(len(batch_indices)):
                sample = np.int64(batch_indices[b])
                field = metadata[sample]
                data = read(field["data_ptr"], storage_state)
                _render(data, field, seed, view_id, sample, recipe, decoded[b], padded[b], out[b])
                if mixes:
                    partner, weight, box = mix(seed, view_id, sample, len(metadata), recipe)
                    field = metadata[partner]
                    data = read(field["data_ptr"], storage_state)
                    _render(data, field, seed, view_id, partner, recipe, decoded[b], padded[b], partners[b])
                    _blend(out[b], partners[b], weight, box)
            return out[: len(batch_indices)]

        decode.is_parallel = True  # type: ignore[attr-defined]
        return decode


class SampleIdDecoder(IntDecoder):
    """FFCV decoder that yields each sample's id, int64 [batch, 1], from any field."""

    def generate_code(self):
        def decode(batch_indices, out, metadata, storage_state):
            for b in range(len(batch_indices)):
                out[b, 0] = batch_indices[b]
            return out[: len(batch_indices)]

        return decode

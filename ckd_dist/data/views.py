"""A view is a pure function: view(seed, view id, sample id) -> crop box, flip, colours, erased box, partner.

Every draw comes from a counter-based generator keyed by those three integers, inside the FFCV decoder: it does not
depend on thread, rank, batch size, world size or order. So a teacher pass and a student pass see byte-identical
images, and cached logits are addressed by (view, sample). No draw depends on the output's resolution.

The generator is splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) used
as a hash: draw n of a stream is the finalised value of key + n * golden gamma.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from llvmlite import binding
from numba import int64, njit, prange, types, uint8, uint64
from numba.extending import overload

from ckd_dist.data.ffcv_repairs import (
    IMAGE_MODES,
    AllocationQuery,
    Compiler,
    IntDecoder,
    SimpleRGBImageDecoder,
    libffcv,
    ready,
)
from ckd_dist.data.recipe import ViewRecipe

# fastmath stays off: reassociated sums differ between machines, and one ulp moves a crop by a pixel. The disk cache
# saves every process seconds of compilation. It looks at the time of a function's own file alone, so all compiled code
# that hangs together is in this one; and for it, FFCV's C functions are named symbols, not addresses.
compiled: Any = partial(njit, nogil=True, error_model="numpy", fastmath=False, cache=True)
binding.load_library_permanently(libffcv.lib._name)
_resize: Any = types.ExternalFunction("resize", types.void(*[int64] * 11))
_imdecode: Any = types.ExternalFunction(
    "imdecode", types.void(types.uintp, types.uint64, *[types.uint32] * 2, types.uintp, *[types.uint32] * 8)
)
_JPEG = IMAGE_MODES["jpg"]

# Counters of the draws within a stream. The ten attempts at a crop take the first twenty.
_TOP, _LEFT, _FLIP = 100, 101, 102
_BRIGHTNESS, _CONTRAST, _SATURATION = 110, 111, 112
_ERASE, _ERASE_TOP, _ERASE_LEFT, _ERASE_COLOUR, _ERASE_SHAPES = 120, 121, 122, 123, 130
_PARTNER, _CHOICE, _WEIGHT, _CUT_Y, _CUT_X = 160, 161, 162, 163, 164
SAMPLED_CODEC = 1000
"""First counter of the draws that are a codec's, not a view's: one for every epoch of the teacher."""

_RANDOM_RESIZED_CROP, _PAD_CROP, _CENTER_CROP = 0, 1, 2
_KINDS = {"random_resized_crop": _RANDOM_RESIZED_CROP, "pad_crop": _PAD_CROP, "center_crop": _CENTER_CROP}


class _Numbers(NamedTuple):
    """A `ViewRecipe` for compiled code."""

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
    cutmix_weights: np.ndarray


def _numbers(recipe: ViewRecipe) -> tuple:
    """The fields of `_Numbers` (numba refuses named tuples in parallel loops)."""
    return tuple(
        _Numbers(
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
            _beta_quantiles(recipe.mixup),
            _beta_quantiles(recipe.cutmix),
        )
    )


def _beta_quantiles(alpha: float, count: int = 4096) -> np.ndarray:
    """Quantiles of Beta(alpha, alpha) at the middles of `count` equal shares, in whole 256ths: int64 [count].

    Drawing one of them is drawing from the distribution, but for the rounding, which makes it the same on every machine
    and mixing exact. The density x^(alpha-1) (1-x)^(alpha-1) is integrated over x^alpha, in which it is bounded.
    """
    if not alpha:
        return np.zeros(0, dtype=np.int64)
    t = np.linspace(0, 0.5**alpha, 100_001)
    x = t ** (1 / alpha)
    density = (1 - x) ** (alpha - 1)
    share = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    lower = np.interp((np.arange(count // 2) + 0.5) / count, 0.5 * share / share[-1], x)
    return np.rint(256 * np.concatenate([lower, 1 - lower[::-1]])).astype(np.int64)


@compiled
def _splitmix(z):
    z = (z ^ (z >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> uint64(27))) * uint64(0x94D049BB133111EB)
    return z ^ (z >> uint64(31))


@compiled
def stream_key(seed, view, sample):
    """64-bit key of the stream of draws that belongs to one (seed, view, sample)."""
    key = _splitmix(uint64(seed) + uint64(0x9E3779B97F4A7C15))
    key = _splitmix(key ^ (uint64(view) + uint64(0xD1B54A32D192ED03)))
    return _splitmix(key ^ (uint64(sample) + uint64(0x8CB92BA72F3D8DD7)))


@compiled
def uniform(key, n):
    """Draw n of the stream: a float64 in [0, 1), exact."""
    z = _splitmix(key + uint64(n + 1) * uint64(0x9E3779B97F4A7C15))
    return (z >> uint64(11)) * (1.0 / 9007199254740992.0)


@compiled
def uniforms(seed, view, samples, n):
    """Draw n of the streams of many samples, int64 [n]: float64 [n] in [0, 1)."""
    draws = np.empty(len(samples))
    for i in range(len(samples)):
        draws[i] = uniform(stream_key(seed, view, samples[i]), n)
    return draws


@compiled
def _exp(x):
    """exp(x) for |x| < 1.5 from + and * alone: the libraries' versions differ by an ulp between machines."""
    term, total = 1.0, 1.0
    for k in range(1, 24):
        term = term * x / k
        total = total + term
    return total


@compiled
def _between(low, high, draw):
    return low + (high - low) * draw


@compiled
def _crop_box(key, height, width, recipe):
    """Box (top, left, height, width) in pixels; random_resized_crop as torchvision's RandomResizedCrop.get_params."""
    if recipe.kind == _PAD_CROP:
        top = int64(uniform(key, _TOP) * (2 * recipe.padding + 1)) - recipe.padding
        left = int64(uniform(key, _LEFT) * (2 * recipe.padding + 1)) - recipe.padding
        return top, left, height, width
    if recipe.kind == _CENTER_CROP:
        side = max(int64(recipe.center_share * min(height, width)), int64(1))
        return (height - side) // 2, (width - side) // 2, side, side
    area = float(height) * float(width)
    n = 0
    for _ in range(10):
        target = area * _between(recipe.scale_min, recipe.scale_max, uniform(key, n))
        ratio = _exp(_between(recipe.log_ratio_min, recipe.log_ratio_max, uniform(key, n + 1)))
        n += 2
        w = int64(math.floor(math.sqrt(target * ratio) + 0.5))
        h = int64(math.floor(math.sqrt(target / ratio) + 0.5))
        if 0 < w <= width and 0 < h <= height:
            top = int64(uniform(key, _TOP) * (height - h + 1))
            left = int64(uniform(key, _LEFT) * (width - w + 1))
            return top, left, h, w
    w, h = width, height
    if width < height * recipe.ratio_min:
        h = min(h, int64(math.floor(width / recipe.ratio_min + 0.5)))
    elif width > height * recipe.ratio_max:
        w = min(w, int64(math.floor(height * recipe.ratio_max + 0.5)))
    return (height - h) // 2, (width - w) // 2, h, w


@compiled
def _box_and_flip(key, height, width, recipe):
    """Crop box of an image of height x width pixels, and whether it is mirrored."""
    return _crop_box(key, height, width, recipe), uniform(key, _FLIP) < recipe.flip


def view(
    recipe: ViewRecipe, seed: int, view_id: int, sample_id: int, height: int, width: int
) -> tuple[tuple[int, int, int, int], bool]:
    """The pure function: box (top, left, height, width) in pixels of a height x width image, and whether to mirror.

    A pad_crop's box may reach over the image's border: what lies outside is black.
    """
    return _view(seed, view_id, sample_id, height, width, _numbers(recipe))


@compiled
def _view(seed, view_id, sample_id, height, width, numbers):
    return _box_and_flip(stream_key(seed, view_id, sample_id), height, width, _Numbers(*numbers))


@compiled
def _colour_factors(key, recipe):
    """Of brightness, contrast and saturation."""
    low, high = max(0.0, 1 - recipe.color_jitter), 1 + recipe.color_jitter
    return (
        _between(low, high, uniform(key, _BRIGHTNESS)),
        _between(low, high, uniform(key, _CONTRAST)),
        _between(low, high, uniform(key, _SATURATION)),
    )


@compiled
def _erased_box(key, recipe):
    """Box (top, left, bottom, right) in shares of the sides, empty where nothing is erased, and the colour of it."""
    box, colour = (0.0, 0.0, 0.0, 0.0), (uint8(0), uint8(0), uint8(0))
    if uniform(key, _ERASE) >= recipe.erase:
        return box, colour
    for n in range(_ERASE_SHAPES, _ERASE_SHAPES + 20, 2):
        area = _between(0.02, 0.33, uniform(key, n))
        ratio = _exp(_between(-1.2039728043259361, 1.1939224684724346, uniform(key, n + 1)))  # logs of 0.3 and 3.3
        height, width = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if height < 1 and width < 1:
            top, left = uniform(key, _ERASE_TOP) * (1 - height), uniform(key, _ERASE_LEFT) * (1 - width)
            box = (top, left, top + height, left + width)
            colour = (
                uint8(256 * uniform(key, _ERASE_COLOUR)),
                uint8(256 * uniform(key, _ERASE_COLOUR + 1)),
                uint8(256 * uniform(key, _ERASE_COLOUR + 2)),
            )
            break
    return box, colour


@compiled
def _mix(seed, view_id, sample, count, numbers):
    """(partner, weight of the image itself, box of the partner (top, left, bottom, right) in shares of the sides): of
    mixup the box is empty, of cutmix the weight is what the box leaves."""
    key, recipe = stream_key(seed, view_id, sample), _Numbers(*numbers)
    partner = int64(uniform(key, _PARTNER) * count)
    n = int64(uniform(key, _WEIGHT) * 4096)
    if recipe.mixup and not (recipe.cutmix and uniform(key, _CHOICE) < 0.5):
        return partner, recipe.mixup_weights[n] / 256.0, (0.0, 0.0, 0.0, 0.0)
    half = 0.5 * math.sqrt(1 - recipe.cutmix_weights[n] / 256.0)
    y, x = uniform(key, _CUT_Y), uniform(key, _CUT_X)
    top, bottom, left, right = max(y - half, 0.0), min(y + half, 1.0), max(x - half, 0.0), min(x + half, 1.0)
    return partner, 1 - (bottom - top) * (right - left), (top, left, bottom, right)


def partners(recipe: ViewRecipe, seed: int, view_id: int, ids: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """With what each image of a view that mixes is mixed: partners among `count` samples, int64 [n], and the weight of
    the image itself, float32 [n]; the partner has the rest."""
    return _partners(_numbers(recipe), seed, view_id, ids.astype(np.int64), count)


@compiled
def _partners(numbers, seed, view_id, ids, count):
    partners, weights = np.empty(len(ids), dtype=np.int64), np.empty(len(ids), dtype=np.float32)
    for i in range(len(ids)):
        partners[i], weights[i], _ = _mix(seed, view_id, ids[i], count, numbers)
    return partners, weights


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
                image[y, x, c] = min(max(_between(mean, image[y, x, c], contrast), 0.0), 255.0)
            grey = _grey(image[y, x])
            for c in range(3):
                image[y, x, c] = min(max(_between(grey, image[y, x, c], saturation), 0.0), 255.0)


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
    """Mix `partner` into `image`, both uint8 [size, size, 3], as `_mix` says."""
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
def _render(data, field, seed, view_id, sample, numbers, out):
    """Fill `out`, uint8 [size, size, 3], with a view, not yet mixed, of the image that FFCV keeps as the bytes `data`
    and the metadata `field`.

    Room to decode is taken as it is needed: buffers of FFCV's would have, for every slot and image of a batch, the size
    of the largest image, and on a GPU be pinned: gigabytes.
    """
    key, recipe = stream_key(seed, view_id, sample), _Numbers(*numbers)
    height, width = int64(field["height"]), int64(field["width"])
    image = data
    if field["mode"] == _JPEG:
        image = np.empty(3 * height * width, dtype=np.uint8)
        _imdecode(data.ctypes.data, data.size, height, width, image.ctypes.data, height, width, 0, 0, 1, 1, 0, 0)
    _render_image(image.reshape(height, width, 3), key, recipe, out)


@compiled
def _render_image(image, key, recipe, out):
    height, width, _ = image.shape
    (top, left, h, w), flip = _box_and_flip(key, height, width, recipe)
    if top >= 0 and left >= 0 and top + h <= height and left + w <= width:
        _resize_crop(image, top, left, h, w, out)
    elif h == out.shape[0] and w == out.shape[1]:
        _copy_padded(image, top, left, out)
    else:
        crop = np.empty((h, w, 3), dtype=np.uint8)
        _copy_padded(image, top, left, crop)
        _resize_crop(crop, 0, 0, h, w, out)
    if flip:
        _mirror(out)
    if recipe.color_jitter > 0:
        brightness, contrast, saturation = _colour_factors(key, recipe)
        _jitter(out, brightness, contrast, saturation)
    box, colour = _erased_box(key, recipe)
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
    numbers = _numbers(recipe)

    def unmixed(sample: int) -> np.ndarray:
        data, field = read(sample)
        out = np.empty((size, size, 3), dtype=np.uint8)
        _render(data, field, seed, view_id, sample, numbers, out)
        return out

    image = unmixed(sample_id)
    if recipe.mixes:
        partner, weight, box = _mix(seed, view_id, sample_id, count, numbers)
        _blend(image, unmixed(partner), weight, box)
    return image


def _stored(address, state):
    """The bytes of an image in FFCV's memory."""
    raise NotImplementedError


@overload(_stored)
def _stored_in(address, state):
    if state[0].ndim == 1:  # the whole file, mapped: (bytes, addresses, sizes)

        def read(address, state):
            size = state[2][np.searchsorted(state[1], address)]
            return state[0][address : address + size]

    else:  # FFCV's own cache: (a page in each row, addresses, sizes, the row of each page)

        def read(address, state):
            size = state[2][np.searchsorted(state[1], address)]
            page_size = uint64(state[0].shape[1])
            page, offset = address // page_size, address % page_size
            return state[0][state[3][page], offset : offset + size]

    return read


def _decode_batch(over):
    """The loop over a batch, by `over`: range, or prange for several threads."""

    def decode(batch_indices, memory, metadata, storage_state, numbers, mixes):
        out, partners, seed_high, seed_low, view = memory
        seed, view_id = (seed_high.shape[2] << 31) | seed_low.shape[2], view.shape[2]
        for b in over(len(batch_indices)):
            sample = int64(batch_indices[b])
            field = metadata[sample]
            data = _stored(field["data_ptr"], storage_state)
            _render(data, field, seed, view_id, sample, numbers, out[b])
            if mixes:
                partner, weight, box = _mix(seed, view_id, sample, len(metadata), numbers)
                field = metadata[partner]
                data = _stored(field["data_ptr"], storage_state)
                _render(data, field, seed, view_id, partner, numbers, partners[b])
                _blend(out[b], partners[b], weight, box)
        return out[: len(batch_indices)]

    return decode


_decode = compiled(_decode_batch(range))
_decode_in_parallel = compiled(_decode_batch(prange), parallel=True)


def _channel(*values: int) -> tuple[AllocationQuery, ...]:
    """Buffers that carry integers in [0, 2**31) into compiled code as their shape, and hold no bytes.

    FFCV asks an operation for its buffers anew at each epoch and hands them to the function as arguments: so
    a value that changes between epochs belongs to that epoch's iterator alone.
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
        shape = (self.size, self.size, 3)
        return (
            replace(previous_state, jit_mode=True, shape=shape, dtype=byte),
            (
                AllocationQuery(shape, byte),
                AllocationQuery(shape if self.recipe.mixes else (0, 0, 3), byte),
                *_channel(self.seed >> 31, self.seed & 0x7FFFFFFF, self.view),
            ),
        )

    def generate_code(self):
        loop = _decode_in_parallel if Compiler.num_threads > 1 else _decode
        numbers, mixes = _numbers(self.recipe), self.recipe.mixes

        @ready
        def decode(batch_indices, memory, metadata, storage_state):
            return loop(batch_indices, memory, metadata, storage_state, numbers, mixes)

        return decode


class LabelDecoder(IntDecoder):
    """FFCV decoder of an integer field, int64 [batch, 1]."""

    def generate_code(self):
        @ready
        def decode(batch_indices, out, metadata, storage_state):
            out[: len(batch_indices), 0] = metadata[batch_indices]
            return out[: len(batch_indices)]

        return decode


class SampleIdDecoder(IntDecoder):
    """FFCV decoder that yields each sample's id, int64 [batch, 1], from any field."""

    def generate_code(self):
        @ready
        def decode(batch_indices, out, metadata, storage_state):
            out[: len(batch_indices), 0] = batch_indices
            return out[: len(batch_indices)]

        return decode

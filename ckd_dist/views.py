"""A view is a pure function: view(seed, view id, sample id) -> (crop box, flip).

Every draw comes from a counter-based generator keyed by those three integers, inside the FFCV decoder: it does not
depend on thread, rank, batch size, world size or order. So a teacher pass and a student pass see byte-identical
images, and cached logits are addressed by (view, sample). The box does not depend on the output's resolution.

The generator is splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) used
as a hash: draw n of a stream is the finalised value of key + n * golden gamma.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from llvmlite import binding
from numba import int64, njit, types, uint64

from ckd_dist.ffcv_mended import IMAGE_MODES, AllocationQuery, Compiler, IntDecoder, SimpleRGBImageDecoder, libffcv

# fastmath stays off: reassociated sums differ between machines, and one ulp moves a crop by a pixel. The disk cache
# saves every process seconds of compilation; for it, FFCV's C functions are named symbols, not addresses.
compiled = njit(nogil=True, error_model="numpy", fastmath=False, cache=True)
binding.load_library_permanently(libffcv.lib._name)
_resize: Any = types.ExternalFunction("resize", types.void(*[int64] * 11))
_imdecode: Any = types.ExternalFunction(
    "imdecode", types.void(types.uintp, types.uint64, *[types.uint32] * 2, types.uintp, *[types.uint32] * 8)
)

# Counters of the draws within a stream. The ten attempts at a crop take the first twenty.
_TOP, _LEFT, _FLIP = 100, 101, 102
SAMPLED_CODEC = 1000
"""First counter of the draws that are a codec's, not a view's: one for every epoch of the teacher."""

_RANDOM_RESIZED_CROP, _PAD_CROP, _CENTER_CROP = 0, 1, 2
_KINDS = {"random_resized_crop": _RANDOM_RESIZED_CROP, "pad_crop": _PAD_CROP, "center_crop": _CENTER_CROP}


@dataclass(frozen=True, kw_only=True)
class ViewRecipe:
    """How a view is drawn; equal recipes and seeds give equal images."""

    kind: Literal["random_resized_crop", "pad_crop", "center_crop"]
    """random_resized_crop for photographs, pad_crop for small images of one size, center_crop for evaluation."""
    scale: tuple[float, float] = (0.08, 1.0)
    """random_resized_crop: range of the crop's share of the area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """random_resized_crop: range of the crop's width over height."""
    padding: int = 4
    """pad_crop: black pixels added on each side before a crop of the image's own size."""
    center_share: float = 1.0
    """center_crop: side of the square as a share of the image's shorter side."""
    flip: float = 0.5
    """Probability of a mirrored view."""

    def to_dict(self) -> dict:
        """As plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def numbers(self) -> tuple:
        """As compiled code takes it."""
        ratio = (math.log(self.ratio[0]), math.log(self.ratio[1]))
        return (_KINDS[self.kind], *self.scale, *self.ratio, *ratio, self.padding, self.center_share, self.flip)

    @classmethod
    def from_dict(cls, values: dict) -> ViewRecipe:
        """Inverse of `to_dict`."""
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**arguments)


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
    """exp(x) for |x| < 1 from + and * alone: the libraries' versions differ by an ulp between machines."""
    term, total = 1.0, 1.0
    for k in range(1, 20):
        term = term * x / k
        total = total + term
    return total


@compiled
def _crop_box(key, height, width, recipe):
    """Box (top, left, height, width) in pixels; random_resized_crop as torchvision's RandomResizedCrop.get_params."""
    kind, scale_min, scale_max, ratio_min, ratio_max, log_min, log_max, padding, share, _ = recipe
    if kind == _PAD_CROP:
        top = int64(uniform(key, _TOP) * (2 * padding + 1)) - padding
        left = int64(uniform(key, _LEFT) * (2 * padding + 1)) - padding
        return top, left, height, width
    if kind == _CENTER_CROP:
        side = max(int64(share * min(height, width)), int64(1))
        return (height - side) // 2, (width - side) // 2, side, side
    area = float(height) * float(width)
    n = 0
    for _ in range(10):
        target = area * (scale_min + (scale_max - scale_min) * uniform(key, n))
        ratio = _exp(log_min + (log_max - log_min) * uniform(key, n + 1))
        n += 2
        w = int64(math.floor(math.sqrt(target * ratio) + 0.5))
        h = int64(math.floor(math.sqrt(target / ratio) + 0.5))
        if 0 < w <= width and 0 < h <= height:
            top = int64(uniform(key, _TOP) * (height - h + 1))
            left = int64(uniform(key, _LEFT) * (width - w + 1))
            return top, left, h, w
    w, h = width, height
    if width < height * ratio_min:
        h = min(h, int64(math.floor(width / ratio_min + 0.5)))
    elif width > height * ratio_max:
        w = min(w, int64(math.floor(height * ratio_max + 0.5)))
    return (height - h) // 2, (width - w) // 2, h, w


def view(
    recipe: ViewRecipe, seed: int, view_id: int, sample_id: int, height: int, width: int
) -> tuple[tuple[int, int, int, int], bool]:
    """The pure function: box (top, left, height, width) in pixels of a height x width image, and whether to mirror.

    A pad_crop's box may reach over the image's border: what lies outside is black.
    """
    return _view(seed, view_id, sample_id, height, width, recipe.numbers())


@compiled
def _view(seed, view_id, sample_id, height, width, recipe):
    key = stream_key(seed, view_id, sample_id)
    return _crop_box(key, height, width, recipe), uniform(key, _FLIP) < recipe[9]


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
def _render(data, is_jpeg, height, width, seed, view_id, sample, recipe, decoded, padded, out):
    """Fill `out`, uint8 [size, size, 3], with a view of the stored image `data`; the other two are room to work."""
    if is_jpeg:
        _imdecode(data.ctypes.data, data.size, height, width, decoded.ctypes.data, height, width, 0, 0, 1, 1, 0, 0)
        image = decoded[: 3 * height * width].reshape(height, width, 3)
        _render_image(image, seed, view_id, sample, recipe, padded, out)
    else:
        _render_image(data.reshape(height, width, 3), seed, view_id, sample, recipe, padded, out)


@compiled
def _render_image(image, seed, view_id, sample, recipe, padded, out):
    height, width, _ = image.shape
    (top, left, h, w), mirrored = _view(seed, view_id, sample, height, width, recipe)
    if top >= 0 and left >= 0 and top + h <= height and left + w <= width:
        _resize_crop(image, top, left, h, w, out)
    elif h == out.shape[0] and w == out.shape[1]:
        _copy_padded(image, top, left, out)
    else:
        crop = padded[: 3 * h * w].reshape(h, w, 3)
        _copy_padded(image, top, left, crop)
        _resize_crop(crop, 0, 0, h, w, out)
    if mirrored:
        _mirror(out)


def render(
    stored: np.ndarray,
    is_jpeg: bool,
    height: int,
    width: int,
    seed: int,
    view_id: int,
    sample_id: int,
    recipe: ViewRecipe,
    out: np.ndarray,
) -> None:
    """Fill `out`, uint8 [size, size, 3], with a view of one image, `stored` as FFCV keeps it (JPEG, or pixels)."""
    decoded, padded = (np.empty(3 * height * width, dtype=np.uint8) for _ in range(2))
    _render(stored, is_jpeg, height, width, seed, view_id, sample_id, recipe.numbers(), decoded, padded, out)


def _channel(*values: int) -> tuple[AllocationQuery, ...]:
    """Buffers that carry integers in [0, 2**31) into compiled code as their shape, and hold no bytes.

    FFCV asks an operation for its buffers anew at each epoch and hands them to the compiled function as arguments:
    so a value that changes between epochs needs no recompilation, and belongs to that epoch's iterator alone.
    """
    return tuple(AllocationQuery((0, value), np.dtype("u1")) for value in values)


class ViewDecoder(SimpleRGBImageDecoder):
    """FFCV decoder of the field `image`: view `view` of every sample, uint8 [batch, size, size, 3].

    `view` may be set between epochs; it is read when an epoch starts.
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
                *_channel(self.seed >> 31, self.seed & 0x7FFFFFFF, self.view),
            ),
        )

    def generate_code(self):
        jpeg, read, parallel_range = IMAGE_MODES["jpg"], self.memory_read, Compiler.get_iterator()
        recipe = self.recipe.numbers()

        def decode(batch_indices, memory, metadata, storage_state):
            out, decoded, padded, seed_high, seed_low, view_ = memory
            seed, view_id = (seed_high.shape[2] << 31) | seed_low.shape[2], view_.shape[2]
            for b in parallel_range(len(batch_indices)):
                sample = batch_indices[b]
                field = metadata[sample]
                data = read(field["data_ptr"], storage_state)
                height, width = np.int64(field["height"]), np.int64(field["width"])
                is_jpeg = field["mode"] == jpeg
                _render(data, is_jpeg, height, width, seed, view_id, sample, recipe, decoded[b], padded[b], out[b])
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

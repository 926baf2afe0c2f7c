"""A view is a pure function: view(seed, view id, sample id) -> crop box, flip, colours, erased box, partner.

Every draw comes from a counter-based generator keyed by those three integers, and is made where pixels are (`decoder`):
it does not depend on thread, rank, batch size, world size or order. So a teacher pass and a student pass see
byte-identical images, and cached logits are addressed by (view, sample). No draw depends on the output's resolution.

The generator is splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) used
as a hash: draw n of a stream is the finalised value of key + n * golden gamma.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numba import int64, njit, uint8, uint64

# fastmath stays off: reassociated sums differ between machines, and one ulp moves a crop by a pixel. The disk cache
# saves every process seconds of compilation.
compiled = njit(nogil=True, error_model="numpy", fastmath=False, cache=True)

# Counters of the draws within a stream. The ten attempts at a crop take the first twenty.
_TOP, _LEFT, _FLIP = 100, 101, 102
_BRIGHTNESS, _CONTRAST, _SATURATION = 110, 111, 112
_ERASE, _ERASE_TOP, _ERASE_LEFT, _ERASE_COLOUR, _ERASE_SHAPES = 120, 121, 122, 123, 130
_PARTNER, _CHOICE, _WEIGHT, _CUT_Y, _CUT_X = 160, 161, 162, 163, 164
SAMPLED_CODEC = 1000
"""First counter of the draws that are a codec's, not a view's: one for every epoch of the teacher."""

_RANDOM_RESIZED_CROP, _PAD_CROP, _CENTER_CROP = 0, 1, 2
_KINDS = {"random_resized_crop": _RANDOM_RESIZED_CROP, "pad_crop": _PAD_CROP, "center_crop": _CENTER_CROP}


class Numbers(NamedTuple):
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


@dataclass(frozen=True, kw_only=True)
class ViewRecipe:
    """How a view is drawn; equal recipes and seeds give equal images.

    An image is cropped, mirrored, its colours changed, a part of it erased, and the whole then mixed with another image
    of the file that went through the same: one that no order of the images has to bring near, since a decoder reaches
    every sample.
    """

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
    color_jitter: float = 0.0
    """Brightness, contrast and saturation, in this order, are each multiplied by a factor within this of 1."""
    erase: float = 0.0
    """Probability that a box is filled with one random colour; its size and shape as Zhong et al., "Random Erasing Data
    Augmentation" (arXiv 1708.04896)."""
    mixup: float = 0.0
    """Alpha: each image is blended with another by a weight from Beta(alpha, alpha); 0: never. Zhang et al. (arXiv
    1710.09412)."""
    cutmix: float = 0.0
    """Alpha: a box of each image shows another; its area is such a weight; 0: never. Yun et al. (arXiv 1905.04899).
    With mixup too, either takes half of the images."""

    @property
    def mixes(self) -> bool:
        """Whether images are mixed of two."""
        return bool(self.mixup or self.cutmix)

    def to_dict(self) -> dict:
        """As plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def numbers(self) -> tuple:
        """As compiled code takes it: the fields of `Numbers` (numba refuses named tuples in parallel loops)."""
        return tuple(
            Numbers(
                _KINDS[self.kind],
                *self.scale,
                *self.ratio,
                math.log(self.ratio[0]),
                math.log(self.ratio[1]),
                self.padding,
                self.center_share,
                self.flip,
                self.color_jitter,
                self.erase,
                self.mixup > 0,
                self.cutmix > 0,
                _beta_quantiles(self.mixup),
                _beta_quantiles(self.cutmix),
            )
        )

    @classmethod
    def from_dict(cls, values: dict) -> ViewRecipe:
        """Inverse of `to_dict`."""
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**arguments)


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
def between(low, high, draw):
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
        target = area * between(recipe.scale_min, recipe.scale_max, uniform(key, n))
        ratio = _exp(between(recipe.log_ratio_min, recipe.log_ratio_max, uniform(key, n + 1)))
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
def box_and_flip(key, height, width, recipe):
    """Crop box of an image of height x width pixels, and whether it is mirrored."""
    return _crop_box(key, height, width, recipe), uniform(key, _FLIP) < recipe.flip


def view(
    recipe: ViewRecipe, seed: int, view_id: int, sample_id: int, height: int, width: int
) -> tuple[tuple[int, int, int, int], bool]:
    """The pure function: box (top, left, height, width) in pixels of a height x width image, and whether to mirror.

    A pad_crop's box may reach over the image's border: what lies outside is black.
    """
    return _view(seed, view_id, sample_id, height, width, recipe.numbers())


@compiled
def _view(seed, view_id, sample_id, height, width, numbers):
    return box_and_flip(stream_key(seed, view_id, sample_id), height, width, Numbers(*numbers))


@compiled
def colour_factors(key, recipe):
    """Of brightness, contrast and saturation."""
    low, high = max(0.0, 1 - recipe.color_jitter), 1 + recipe.color_jitter
    return (
        between(low, high, uniform(key, _BRIGHTNESS)),
        between(low, high, uniform(key, _CONTRAST)),
        between(low, high, uniform(key, _SATURATION)),
    )


@compiled
def erased_box(key, recipe):
    """Box (top, left, bottom, right) in shares of the sides, empty where nothing is erased, and the colour of it."""
    box, colour = (0.0, 0.0, 0.0, 0.0), (uint8(0), uint8(0), uint8(0))
    if uniform(key, _ERASE) >= recipe.erase:
        return box, colour
    for n in range(_ERASE_SHAPES, _ERASE_SHAPES + 20, 2):
        area = between(0.02, 0.33, uniform(key, n))
        ratio = _exp(between(-1.2039728043259361, 1.1939224684724346, uniform(key, n + 1)))  # logs of 0.3 and 3.3
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
def mix(seed, view_id, sample, count, numbers):
    """(partner, weight of the image itself, box of the partner (top, left, bottom, right) in shares of the sides): of
    mixup the box is empty, of cutmix the weight is what the box leaves."""
    key, recipe = stream_key(seed, view_id, sample), Numbers(*numbers)
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
    return _partners(recipe.numbers(), seed, view_id, ids.astype(np.int64), count)


@compiled
def _partners(numbers, seed, view_id, ids, count):
    partners, weights = np.empty(len(ids), dtype=np.int64), np.empty(len(ids), dtype=np.float32)
    for i in range(len(ids)):
        partners[i], weights[i], _ = mix(seed, view_id, ids[i], count, numbers)
    return partners, weights

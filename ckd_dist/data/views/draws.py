"""Random numbers that are a function of (seed, view, sample, counter).

The generator is splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) used
as a hash: draw n of a stream is the finalised value of key + n * golden gamma.
"""

from __future__ import annotations

import numpy as np
from numba import uint64

from ckd_dist.data.jit import compiled

# Counters of the draws within a stream. The ten attempts at a crop take the first twenty, those at a shape of the
# erased box twenty from ERASE_SHAPES on; the colour of that box takes three.
CROP_TOP, CROP_LEFT, FLIP = 100, 101, 102
BRIGHTNESS, CONTRAST, SATURATION = 110, 111, 112
ERASE, ERASE_TOP, ERASE_LEFT, ERASE_COLOUR, ERASE_SHAPES = 120, 121, 122, 123, 130
PARTNER, MIXUP_OR_CUTMIX, MIX_WEIGHT, CUTMIX_Y, CUTMIX_X, MIXED = 160, 161, 162, 163, 164, 165
GRAYSCALE, BLUR, BLUR_DEVIATION, SOLARIZE = 170, 171, 172, 173
POLICY, POLICY_DRAWS = 200, 4
"""First counter of a policy, and how many each of its operations takes: which, whether, how strong, which way."""
SAMPLED_CODEC = 1000
"""First counter of the draws that are a codec's, not a view's: one for every epoch of the teacher."""


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
def lerp(start, end, weight):
    """start + weight * (end - start), as torch.lerp."""
    return start + (end - start) * weight


@compiled
def exp(x):
    """The exponential of |x| < 1.5, from + and * alone: what libraries give differs by an ulp between machines."""
    term, total = 1.0, 1.0
    for k in range(1, 24):
        term = term * x / k
        total = total + term
    return total


def beta_quantiles(alpha: float, count: int = 4096) -> np.ndarray:
    """Quantiles of Beta(alpha, alpha) at the middles of `count` equal shares, in whole 256ths: int64 [count]; none for
    alpha 0.

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

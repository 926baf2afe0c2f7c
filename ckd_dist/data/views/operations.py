"""Operations on the values of pixels, in place, on images uint8 [height, width, 3].

They give what torchvision.transforms.functional gives of uint8 tensors, in the same float32 arithmetic. Loops run over
flat arrays, by unsigned indices where these are computed, which saves a test for negative ones: so the compiler makes
vector instructions of them. These take a third of the time of a table of 256 entries, or less.
"""

from __future__ import annotations

import numpy as np
from numba import float32, int32, int64, uint8, uint16, uint32, uint64

from ckd_dist.data.jit import compiled

_PERIOD = 48
"""Bytes after which channels and vectors of 16 bytes begin together."""


@compiled
def brighten(image, factor):
    """Multiply by a factor."""
    _scale(image.reshape(-1), float32(factor), float32(0))


@compiled
def change_contrast(image, factor):
    """Move away from the mean grey of the image by a factor."""
    mean = float32(_sum_of_greys(image)) / float32(image.shape[0] * image.shape[1])
    _scale(image.reshape(-1), float32(factor), float32(1 - factor) * mean)


@compiled
def _scale(values, factor, shift):
    for i in range(values.size):
        values[i] = _clipped(factor * float32(values[i]) + shift)


@compiled
def _clipped(value):
    return uint8(int32(min(max(value, float32(0)), float32(255))))


@compiled
def _grey(values, k):
    """Grey of the pixel whose first value is at `k`, rounded down: int32."""
    red, green, blue = float32(values[k]), float32(values[k + uint64(1)]), float32(values[k + uint64(2)])
    return int32(float32(0.2989) * red + float32(0.587) * green + float32(0.114) * blue)


@compiled
def _sum_of_greys(image):
    values, total = image.reshape(-1), int64(0)
    for y in range(image.shape[0]):
        row = int32(0)  # 32 bits hold a row's, and make narrower vectors
        for x in range(image.shape[1]):
            row = int32(row + _grey(values, uint64(3 * (y * image.shape[1] + x))))
        total += row
    return total


@compiled
def saturate(image, factor):
    """Move each pixel away from its grey by a factor."""
    values, factor, rest = image.reshape(-1), float32(factor), float32(1 - factor)
    for i in range(image.shape[0] * image.shape[1]):
        red = uint64(3 * i)
        green, blue = red + uint64(1), red + uint64(2)
        grey = rest * float32(_grey(values, red))
        values[red] = _clipped(factor * float32(values[red]) + grey)
        values[green] = _clipped(factor * float32(values[green]) + grey)
        values[blue] = _clipped(factor * float32(values[blue]) + grey)


@compiled
def take_colours(image):
    """Set each pixel to its grey."""
    values = image.reshape(-1)
    for i in range(image.shape[0] * image.shape[1]):
        red = uint64(3 * i)
        grey = uint8(_grey(values, red))
        values[red] = grey
        values[red + uint64(1)] = grey
        values[red + uint64(2)] = grey


@compiled
def sharpen(image, factor):
    """Move each pixel away from a mean of it, at weight 5, and its eight neighbours by a factor; at the border, where
    some are missing, from itself."""
    height, width, _ = image.shape
    if height < 3 or width < 3:
        return
    count, factor, rest = 3 * width, float32(factor), float32(1 - factor)
    values = image.reshape(-1)
    source, sums, smooth = values.copy(), np.empty(count, dtype=np.uint16), np.empty(count, dtype=np.uint8)
    for y in range(height):
        row, out = source[y * count : (y + 1) * count], values[y * count : (y + 1) * count]
        if 0 < y < height - 1:
            _smooth_row(source, y * count, sums, smooth)
        else:
            smooth[:] = row
        for i in range(count):
            out[i] = _clipped(factor * float32(row[i]) + rest * float32(smooth[i]))


@compiled
def _smooth_row(source, start, sums, out):
    """The mean that `sharpen` takes, of the row that begins at `start` of a flat image; the first and the last pixel
    as they are."""
    count = out.size
    above, row = source[start - count : start], source[start : start + count]
    below = source[start + count : start + 2 * count]
    for i in range(count):
        sums[i] = uint16(above[i]) + uint16(row[i]) + uint16(below[i])
    inner = slice(3, count - 3)
    left, middle, right, centre, smooth = sums[: count - 6], sums[inner], sums[6:], row[inner], out[inner]
    for i in range(count - 6):
        near = uint16(left[i] + middle[i] + right[i])
        near = uint16(near + uint16(4) * uint16(centre[i]) + uint16(6))
        # The nearest whole number to a thirteenth, of up to 3315: none lies half way between two.
        smooth[i] = uint8((uint32(near) * uint32(5042)) >> uint32(16))
    for i in range(3):
        out[i], out[count - 1 - i] = row[i], row[count - 1 - i]


@compiled
def keep_bits(image, bits):
    """Keep the highest `bits` bits, 1 to 8, of each value."""
    values, mask = image.reshape(-1), uint8(256 - (1 << (8 - bits)))
    for i in range(values.size):
        values[i] &= mask


@compiled
def invert_from(image, threshold):
    """Invert values of `threshold`, 0 to 256, and more."""
    values = image.reshape(-1)
    if threshold > 255:
        return
    least = uint8(threshold)
    for i in range(values.size):
        values[i] ^= uint8(255) if values[i] >= least else uint8(0)


@compiled
def stretch(image):
    """Scale each channel to the whole range of values."""
    values = image.reshape(-1)
    low, high = np.full(_PERIOD, 255, dtype=np.uint8), np.zeros(_PERIOD, dtype=np.uint8)
    whole = values.size // _PERIOD * _PERIOD
    for start in range(0, whole, _PERIOD):
        for j in range(_PERIOD):
            value = values[uint64(start + j)]
            low[j], high[j] = min(low[j], value), max(high[j], value)
    for j in range(values.size - whole):
        low[j], high[j] = min(low[j], values[whole + j]), max(high[j], values[whole + j])
    shift, scale, changes = np.empty(_PERIOD, dtype=np.float32), np.empty(_PERIOD, dtype=np.float32), False
    for j in range(_PERIOD):
        least, most = low[j % 3 :: 3].min(), high[j % 3 :: 3].max()
        shift[j], scale[j] = 0, 1
        if most > least:
            shift[j], scale[j] = least, (float32(1) / float32(most - least)) * float32(255)
            changes |= most - least < 255
    if not changes:
        return
    for start in range(0, whole, _PERIOD):
        for j in range(_PERIOD):
            k = uint64(start + j)
            values[k] = _clipped((float32(values[k]) - shift[j]) * scale[j])
    for j in range(values.size - whole):
        values[whole + j] = _clipped((float32(values[whole + j]) - shift[j]) * scale[j])


@compiled
def equalize(image):
    """Make the values of each channel as frequent as one another, as far as a function of the value can."""
    values, counts = image.reshape(-1), np.zeros((3, 256), dtype=np.uint32)
    for i in range(image.shape[0] * image.shape[1]):
        k = uint64(3 * i)
        counts[0, values[k]] += uint32(1)
        counts[1, values[k + uint64(1)]] += uint32(1)
        counts[2, values[k + uint64(2)]] += uint32(1)
    table = np.empty((3, 256), dtype=np.uint8)
    for c in range(3):
        last = 255
        while last > 0 and counts[c, last] == 0:
            last -= 1
        step = (image.shape[0] * image.shape[1] - int64(counts[c, last])) // 255
        below = step // 2
        for value in range(256):
            table[c, value] = value if step == 0 else min(below // step, 255)
            below += int64(counts[c, value])
    for i in range(image.shape[0] * image.shape[1]):
        k = uint64(3 * i)
        values[k] = table[0, values[k]]
        values[k + uint64(1)] = table[1, values[k + uint64(1)]]
        values[k + uint64(2)] = table[2, values[k + uint64(2)]]

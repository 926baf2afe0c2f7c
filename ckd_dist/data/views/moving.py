"""Operations that move pixels, in place, on images uint8 [height, width, 3]: as torchvision's affine with nearest
interpolation; black where a pixel comes from outside.

Positions are whole numbers of 2^-32 pixels, so that what is inside can be told for a row at once, exactly. A pixel at
(x, y) has its centre at (x + 0.5, y + 0.5).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import int64, types, uint64
from numba.extending import intrinsic

from ckd_dist.data.jit import compiled

_ONE = 1 << 32


@compiled
def move_rows(image, per_row, shift):
    """Move row y to the right by `shift` pixels and left by `per_row` times y + 0.5: a horizontal shear, or a
    translation."""
    height, width, _ = image.shape
    values, count = image.reshape(-1), 3 * width
    line = np.empty(count, dtype=np.uint8)
    for y in range(height):
        start, left = y * count, 3 * min(max(_nearest(per_row * (y + 0.5)) - shift, -width), width)
        _copy(line, 0, values, start, count)
        _copy(values, start + max(-left, 0), line, max(left, 0), count - abs(left))
        _clear(values, start, -left)
        _clear(values, start + count - left, left)


@compiled
def move_down(image, shift):
    """Move all rows down by `shift` pixels."""
    height, values, count = image.shape[0], image.reshape(-1), 3 * image.shape[1]
    for n in range(height):
        y = height - 1 - n if shift > 0 else n  # a row is read before another is written over it
        if 0 <= y - shift < height:
            _copy(values, y * count, values, (y - shift) * count, count)
        else:
            _clear(values, y * count, count)


@compiled
def move_columns(image, per_column):
    """Move column x up by `per_column` times x + 0.5 pixels: a vertical shear."""
    height, width, _ = image.shape
    source, values, count = _padded(image), image.reshape(-1), 3 * width
    offsets = np.empty(width, dtype=np.int64)
    first_row, step = _fixed(0.5 * per_column + 0.5), _fixed(per_column)
    for x in range(width):
        offsets[x] = 3 * x + ((first_row + x * step) >> 32) * count
    for y in range(height):
        start = y * count
        first, last = _inside(first_row + y * _ONE, step, height, width)
        _clear(values, start, 3 * first)
        for x in range(first, last - 1):
            _copy4(values, start + 3 * x, source, start + offsets[x])
        if first < last:
            _copy(values, start + 3 * last - 3, source, start + offsets[last - 1], 3)
        _clear(values, start + 3 * last, count - 3 * last)


@compiled
def rotate(image, sine, cosine):
    """Rotate by the angle of this sine and cosine about the centre, counter-clockwise."""
    height, width, _ = image.shape
    source, values, count = _padded(image), image.reshape(-1), 3 * width
    across, down = _fixed(cosine), _fixed(sine)
    for y in range(height):
        start, from_centre = y * count, y + 0.5 - 0.5 * height
        u = _fixed(cosine * (0.5 - 0.5 * width) - sine * from_centre + 0.5 * width)
        v = _fixed(sine * (0.5 - 0.5 * width) + cosine * from_centre + 0.5 * height)
        first, last = _inside(u, across, width, width)
        first_row, last_row = _inside(v, down, height, width)
        first, last = max(first, first_row), min(last, last_row)
        last = max(first, last)
        u, v = u + first * across, v + first * down
        _clear(values, start, 3 * first)
        for x in range(first, last - 1):
            _copy4(values, start + 3 * x, source, (v >> 32) * count + 3 * (u >> 32))
            u, v = u + across, v + down
        if first < last:
            _copy(values, start + 3 * last - 3, source, (v >> 32) * count + 3 * (u >> 32), 3)
        _clear(values, start + 3 * last, count - 3 * last)


@compiled
def _nearest(value):
    return int64(np.floor(value + 0.5))


@compiled
def _fixed(value):
    return _nearest(value * _ONE)


@compiled
def _inside(start, step, size, count):
    """The n from 0 to `count`, as first and one after the last, for which `start` + n `step` lies in `size` pixels."""
    beyond = start - size * _ONE
    if step > 0:
        first, last = -(start // step), -(beyond // step)
    elif step < 0:
        first, last = beyond // -step + 1, start // -step + 1
    else:
        first, last = 0, count if start >= 0 and beyond < 0 else 0
    first = min(max(first, 0), count)
    return first, min(max(last, first), count)


@compiled
def _padded(image):
    """A flat copy that `_copy4` can read the last pixel of."""
    source = np.empty(image.size + 1, dtype=np.uint8)
    _copy(source, 0, image.reshape(-1), 0, image.size)
    return source


@compiled
def _copy(out, k, source, p, count):
    # Not by slices: numba looks for overlaps at each, and copies value by value.
    for i in range(count):
        out[uint64(k + i)] = source[uint64(p + i)]


@compiled
def _clear(out, k, count):
    for i in range(count):
        out[uint64(k + i)] = 0


def _copy4_typed(typing_context: Any, out: Any, k: Any, source: Any, p: Any) -> Any:
    """Copy four bytes, a pixel and one that the next pixel overwrites, from source[p] to out[k]: a rotation takes half
    the time of three copies of one."""

    def generate(context, builder, signature, arguments):
        arrays = [context.make_array(signature.args[n])(context, builder, arguments[n]).data for n in (0, 2)]
        word = ir.IntType(32).as_pointer()
        target, origin = (
            builder.bitcast(builder.gep(array, [arguments[n]]), word) for array, n in zip(arrays, (1, 3), strict=True)
        )
        builder.store(builder.load(origin, align=1), target, align=1)
        return context.get_dummy_value()

    return types.void(out, k, source, p), generate


_copy4: Any = intrinsic(_copy4_typed)

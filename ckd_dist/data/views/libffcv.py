"""FFCV's C functions, called from compiled code: JPEG decoding and resizing."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding
from numba import int64, types

from ckd_dist.data.ffcv_repairs import libffcv
from ckd_dist.data.jit import compiled

# Named symbols, not addresses: machine code that holds an address cannot be cached on disk.
binding.load_library_permanently(libffcv.lib._name)
_resize: Any = types.ExternalFunction("resize", types.void(*[int64] * 11))
_imdecode: Any = types.ExternalFunction(
    "imdecode", types.void(types.uintp, types.uint64, *[types.uint32] * 2, types.uintp, *[types.uint32] * 8)
)


@compiled
def decode_jpeg(data, height, width):
    """The image of height x width pixels in the bytes `data` of a JPEG file: uint8 [3 * height * width]."""
    image = np.empty(3 * height * width, dtype=np.uint8)
    _imdecode(data.ctypes.data, data.size, height, width, image.ctypes.data, height, width, 0, 0, 1, 1, 0, 0)
    return image


@compiled
def resize_crop(image, top, left, height, width, out):
    """Resize a box of `image`, uint8 [h, w, 3], to the size of `out`, uint8 [height, width, 3]."""
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

"""A view of an image that is in memory, without FFCV: byte for byte what `render` makes of the same pixels.

FFCV resizes with OpenCV, and so does this; all draws and all other arithmetic are the same compiled functions.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from ckd_dist.core.errors import UserError
from ckd_dist.data.jit import compiled
from ckd_dist.data.views.draws import stream_key
from ckd_dist.data.views.finishing import finish
from ckd_dist.data.views.geometry import box_and_flip, copy_padded
from ckd_dist.data.views.parameters import Parameters


def replay(image: np.ndarray, values: tuple, seed: int, view_id: int, sample: int, size: int) -> np.ndarray:
    """A view, not yet mixed, of an image uint8 [height, width, 3]: uint8 [size, size, 3]; `values` are the recipe's
    `parameters`. Raises `UserError` where OpenCV is missing."""
    height, width, _ = image.shape
    (top, left, h, w), flip = _box_and_flip(seed, view_id, sample, height, width, values)
    if top < 0 or left < 0 or top + h > height or left + w > width:
        crop = np.empty((h, w, 3), dtype=np.uint8)
        copy_padded(image, top, left, crop)
    else:
        crop = image[top : top + h, left : left + w]
    cv2 = _opencv()
    # Also where the size stays: then it copies, and `finish` must not write into the caller's image.
    out = np.empty((size, size, 3), dtype=np.uint8)
    cv2.resize(crop, (size, size), dst=out, interpolation=cv2.INTER_AREA)
    _finish(out, flip, seed, view_id, sample, values)
    return out


@cache
def _opencv() -> Any:
    try:
        import cv2
    except ImportError:
        raise UserError("Views resize with OpenCV, which is not installed: pip install 'ckd_dist[views]'") from None
    cv2.setNumThreads(1)  # its threads do not survive a fork, and a DataLoader's workers are forked
    return cv2


@compiled
def _box_and_flip(seed, view_id, sample, height, width, values):
    return box_and_flip(stream_key(seed, view_id, sample), height, width, Parameters(*values))


@compiled
def _finish(image, flip, seed, view_id, sample, values):
    finish(image, flip, stream_key(seed, view_id, sample), Parameters(*values))

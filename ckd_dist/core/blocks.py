"""The noise of a randomised block design: what is compared in rows, the seeds as blocks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Residuals(NamedTuple):
    """What blocks do to values beyond the effect of the row and of the block itself."""

    squares: float
    """Sum of them."""
    freedom: int

    def __add__(self, other: object) -> Residuals:
        assert isinstance(other, Residuals)
        return Residuals(self.squares + other.squares, self.freedom + other.freedom)


def residuals(values: np.ndarray) -> Residuals:
    """Of values [rows, blocks]."""
    left = values - values.mean(1, keepdims=True) - values.mean(0, keepdims=True) + values.mean()
    return Residuals(float(np.square(left).sum()), (len(values) - 1) * (values.shape[1] - 1))

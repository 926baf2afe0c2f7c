"""The images of one step on one rank, with their labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch


class Mixed(NamedTuple):
    """What else is in the images of a batch, after mixup or cutmix."""

    labels: torch.Tensor
    """Of the other image, int64 [n]."""
    weights: torch.Tensor
    """Of the image's own label, float32 [n]; the other has the rest."""


def over_labels(
    value: Callable[[torch.Tensor], torch.Tensor], labels: torch.Tensor, mixed: Mixed | None
) -> torch.Tensor:
    """`value`, a function of labels int64 [n] that gives [n]; of mixed images, its mean over both labels."""
    own = value(labels)
    return own if mixed is None else torch.lerp(value(mixed.labels), own, mixed.weights)


Rows = Callable[[np.ndarray, int], np.ndarray]
"""(sample ids [n], view) -> a store's records, uint8 [n, members, bytes]; called in the loader's thread."""


# ------------------------------------------------------------------------------------------- batch


@dataclass
class Batch:
    """Images of one step on one rank, on the rank's device."""

    images: torch.Tensor
    """float32 [n, 3, size, size], normalised, channels_last."""
    labels: torch.Tensor
    """int64 [n]."""
    ids: torch.Tensor
    """Sample ids, int64 [n], on the CPU."""
    mixed: Mixed | None = None
    """What each image is mixed with, where the recipe mixes."""
    teacher_records: torch.Tensor | None = None
    """What each of the teacher's checkpoints says, as a codec keeps it: uint8 [n, members, bytes]."""

    def top1(self, answers: torch.Tensor) -> torch.Tensor:
        """100 where an answer, a class int64 [n], is the label, else 0; of a mixed image, the share of that label."""
        return over_labels(lambda labels: 100.0 * (answers == labels), self.labels, self.mixed)

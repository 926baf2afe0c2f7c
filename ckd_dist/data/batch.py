"""The images of one step on one rank, with their labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch


class Mixed(NamedTuple):
    """The second label of each image of a batch after mixup or cutmix, and how much each of the two counts."""

    labels: torch.Tensor
    """Labels of the images mixed in, int64 [n]."""
    weights: torch.Tensor
    """Weights of the images' own labels, float32 [n], in [0, 1]; the second label has the rest."""


def over_labels(
    value: Callable[[torch.Tensor], torch.Tensor], labels: torch.Tensor, mixed: Mixed | None
) -> torch.Tensor:
    """`value`, a function of labels int64 [n] that gives [n]; of mixed images, its mean over both labels."""
    own = value(labels)
    return own if mixed is None else torch.lerp(value(mixed.labels), own, mixed.weights)


def normalized(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Images uint8 [n, 3, size, size] as a model gets them: float32 [n, 3, size, size], channels_last, on the same
    device, by mean and deviation of pixels in [0, 1]; rounded as the FFCV loader rounds."""
    mean_, std_ = (torch.tensor(list(values), device=images.device).view(1, 3, 1, 1) for values in (mean, std))
    return torch.addcmul(-mean_ / std_, images.to(memory_format=torch.channels_last).float(), 1 / (255 * std_))


Rows = Callable[[np.ndarray, int], np.ndarray]
"""(sample ids [n], view) -> a store's records, uint8 [n, members, bytes]; called in the loader's thread."""


@dataclass
class Batch:
    """Images of one step on one rank, on the rank's device."""

    images: torch.Tensor
    """float32 [n, 3, size, size], normalised, channels_last."""
    labels: torch.Tensor
    """int64 [n]; zeros where the images are not `labelled`."""
    ids: torch.Tensor
    """Sample ids, int64 [n], on the CPU."""
    labelled: bool = True
    """Whether the images have labels."""
    mixed: Mixed | None = None
    """None unless the recipe has mixup or cutmix."""
    teacher_records: torch.Tensor | None = None
    """Encoded outputs of each of the teacher's checkpoints, from a store: uint8 [n, members, bytes]."""
    partner_records: torch.Tensor | None = None
    """The same of the images mixed in, where `teacher_records` are of the images alone; None where the teacher was
    asked about the mixed images."""
    teacher_maps: Sequence[torch.Tensor] = ()
    """The feature maps that its stages end with, each [n, channels, side, side], where a student asks for them."""

    def parts(self, count: int) -> list[Batch]:
        """The batch in so many parts, whose sizes differ by one image at most."""
        if count == 1:
            return [self]
        edges = [len(self.images) * part // count for part in range(count + 1)]
        return [self._slice(slice(start, stop)) for start, stop in pairwise(edges)]

    def _slice(self, part: slice) -> Batch:
        mixed, records, partners = self.mixed, self.teacher_records, self.partner_records
        return replace(
            self,
            images=self.images[part],
            labels=self.labels[part],
            ids=self.ids[part],
            mixed=None if mixed is None else Mixed(mixed.labels[part], mixed.weights[part]),
            teacher_records=None if records is None else records[part],
            partner_records=None if partners is None else partners[part],
            teacher_maps=[each[part] for each in self.teacher_maps],
        )

    @classmethod
    def joined(cls, batches: Sequence[Batch]) -> Batch:
        """One after another as one, as a loader gives them; they are of the same kind."""
        if len(batches) == 1:
            return batches[0]
        mixed = [each.mixed for each in batches if each.mixed is not None]
        records = [each.teacher_records for each in batches if each.teacher_records is not None]
        return cls(
            images=torch.cat([each.images for each in batches]),
            labels=torch.cat([each.labels for each in batches]),
            ids=torch.cat([each.ids for each in batches]),
            labelled=batches[0].labelled,
            mixed=Mixed(*map(torch.cat, zip(*mixed, strict=True))) if mixed else None,
            teacher_records=torch.cat(records) if records else None,
        )

    def unmixed(self) -> tuple[Batch, Batch]:
        """The labels and the teacher's answers of the images alone, and those of the images mixed in."""
        assert self.mixed is not None
        own = replace(self, mixed=None, partner_records=None)
        return own, replace(own, labels=self.mixed.labels, teacher_records=self.partner_records)

    def top1(self, predictions: torch.Tensor) -> torch.Tensor:
        """Accuracy of each prediction, a class int64 [n], in percent: 100 for the label, else 0; for a mixed image the
        weight of the label that is predicted. float32 [n]."""
        return over_labels(lambda labels: 100.0 * (predictions == labels), self.labels, self.mixed)

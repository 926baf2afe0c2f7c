"""Feature distillation by knowledge review: a student's maps, from the smallest on each joined with those after it, are
compared with the teacher's.

Chen, Liu, Zhao, Jia, "Distilling Knowledge via Knowledge Review" (arXiv 2104.09044, ReviewKD), in the form of
mdistiller (megvii-research/mdistiller, mdistiller/distillers/ReviewKD.py at a08d46f), with the maps that modules of any
network give in place of tables of networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ckd_dist.nn.features import FeatureLayer, recorded

# ------------------------------------------------------------------------------------------- the loss


def review_loss(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum over the levels of `context_loss` -> float32 [n]: of the student what `Connectors` give, of the teacher the
    maps of its stages, of which the last ones count."""
    pairs = zip(student, levels(teacher)[-len(student) :], strict=True)
    return torch.stack([context_loss(ours, theirs) for ours, theirs in pairs]).sum(dim=0)


def context_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """HCL, the hierarchical context loss: the squared difference of two maps [n, channels, side, side] and of their
    averages over 4x4, 2x2 and 1x1 areas, as far as these are fewer than the map's positions; each has half of the
    weight of the one before, and all weights sum to 1 -> float32 [n]."""
    student, teacher = student.float(), teacher.float()
    values = [(student - teacher).square().mean(dim=(1, 2, 3))]
    for areas in (4, 2, 1):
        if areas < student.shape[2]:
            ours, theirs = (F.adaptive_avg_pool2d(each, areas) for each in (student, teacher))
            values.append((ours - theirs).square().mean(dim=(1, 2, 3)))
    weights = [0.5**position for position in range(len(values))]
    return torch.stack([weight / sum(weights) * value for weight, value in zip(weights, values, strict=True)]).sum(
        dim=0
    )


def levels(maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The maps of the stages, and the mean of the last one over its positions, [n, channels, 1, 1]."""
    return [*maps, maps[-1].float().mean(dim=(2, 3), keepdim=True)]


def warm_up(epoch: int, epochs: int) -> float:
    """Share of its weight that the loss has in an epoch, counted from 0: it rises linearly over a twelfth of them, as
    over 20 of the published 240."""
    return min(1.0, 12 * (epoch + 1) / epochs)


# ------------------------------------------------------------------------------------------- the student's side


class _Fusion(nn.Module):
    """ABF, attention-based fusion: a map of the student, joined with what comes from the smaller ones, in the shape of
    a map of the teacher."""

    def __init__(self, student_channels: int, width: int, teacher: tuple[int, int], *, is_last: bool):
        super().__init__()
        channels, self._side = teacher
        self.reduce = nn.Sequential(nn.Conv2d(student_channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.attention = None if is_last else nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid())
        self.expand = nn.Sequential(nn.Conv2d(width, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        for each in (self.reduce, self.expand):
            nn.init.kaiming_uniform_(each[0].weight, a=1)  # type: ignore[arg-type]

    def forward(self, own: torch.Tensor, after: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(what goes on to the map before it [n, width, side, side], what is compared with the teacher's map [n,
        channels, side, side]) of the student's map and of what comes from the map after it."""
        joined = self.reduce(own)
        if self.attention is not None and after is not None:
            after = F.interpolate(after, size=own.shape[2:], mode="nearest")
            shares = self.attention(torch.cat([joined, after], dim=1))
            joined = joined * shares[:, :1] + after * shares[:, 1:]
        if joined.shape[2] != self._side:
            joined = F.interpolate(joined, size=(self._side, self._side), mode="nearest")
        return joined, self.expand(joined)


class Connectors(nn.Module):
    """The layers that make maps in the shapes of the teacher's from the student's, for training only."""

    def __init__(self, student: Sequence[FeatureLayer], teacher: Sequence[FeatureLayer]):
        """For as many stages of both, counted from the last, as both have."""
        super().__init__()
        self._stages = min(len(student), len(teacher))
        channels = [stage.channels for stage in student[-self._stages :]]
        theirs = [(stage.channels, stage.side) for stage in teacher[-self._stages :]]
        channels, theirs = [*channels, channels[-1]], [*theirs, (theirs[-1][0], 1)]  # of `levels`
        width = min(512, channels[-1])
        self.fusions = nn.ModuleList(
            _Fusion(count, width, shape, is_last=position == self._stages)
            for position, (count, shape) in enumerate(zip(channels, theirs, strict=True))
        )

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Maps of the student's stages [n, channels, side, side] -> one for each level of the teacher's, in the order
        of the stages."""
        found: list[torch.Tensor] = []
        after = None
        for fusion, own in zip(self.fusions[::-1], levels(maps[-self._stages :])[::-1], strict=True):
            after, compared = fusion(own, after)
            found.insert(0, compared)
        return found


class ReviewingStudent(nn.Module):
    """A student in training, and its connectors; what is evaluated and kept is `student`."""

    def __init__(
        self, student: nn.Module, stages: Sequence[FeatureLayer], teacher: Sequence[FeatureLayer], weight: float
    ):
        """`weight` is that of `review_loss`."""
        super().__init__()
        self.student, self.weight, self._stages = student, weight, stages
        self.connectors = Connectors(stages, teacher)

    def forward(self, images: torch.Tensor) -> tuple[Any, list[torch.Tensor]]:
        """(the student's output, its maps in the shapes of the teacher's)."""
        with recorded(self.student, self._stages) as maps:
            output = self.student(images)
        return output, self.connectors(maps)

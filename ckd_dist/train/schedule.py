"""What each epoch trains on: a view of the images, and which of the teacher's checkpoints a student learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ckd_dist.core.console import say
from ckd_dist.core.errors import require
from ckd_dist.store.ahead import ReadAhead
from ckd_dist.store.reader import StoreReader
from ckd_dist.train.options import TeacherConfig
from ckd_dist.train.records import EpochInputs, StoredRecords

if TYPE_CHECKING:
    from ckd_dist.train.teachers import OnlineTeacher  # which needs FFCV; the train loop does not


@dataclass(frozen=True)
class TeacherSchedule:
    """The checkpoints that one student learns from."""

    checkpoints: list[list[int]]
    """For each epoch, positions among all checkpoints at hand; empty lists for a student without a teacher."""
    weights: list[float]
    """Of the checkpoints of an epoch, in their order; their sum is 1."""
    scales: list[float]
    """For each epoch, what the teacher's logits are multiplied by."""

    @classmethod
    def of(
        cls,
        teacher: TeacherConfig,
        available: Sequence[int | str],
        epochs: int,
        factors: Sequence[float] | None = None,
    ) -> TeacherSchedule:
        """As the options say, whose checkpoints are some of the `available` ones; `factors` of their logits, in their
        order, where these are calibrated."""
        positions = [available.index(name) for name in teacher.checkpoints]
        in_turn = teacher.combine == "sequence"
        weighed = factors if factors and not in_turn else teacher.weights
        weights = [weight / sum(weighed) for weight in weighed] or [1 / len(positions) for _ in positions]
        if not in_turn:
            return cls([positions] * epochs, weights, [sum(factors) if factors else 1.0] * epochs)
        sequence = turns(weights, epochs)
        say(f"teachers in sequence: epochs {', '.join(str(available[positions[turn]]) for turn in sequence)}")
        scales = [factors[turn] if factors else 1.0 for turn in sequence]
        return cls([[positions[turn]] for turn in sequence], [1.0], scales)


def turns(shares: list[float], epochs: int) -> list[int]:
    """Which of several teachers has each of the student's epochs, one after another, given their shares of 1.

    Raises `UserError` when one of them would have none.
    """
    ends = np.round(np.cumsum(shares) * epochs).astype(int)
    counts = np.diff(ends, prepend=0)
    require(
        bool((counts > 0).all()),
        f"teacher.combine sequence: {len(shares)} checkpoints cannot all have a share of {epochs} epochs",
    )
    return np.repeat(np.arange(len(shares)), counts).tolist()


@dataclass(frozen=True)
class EpochSchedule:
    """What every epoch trains on: a view of the images, and the records of the teacher's checkpoints, if there are
    any."""

    views: int
    """Number of views, after which the first comes again."""
    first_view: int = 0
    teacher: StoreReader | OnlineTeacher | None = None
    checkpoints: list[list[int]] = field(default_factory=list)
    """For each epoch, positions among the teacher's checkpoints: the columns of its records."""
    read_ahead: int | None = None
    """See `store.ahead.ReadAhead`."""
    repeats: int = 1
    """Views of an image in a step: those that so many epochs would have had, one each."""

    def inputs(self, epoch: int) -> EpochInputs:
        """What epoch `epoch`, counted from 0, trains on; collective. Raises `UserError` where records that it needs are
        damaged."""
        views = self._views(epoch)
        if self.teacher is None or not self.checkpoints[epoch]:
            return EpochInputs(views)
        if isinstance(self.teacher, StoreReader):
            self._ahead.begin(epoch)
            return EpochInputs(views, rows=StoredRecords(self.teacher, self.checkpoints[epoch]))
        return EpochInputs(views, teacher=self.teacher.records(self.checkpoints[epoch]))

    def _views(self, epoch: int) -> list[int]:
        first = epoch // self.repeats * self.repeats
        return [self.first_view + (first + turn) % self.views for turn in range(self.repeats)]

    @cached_property
    def _ahead(self) -> ReadAhead:
        assert isinstance(self.teacher, StoreReader)
        needs = [
            {each for view in self._views(epoch) for each in self.teacher.views_of(columns, view)}
            for epoch, columns in enumerate(self.checkpoints)
        ]
        return ReadAhead(self.teacher, needs, self.read_ahead)

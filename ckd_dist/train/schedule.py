"""What a student is taught: which checkpoints of the teacher it hears in each epoch, and the loss that it minimises."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ckd_dist.core.console import say
from ckd_dist.core.errors import require
from ckd_dist.data.batch import Batch
from ckd_dist.nn import losses
from ckd_dist.store.codecs.base import Codec
from ckd_dist.store.codecs.targets import compared_logits
from ckd_dist.train.options import DistillConfig


class Lessons:
    """Which of the teacher's checkpoints a student hears in each epoch, and the loss that it minimises."""

    def __init__(self, config: DistillConfig, available: list[int | str], codec: Codec):
        """`available` are all checkpoints at hand, of which `config.teacher` names some; none for a plain student."""
        self._config, self._codec = config, codec
        asked = config.teacher
        members = [available.index(name) for name in asked.checkpoints]
        self._weights = [weight / sum(asked.weights) for weight in asked.weights] or [1 / len(members) for _ in members]
        self.members = [members] * config.epochs
        """For each epoch, positions among `available`."""
        if asked.combine == "sequence":
            self.members = [[members[turn]] for turn in turns(self._weights, config.epochs)]
            self._weights = [1.0]
            say(f"teachers in sequence: epochs {', '.join(str(available[turn]) for (turn,) in self.members)}")

    def loss(
        self, columns: Callable[[int], list[int]], logits: torch.Tensor, batch: Batch, epoch: int
    ) -> dict[str, torch.Tensor]:
        """An `engine.Loss`, once `columns` is given: where in `batch.teacher_records` the members of an epoch are."""
        config = self._config
        if not self.members[epoch]:
            return {"loss": losses.cross_entropy(logits, batch.labels, config.label_smoothing, batch.mixed)}
        assert batch.teacher_records is not None
        kd, combine = config.kd, config.teacher.combine
        records = torch.stack([batch.teacher_records[:, column] for column in columns(epoch)], dim=1)
        ours, teacher, answers = compared_logits(
            self._codec, records, kd, logits, weights=self._weights, combine=combine
        )
        values = losses.distillation(logits, teacher, batch.labels, kd, config.label_smoothing, batch.mixed, ours)
        values["teacher_top1"] = batch.top1(answers)
        values["agreement"] = 100.0 * (answers == logits.argmax(dim=1))
        return values


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

"""What a model minimises at every step: the loss of the label, alone or with a distillation loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ckd_dist.data.batch import Batch
from ckd_dist.nn import losses
from ckd_dist.store.codecs.base import Codec
from ckd_dist.store.codecs.targets import compared_logits
from ckd_dist.train.options import DistillConfig, TrainConfig


@dataclass(frozen=True)
class LabelLoss:
    """The loss of the labels alone."""

    config: TrainConfig

    def __call__(self, logits: torch.Tensor, batch: Batch, epoch: int) -> dict[str, torch.Tensor]:
        """A `learner.Loss`."""
        function = losses.LABEL_LOSSES[self.config.label_loss]
        return {"loss": function(logits, batch.labels, self.config.label_smoothing, batch.mixed)}


@dataclass(frozen=True)
class DistillationLoss:
    """The loss of the labels and the distillation loss, weighted as `config.kd` says."""

    config: DistillConfig
    codecs: Sequence[Sequence[Codec]]
    """For each epoch, those of the records of this student's checkpoints."""
    columns: Sequence[Sequence[int]]
    """For each epoch, the columns of `batch.teacher_records` that hold this student's checkpoints."""
    weights: list[float]
    """Of these checkpoints, in their order."""
    scales: Sequence[float] | None = None
    """For each epoch, what the teacher's logits are multiplied by; default: 1."""

    def __call__(self, logits: torch.Tensor, batch: Batch, epoch: int) -> dict[str, torch.Tensor]:
        """A `learner.Loss`; beside the loss, the teacher's top-1, where there are labels, and its agreement with the
        student, in percent. Where the teacher has answered for two images that are mixed, all is the mean over both by
        their weights: of kd the divergence from the mean of its softmaxes, but for a constant."""
        assert batch.teacher_records is not None
        if batch.mixed is not None and batch.partner_records is not None:
            own, other = (self(logits, each, epoch) for each in batch.unmixed())
            return {name: torch.lerp(other[name], own[name], batch.mixed.weights) for name in own}
        config, kd = self.config, self.config.kd
        records = torch.stack([batch.teacher_records[:, column] for column in self.columns[epoch]], dim=1)
        ours, teacher, predictions = compared_logits(
            self.codecs[epoch],
            records,
            kd,
            logits,
            weights=self.weights,
            combine=config.teacher.combine,
            scale=self.scales[epoch] if self.scales else 1.0,
        )
        values = losses.distillation(
            logits, teacher, batch.labels, kd, config.label_smoothing, batch.mixed, ours, config.label_loss
        )
        if batch.labelled:
            values["teacher_top1"] = batch.top1(predictions)
        else:
            del values["ce"]
        values["agreement"] = 100.0 * (predictions == logits.argmax(dim=1))
        return values

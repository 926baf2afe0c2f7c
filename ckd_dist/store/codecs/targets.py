"""What a student's logits are compared with: the teacher's logits out of the records of a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ckd_dist.core.errors import require
from ckd_dist.nn import losses
from ckd_dist.nn.options import KDConfig
from ckd_dist.store.codecs import CODECS
from ckd_dist.store.codecs.base import Codec
from ckd_dist.store.codecs.sparse import SparseCodec


def require_supported(codec: Codec, kd: KDConfig, combine: str | None) -> None:
    """Raise `UserError` when the loss cannot be computed from records of `codec`, with the codecs that have it; see
    `Codec.unsupported`."""
    reason = codec.unsupported(kd, combine)
    others = [kind.suited_to(codec.num_classes, kd.temperature) for kind in CODECS.values() if kind.name != codec.name]
    able = [other.name for other in others if other.unsupported(kd, combine) is None]
    instead = f"; a store of codec {' or '.join(able)} can serve it" if able else ""
    require(reason is None, f"teacher.store: its codec is {codec.name}: {reason}{instead}")


def teacher_logits(
    codecs: Sequence[Codec],
    records: torch.Tensor,
    kd: KDConfig,
    student: torch.Tensor | None = None,
    *,
    weights: list[float] | None = None,
    combine: str = "logits",
    scale: float = 1.0,
) -> torch.Tensor:
    """The teacher's logits for `losses.distillation` with the same `kd`: records uint8 [n, checkpoints, bytes], each
    by its own of the `codecs` -> float32 [n, classes]. Checkpoints are averaged as `losses.ensemble_logits`
    does it, by `weights` and `combine`, and multiplied by `scale` (which logits that are standardised do not feel).
    What a sparse codec does not know is filled in from `student`, logits [n, classes], or evenly."""
    members = list(zip(codecs, records.unbind(dim=1), strict=True))
    standardized = kd.loss == "standardized"
    if standardized and len(members) == 1:
        # The softmax of (z - mean) / std at T is that of z at T * std; a shift changes nothing.
        ((codec, member),) = members
        std = codec.std(member)[:, None] + losses.STANDARDIZE_EPS
        shape = None if student is None else losses.standardize(student) * std
        return codec.decode(member, kd.temperature * std, shape) / std
    if scale != 1.0 and not standardized:
        # The softmax of scale * z at T is that of z at T / scale.
        colder = replace(kd, temperature=kd.temperature / scale)
        shape = None if student is None else student / scale
        return scale * teacher_logits(codecs, records, colder, shape, weights=weights, combine=combine)
    logits = [codec.decode(member, kd.temperature, student) for codec, member in members]
    if len(logits) == 1:
        return logits[0]
    average = losses.ensemble_logits(logits, weights, combine, kd.temperature)
    return losses.standardize(average) if standardized else average


def compared_logits(
    codecs: Sequence[Codec],
    records: torch.Tensor,
    kd: KDConfig,
    student: torch.Tensor,
    *,
    weights: list[float] | None = None,
    combine: str = "logits",
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(student, teacher, top1): the logits that `losses.distillation` compares, of all classes, see `teacher_logits`,
    and the class that is the most probable to the teacher or the ensemble, int64 [n].

    For one checkpoint of a sparse codec and a loss that looks at no label (kd, soft_target), logits of the classes kept
    and of the rest as one: the same loss, gradient included, but for a constant of soft_target, and no target of all
    classes.
    """

    def teacher(filled_from: torch.Tensor | None = None) -> torch.Tensor:
        return teacher_logits(codecs, records, kd, filled_from, weights=weights, combine=combine, scale=scale)

    codec = codecs[0]
    if not isinstance(codec, SparseCodec):
        logits = teacher()
        return student, logits, logits.argmax(dim=1)
    if records.shape[1] > 1:  # the top-1 class is the teacher's own: of logits that nothing of the student's is in
        return student, teacher(student.detach()), teacher().argmax(dim=1)
    (record,) = records.unbind(dim=1)
    if kd.loss in ("kd", "soft_target"):
        if scale == 1.0:
            return *codec.grouped(record, kd.temperature, student), codec.top1(record)
        ours, theirs = codec.grouped(record, kd.temperature / scale, student / scale)  # as `teacher_logits` does
        return scale * ours, scale * theirs, codec.top1(record)
    return student, teacher(student.detach()), codec.top1(record)

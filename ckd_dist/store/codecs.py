"""What a store keeps of a teacher's logits, and what the losses get back: codecs as functions of tensors.

A record is a fixed number of bytes an image, view and checkpoint. Shards are .npy arrays of the type that
`Codec.array` names, so numpy opens them without this package.

    dense     2 * classes bytes   all logits: float16, or bfloat16 as the uint16 that hold its bits
    topk      4 * k + 12 bytes    the k largest logits and the statistics of all of them
    sampled   4 * k bytes         k classes drawn from the teacher's softmax: an unbiased sparse target
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from ckd_dist.core.errors import require
from ckd_dist.core.files import parse_json
from ckd_dist.nn import losses
from ckd_dist.nn.options import KDConfig
from ckd_dist.store.options import CodecConfig

# Logits of a class that a sparse target leaves out are T times this: no probability, and no infinity in a loss.
_LOG_NOTHING = -1e4

_STRICT = {"extra": "forbid"}


@dataclass(frozen=True)
class Dense:
    """All logits. Serves every loss."""

    __pydantic_config__ = _STRICT
    name: ClassVar[str] = "dense"
    num_classes: int
    dtype: Literal["float16", "bfloat16"] = "float16"

    def array(self, count: int) -> tuple[np.dtype, tuple[int, ...]]:
        """(type, shape) of a shard of `count` records; numpy has no bfloat16: its bits stand in uint16."""
        return np.dtype("<f2" if self.dtype == "float16" else "<u2"), (count, self.num_classes)

    def encode(self, logits: torch.Tensor, labels: Any = None, draws: Any = None) -> torch.Tensor:
        """Logits float32 [n, classes] -> records uint8 [n, bytes]; labels and draws do not matter here."""
        return _bytes(logits.to(getattr(torch, self.dtype)))

    def decode(
        self, records: torch.Tensor, temperature: float | torch.Tensor, student: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Records uint8 [n, bytes] -> logits float32 [n, classes], whatever the temperature and the student."""
        return records.contiguous().view(getattr(torch, self.dtype)).float()

    def std(self, records: torch.Tensor) -> torch.Tensor:
        """Standard deviation of the logits over all classes, float32 [n]."""
        return self.decode(records, 1.0).std(dim=1)

    def refusal(self, kd: KDConfig, combine: str | None) -> str | None:
        """Why the loss cannot be served, or None; `combine` says how several checkpoints teach at once, if they do."""
        if combine == "probabilities" and kd.loss in ("mse", "standardized"):
            return f"kd.loss {kd.loss} needs logits, and teacher.combine probabilities gives none"
        return None

    def deviation(self, records: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """How far records are from the logits float32 [n, classes] that they should hold: the largest difference of
        a logit, in standard deviations of that image's logits, [n]."""
        return (self.decode(records, 1.0) - logits).abs().amax(dim=1) / logits.std(dim=1)


@dataclass(frozen=True)
class TopK:
    """The k largest logits, chosen in float32 and kept in float16, the label's always among them; and of all logits the
    log-sum-exp, mean and standard deviation.

    From these the softmax at any temperature T: the logits kept are exact; all others together weigh exp(K(1/T)) each,
    where K(s) = log mean exp(s * logit) over them is the cubic with their mean, their variance and, at s = 1, their
    true weight. So the rest's mass is exact at T = 1 and right to second order at high T; below T = 1, where a cubic
    says little, it is held between bounds, see `_rest_mass`.

    How the teacher shares this mass among the rest is not known, and no answer is taught: it is shared as the student
    itself does. Then the divergence of the losses is, gradient included, that of the k classes and one more that stands
    for the rest, which the teacher's own softmax minimises. (Shared evenly, it would teach that the rest is equal.)
    """

    __pydantic_config__ = _STRICT
    name: ClassVar[str] = "topk"
    num_classes: int
    k: Annotated[int, Field(ge=1, le=65536)]

    def array(self, count: int) -> tuple[np.dtype, tuple[int, ...]]:
        """(type, shape) of a shard of `count` records."""
        statistics = [("log_sum_exp", "<f4"), ("mean", "<f4"), ("std", "<f4")]
        return np.dtype([("classes", "<u2", (self.k,)), ("logits", "<f2", (self.k,)), *statistics]), (count,)

    def encode(self, logits: torch.Tensor, labels: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Logits float32 [n, classes], labels int64 [n] -> records uint8 [n, bytes], largest first; equal logits in the
        order of classes. A label that is not among the k largest takes the last place. Draws do not matter here."""
        classes = logits.argsort(dim=1, descending=True, stable=True)[:, : self.k]
        absent = (classes != labels[:, None]).all(dim=1)
        classes[:, -1] = torch.where(absent, labels, classes[:, -1])
        rounded = logits.half().double()  # statistics of what is kept: their difference is the rest
        statistics = torch.stack([rounded.logsumexp(1), rounded.mean(1), rounded.std(1)], dim=1)
        parts = (classes.to(torch.int16), rounded.gather(1, classes).half(), statistics.float())
        return torch.cat([_bytes(part) for part in parts], dim=1)

    def decode(
        self, records: torch.Tensor, temperature: float | torch.Tensor, student: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Records uint8 [n, bytes] -> float32 [n, classes] whose softmax at `temperature` (a number, or [n, 1]) is the
        teacher's, as far as the record knows it: the rest's mass is spread as `student`, logits [n, classes], spreads
        it, or evenly."""
        classes, kept, *statistics = self._fields(records)
        if self.k == self.num_classes:
            return torch.empty_like(kept).scatter(1, classes, kept)
        s, mass = 1 / temperature, self._rest_mass(temperature, kept, *statistics)
        if student is None:
            rest = (mass - np.log(self.num_classes - self.k)) / s
            return rest.float().repeat(1, self.num_classes).scatter(1, classes, kept)
        shape = (student.detach().double() * s).scatter(1, classes, -torch.inf)
        spread = (shape - shape.logsumexp(1, keepdim=True) + mass) / s
        return spread.float().clamp(min=-1e4).scatter(1, classes, kept)

    def _rest_mass(
        self,
        temperature: float | torch.Tensor,
        kept: torch.Tensor,
        log_sum_exp: torch.Tensor,
        mean: torch.Tensor,
        std: torch.Tensor,
    ) -> torch.Tensor:
        """log of the sum of exp(logit / temperature) over the classes that are not kept, float64 [n, 1]; from a
        record's logits and statistics, see `_fields`.

        With s = 1 / temperature, z the n logits not kept, L the largest that they can be, and the sum S(s) of exp(s z),
        K(s) = log(S(s) / n) is the cubic of the class's docstring, between what is certain:

            s <= 1:  s mean(z) <= K(s) <= s L
            s >= 1:  s K(1) <= K(s) <= K(1) + (s - 1) min(L, log S(1))

        The last line, from the left: the mean of the powers x^s of x = exp(z) is at least the power of their mean
        (Jensen); exp(s z) = exp(z) exp((s - 1) z), where z <= L, and z <= log S(1) since exp(z) is one of the summands
        of S(1).
        """
        count, others = self.num_classes, self.num_classes - self.k
        # Everything from the mean on, whence the moments of the others come without cancellation.
        kept = kept.double() - mean
        first = -kept.sum(1, keepdim=True) / others
        variance = (((count - 1) * std**2 - kept.square().sum(1, keepdim=True)) / others - first**2).clamp(min=0)
        log_sum_exp = log_sum_exp - mean
        rest_share = 1 - (kept - log_sum_exp).exp().sum(1, keepdim=True)
        largest = kept[:, -2:-1]  # no other logit is larger (the last place may be the label's)
        at_one = (log_sum_exp + rest_share.clamp(min=1e-30).log() - np.log(others)).clamp(first, largest)
        s = 1 / temperature
        third = at_one - first - variance / 2
        log_mean_exp = s * (first + s * (variance / 2 + s * third))
        cold = s > 1  # for each image, where the temperature is
        least = s * first + cold * s * (at_one - first)
        steepest = torch.minimum(largest, at_one + np.log(others))
        most = s * largest - cold * (largest - at_one + (s - 1) * (largest - steepest))
        return log_mean_exp.clamp(least, most) + s * mean + np.log(others)

    def grouped(
        self, records: torch.Tensor, temperature: float, student: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(student, teacher): logits at `temperature` of the k classes and of one that stands for the rest, float32
        [n, k + 1], from records uint8 [n, bytes] and the student's logits [n, classes]."""
        classes, kept, *statistics = self._fields(records)
        if self.k == self.num_classes:
            return student.gather(1, classes), kept
        rest = (temperature * self._rest_mass(temperature, kept, *statistics)).float()
        return _Grouped.apply(student, classes, temperature), torch.cat([kept, rest], dim=1)

    def answer(self, records: torch.Tensor) -> torch.Tensor:
        """The class that the teacher gives the most, int64 [n]."""
        return _uint16(records[:, :2])[:, 0]

    def std(self, records: torch.Tensor) -> torch.Tensor:
        """Standard deviation of the logits over all classes, float32 [n]."""
        return self._fields(records)[4][:, 0].float()

    def kept(self, records: torch.Tensor, temperature: float) -> torch.Tensor:
        """Share of the teacher's softmax at `temperature` that the k classes hold, float32 [n]."""
        softmax = (self.decode(records, temperature) / temperature).softmax(dim=1)
        return softmax.gather(1, self._fields(records)[0]).sum(dim=1)

    def refusal(self, kd: KDConfig, combine: str | None) -> str | None:
        """Why the loss cannot be served, or None; `combine` says how several checkpoints teach at once, if they do."""
        if kd.loss in ("mse", "dist"):
            return f"kd.loss {kd.loss} needs the logits of all {self.num_classes} classes, and {self.k} are kept"
        if kd.loss == "standardized" and combine:
            return "kd.loss standardized needs all logits of all checkpoints together, and one at a time is kept"
        return None

    def deviation(self, records: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """How far records are from the logits float32 [n, classes] that they should hold: the largest difference of a
        logit or of the log-sum-exp, in standard deviations of that image's logits, [n]."""
        classes, kept, log_sum_exp, _, _ = self._fields(records)
        differences = [
            kept - logits.gather(1, classes),
            (kept - logits.topk(self.k).values)[:, :-1],
            log_sum_exp - logits.logsumexp(1, keepdim=True),
        ]
        return torch.cat(differences, dim=1).abs().amax(dim=1) / logits.std(dim=1)

    def _fields(self, records: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """classes int64 [n, k], logits float32 [n, k], and the statistics float64 [n, 1] each."""
        classes, kept, statistics = records.split([2 * self.k, 2 * self.k, 12], dim=1)
        numbers = statistics.contiguous().view(torch.float32).double()
        return _uint16(classes), kept.contiguous().view(torch.float16).float(), *numbers.split(1, dim=1)


@dataclass(frozen=True)
class Sampled:
    """k classes drawn from the teacher's softmax at `temperature`, weighted to give that softmax on average.

    The idea is Anshumann et al., "Sparse Logit Sampling" (arXiv 2503.16870), who draw with replacement. Here the draw
    is without: classes more probable than a threshold are kept with their probability, the others are drawn
    systematically and get the threshold as weight, so that k distinct classes sum to 1; of all unbiased choices it has
    the least variance (Fearnhead and Clifford, "On-line inference for hidden Markov models via particle filters",
    2003). With k = classes it is the softmax itself.
    """

    __pydantic_config__ = _STRICT
    name: ClassVar[str] = "sampled"
    num_classes: int
    k: Annotated[int, Field(ge=1, le=65536)]
    temperature: Annotated[float, Field(gt=0)] = 1.0

    def array(self, count: int) -> tuple[np.dtype, tuple[int, ...]]:
        """(type, shape) of a shard of `count` records."""
        return np.dtype([("classes", "<u2", (self.k,)), ("weights", "<f2", (self.k,))]), (count,)

    def encode(self, logits: torch.Tensor, labels: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Logits float32 [n, classes] and one uniform draw each, float64 [n] in [0, 1) -> records uint8 [n, bytes];
        labels do not matter here."""
        k = self.k
        p, order = (logits.double() / self.temperature).softmax(dim=1).sort(dim=1, descending=True, stable=True)
        # With the first j kept, the k - j others would share what is left of the mass: rest[j] / (k - j) each.
        rest = p.flip(1).cumsum(1).flip(1)[:, :k]
        share = rest / torch.arange(k, 0, -1, dtype=p.dtype, device=p.device)
        below = p[:, :k] < share
        kept = torch.where(below.any(1), below.int().argmax(1), k)[:, None]
        threshold = share.gather(1, kept.clamp(max=k - 1))
        is_kept = torch.arange(self.num_classes, device=p.device) < kept
        chance = torch.where(is_kept, 1.0, (p / threshold.clamp(min=1e-300)).clamp(max=1.0))
        steps = torch.cat([draws[:, None], draws[:, None] + chance.cumsum(1)], dim=1).floor()
        chosen = steps.diff(dim=1).sort(dim=1, descending=True, stable=True).indices[:, :k]
        weights = torch.where(is_kept, p, threshold).gather(1, chosen)
        return torch.cat([_bytes(order.gather(1, chosen).to(torch.int16)), _bytes(weights.half())], dim=1)

    def decode(
        self, records: torch.Tensor, temperature: float | torch.Tensor, student: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Records uint8 [n, bytes] -> float32 [n, classes] whose softmax at `temperature` is the sparse target. It must
        be the temperature that the classes were drawn at, see `refusal`; the student does not matter."""
        classes, weights = self._fields(records)
        nothing = torch.full((len(records), self.num_classes), _LOG_NOTHING, device=records.device)
        return temperature * nothing.scatter(1, classes, weights.log().clamp(min=_LOG_NOTHING))

    def grouped(
        self, records: torch.Tensor, temperature: float, student: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(student, teacher): logits at `temperature` of the k classes and of one that stands for the rest, which the
        target leaves out, float32 [n, k + 1]; from records uint8 [n, bytes] and the student's logits [n, classes]."""
        classes, weights = self._fields(records)
        if self.k == self.num_classes:
            return student.gather(1, classes), temperature * weights.log().clamp(min=_LOG_NOTHING)
        target = torch.cat([weights, torch.zeros_like(weights[:, :1])], dim=1)
        return _Grouped.apply(student, classes, temperature), temperature * target.log().clamp(min=_LOG_NOTHING)

    def answer(self, records: torch.Tensor) -> torch.Tensor:
        """The class that the target gives the most, int64 [n]."""
        classes, weights = self._fields(records)
        return classes.gather(1, weights.argmax(dim=1, keepdim=True))[:, 0]

    def std(self, records: torch.Tensor) -> torch.Tensor:
        """Not known to this codec."""
        raise NotImplementedError

    def refusal(self, kd: KDConfig, combine: str | None) -> str | None:
        """Why the loss cannot be served, or None; `combine` says how several checkpoints teach at once, if they do."""
        if kd.loss not in ("kd", "soft_target"):
            return f"kd.loss {kd.loss} needs logits, and probabilities are kept"
        if kd.temperature != self.temperature:
            return f"kd.temperature is {kd.temperature}, and classes were drawn at {self.temperature}"
        if combine == "logits":
            return (
                "teacher.combine logits needs logits, and probabilities are kept: give --teacher.combine probabilities"
            )
        return None

    def deviation(self, records: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """How far records are from the logits float32 [n, classes] that they should hold: the largest difference of a
        probability, [n]; of classes that were drawn at random, how much they are too probable for that."""
        classes, weights = self._fields(records)
        excess = (logits / self.temperature).softmax(dim=1).gather(1, classes) - weights
        exact = weights > 1.1 * weights.amin(dim=1, keepdim=True)
        return torch.where(exact, excess.abs(), excess.clamp(min=0)).amax(dim=1)

    def _fields(self, records: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """classes int64 [n, k], weights float32 [n, k]."""
        classes, weights = records.split(2 * self.k, dim=1)
        return _uint16(classes), weights.contiguous().view(torch.float16).float()


Codec = Dense | TopK | Sampled


def record_bytes(codec: Codec) -> int:
    """Bytes of a record."""
    dtype, shape = codec.array(1)
    return dtype.itemsize * int(np.prod(shape))


def from_config(config: CodecConfig, num_classes: int) -> Codec:
    """The codec that the options ask for; raises `UserError` where it does not fit the number of classes."""
    if config.codec == "dense":
        return Dense(num_classes, config.dtype or "float16")
    assert config.k is not None
    require(config.k <= num_classes, f"k is {config.k}, the images have {num_classes} classes: give fewer")
    require(num_classes <= 65536, f"codec {config.codec} holds up to 65536 classes, the images have {num_classes}")
    if config.codec == "topk":
        return TopK(num_classes, config.k)
    return Sampled(num_classes, config.k, config.sample_temperature or 1.0)


def to_dict(codec: Codec) -> dict:
    """As it stands in the manifest."""
    return {"name": codec.name, **{key: value for key, value in asdict(codec).items() if key != "num_classes"}}


def from_dict(values: dict, num_classes: int) -> Codec:
    """Inverse of `to_dict`; raises ValueError for what no codec of this version is."""
    kinds: dict[str, type[Codec]] = {"dense": Dense, "topk": TopK, "sampled": Sampled}
    parameters = {key: value for key, value in values.items() if key != "name"}
    if values.get("name") not in kinds:
        raise ValueError(f"codec {values.get('name')}")
    return parse_json(json.dumps({"num_classes": num_classes, **parameters}), kinds[values["name"]])


def require_served(codec: Codec, kd: KDConfig, combine: str | None) -> None:
    """Raise `UserError` when `codec` cannot serve the loss, with the codecs that can."""
    refusal = codec.refusal(kd, combine)
    classes = codec.num_classes
    candidates: list[Codec] = [Dense(classes), TopK(classes, 2), Sampled(classes, 2, kd.temperature)]
    able = [c.name for c in candidates if c.name != codec.name and c.refusal(kd, combine) is None]
    instead = f"; a store of codec {' or '.join(able)} can serve it" if able else ""
    require(refusal is None, f"teacher.store: its codec is {codec.name}: {refusal}{instead}")


def teacher_logits(
    codec: Codec,
    records: torch.Tensor,
    kd: KDConfig,
    student: torch.Tensor | None = None,
    *,
    weights: list[float] | None = None,
    combine: str = "logits",
) -> torch.Tensor:
    """What `losses.distillation` with the same `kd` asks of a teacher: records uint8 [n, members, bytes] -> logits
    float32 [n, classes]. Members are averaged as `losses.ensemble_logits` does it. What a sparse codec leaves open is
    filled in as `student`, logits [n, classes], has it, or evenly."""
    members = [records[:, m] for m in range(records.shape[1])]
    standardized = kd.loss == "standardized"
    if standardized and len(members) == 1:
        # The softmax of (z - mean) / std at T is that of z at T * std; a shift changes nothing.
        std = codec.std(members[0])[:, None] + losses.STANDARDIZE_EPS
        shape = None if student is None else losses.standardize(student) * std
        return codec.decode(members[0], kd.temperature * std, shape) / std
    logits = [codec.decode(member, kd.temperature, student) for member in members]
    if len(logits) == 1:
        return logits[0]
    average = losses.ensemble_logits(logits, weights, combine, kd.temperature)
    return losses.standardize(average) if standardized else average


def compared(
    codec: Codec,
    records: torch.Tensor,
    kd: KDConfig,
    student: torch.Tensor,
    *,
    weights: list[float] | None = None,
    combine: str = "logits",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(student, teacher, answers): the logits that `losses.distillation` compares, of all classes, see
    `teacher_logits`, and the class that the teacher, or the ensemble, gives the most, int64 [n].

    For one checkpoint of a sparse codec and a loss that looks at no label (kd, soft_target), logits of the classes kept
    and of the rest as one: the same loss, gradient included, but for a constant of soft_target, and no target of all
    classes.
    """
    logits = partial(teacher_logits, codec, records, kd, weights=weights, combine=combine)
    if isinstance(codec, Dense):
        teacher = logits()
        return student, teacher, teacher.argmax(dim=1)
    if records.shape[1] > 1:  # asked once more, since the student's filling-in is not the teacher's answer
        return student, logits(student.detach()), logits().argmax(dim=1)
    (record,) = records.unbind(dim=1)
    if kd.loss in ("kd", "soft_target"):
        return *codec.grouped(record, kd.temperature, student), codec.answer(record)
    return student, logits(student.detach()), codec.answer(record)


class _Grouped(torch.autograd.Function):
    """Logits [n, classes] -> [n, k + 1]: of `classes` int64 [n, k], and one with the mass, at `temperature`, of all
    others. The same out of autograd's own operations takes twice as long."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, classes: torch.Tensor, temperature: float) -> torch.Tensor:
        """See the class."""
        others = (logits / temperature).scatter_(1, classes, -torch.inf)
        shares = others.softmax(dim=1)
        ctx.save_for_backward(shares, classes)
        rest = others.amax(dim=1, keepdim=True) - shares.amax(dim=1, keepdim=True).log()  # the log-sum-exp
        return torch.cat([logits.gather(1, classes), temperature * rest], dim=1)

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The rest's gradient is shared as its mass is."""
        shares, classes = ctx.saved_tensors
        kept, rest = gradient[0].split([classes.shape[1], 1], dim=1)
        return (shares * rest).scatter_(1, classes, kept), None, None


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _uint16(records: torch.Tensor) -> torch.Tensor:
    return records.contiguous().view(torch.int16).long() & 0xFFFF

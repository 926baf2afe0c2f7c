"""The codec `topk`: the k largest logits, and statistics of all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ckd_dist.nn.options import KDConfig
from ckd_dist.store.codecs.packing import pack_classes, to_bytes, unpack_classes, unpack_float16
from ckd_dist.store.codecs.sparse import LOG_ZERO, GroupedLogits, SparseCodec, require_classes_fit
from ckd_dist.store.options import CodecConfig


@dataclass(frozen=True)
class TopK(SparseCodec):
    """The k largest logits, chosen in float32 and kept in float16, the label's always among them; and of all logits the
    log-sum-exp, mean and standard deviation.

    From these the softmax at any temperature T: the logits kept are exact; all others together weigh exp(K(1/T)) each,
    where K(s) = log mean exp(s * logit) over them is the cubic with their mean, their variance and, at s = 1, their
    true weight. So the rest's mass is exact at T = 1 and right to second order at high T; below T = 1, where a cubic
    says little, it is held between bounds, see `_rest_mass`.

    How the teacher divides this mass among the rest is not known, so the target divides it as the student does. Then
    the divergence of the losses is, gradient included, that of the k classes and one more that stands for the rest,
    which the teacher's own softmax minimises. (Divided evenly, it would push the student to make the rest equal.)
    """

    name: ClassVar[str] = "topk"

    @classmethod
    def from_options(cls, config: CodecConfig, num_classes: int) -> TopK:
        """See `Codec`; raises `UserError` for more classes kept than there are, and for more than 65536 in all."""
        return cls(num_classes, require_classes_fit(config, num_classes))

    @classmethod
    def suited_to(cls, num_classes: int, temperature: float) -> TopK:
        """See `Codec`; the temperature does not matter."""
        return cls(num_classes, 2)

    def array(self, count: int) -> tuple[np.dtype, tuple[int, ...]]:
        """(type, shape) of a shard of `count` records."""
        statistics = [("log_sum_exp", "<f4"), ("mean", "<f4"), ("std", "<f4")]
        return np.dtype([("classes", "<u2", (self.k,)), ("logits", "<f2", (self.k,)), *statistics]), (count,)

    def encode(self, logits: torch.Tensor, labels: torch.Tensor, draws: torch.Tensor | None = None) -> torch.Tensor:
        """Logits float32 [n, classes], labels int64 [n] -> records uint8 [n, bytes], largest first; equal logits in the
        order of classes. A label that is not among the k largest takes the last place. Draws do not matter."""
        classes = logits.argsort(dim=1, descending=True, stable=True)[:, : self.k]
        absent = (classes != labels[:, None]).all(dim=1)
        classes[:, -1] = torch.where(absent, labels, classes[:, -1])
        rounded = logits.half().double()  # statistics of what is kept: their difference is the rest
        statistics = torch.stack([rounded.logsumexp(1), rounded.mean(1), rounded.std(1)], dim=1)
        kept = rounded.gather(1, classes).half()
        return torch.cat([pack_classes(classes), to_bytes(kept), to_bytes(statistics.float())], dim=1)

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
        return spread.float().clamp(min=LOG_ZERO).scatter(1, classes, kept)

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
        """See `SparseCodec`."""
        classes, kept, *statistics = self._fields(records)
        if self.k == self.num_classes:
            return student.gather(1, classes), kept
        rest = (temperature * self._rest_mass(temperature, kept, *statistics)).float()
        return GroupedLogits.apply(student, classes, temperature), torch.cat([kept, rest], dim=1)

    def top1(self, records: torch.Tensor) -> torch.Tensor:
        """The most probable class, int64 [n]."""
        return unpack_classes(records[:, :2])[:, 0]

    def std(self, records: torch.Tensor) -> torch.Tensor:
        """Standard deviation of the logits over all classes, float32 [n]."""
        return self._fields(records)[4][:, 0].float()

    def kept(self, records: torch.Tensor, temperature: float) -> torch.Tensor:
        """Share of the teacher's softmax at `temperature` that the k classes hold, float32 [n]."""
        softmax = (self.decode(records, temperature) / temperature).softmax(dim=1)
        return softmax.gather(1, self._fields(records)[0]).sum(dim=1)

    def unsupported(self, kd: KDConfig, combine: str | None) -> str | None:
        """See `Codec`: mse and dist take all logits, and so does standardized of an ensemble."""
        if kd.loss in ("mse", "dist"):
            return f"kd.loss {kd.loss} needs the logits of all {self.num_classes} classes, and {self.k} are kept"
        if kd.loss == "standardized" and combine:
            return "kd.loss standardized needs all logits of all checkpoints together, and one at a time is kept"
        return None

    def deviation(self, records: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """See `Codec`: the largest difference of a logit or of the log-sum-exp, in standard deviations of that image's
        logits, [n]."""
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
        return unpack_classes(classes), unpack_float16(kept), *numbers.split(1, dim=1)

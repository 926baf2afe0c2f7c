"""The codec `sampled`: classes drawn at random from the teacher's softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field

from ckd_dist.nn.options import KDConfig
from ckd_dist.store.codecs.packing import pack_classes, to_bytes, unpack_classes, unpack_float16
from ckd_dist.store.codecs.sparse import LOG_ZERO, GroupedLogits, SparseCodec, require_classes_fit
from ckd_dist.store.options import CodecConfig


@dataclass(frozen=True)
class Sampled(SparseCodec):
    """k classes drawn from the teacher's softmax at `temperature`, weighted to give that softmax on average.

    The idea is Anshumann et al., "Sparse Logit Sampling" (arXiv 2503.16870), who draw with replacement. Here the draw
    is without: classes more probable than a threshold are kept with their probability, the others are drawn
    systematically and get the threshold as weight, so that k distinct classes sum to 1; of all unbiased choices it has
    the least variance (Fearnhead and Clifford, "On-line inference for hidden Markov models via particle filters",
    2003). With k = classes it is the softmax itself.
    """

    name: ClassVar[str] = "sampled"
    needs_draws: ClassVar[bool] = True

    temperature: Annotated[float, Field(gt=0)] = 1.0

    @classmethod
    def from_options(cls, config: CodecConfig, num_classes: int) -> Sampled:
        """See `Codec`; raises `UserError` for more classes drawn than there are, and for more than 65536 in all."""
        return cls(num_classes, require_classes_fit(config, num_classes), config.sample_temperature or 1.0)

    @classmethod
    def suited_to(cls, num_classes: int, temperature: float) -> Sampled:
        """See `Codec`."""
        return cls(num_classes, 2, temperature)

    def array(self, count: int) -> tuple[np.dtype, tuple[int, ...]]:
        """(type, shape) of a shard of `count` records."""
        return np.dtype([("classes", "<u2", (self.k,)), ("weights", "<f2", (self.k,))]), (count,)

    def encode(self, logits: torch.Tensor, labels: torch.Tensor, draws: torch.Tensor | None = None) -> torch.Tensor:
        """Logits float32 [n, classes] and one uniform draw each, float64 [n] in [0, 1) -> records uint8 [n, bytes];
        labels do not matter."""
        assert draws is not None
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
        return torch.cat([pack_classes(order.gather(1, chosen)), to_bytes(weights.half())], dim=1)

    def decode(
        self, records: torch.Tensor, temperature: float | torch.Tensor, student: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Records uint8 [n, bytes] -> float32 [n, classes] whose softmax at `temperature` is the sparse target. It must
        be the temperature that the classes were drawn at, see `unsupported`; the student does not matter."""
        classes, weights = self._fields(records)
        nothing = torch.full((len(records), self.num_classes), LOG_ZERO, device=records.device)
        return temperature * nothing.scatter(1, classes, weights.log().clamp(min=LOG_ZERO))

    def grouped(
        self, records: torch.Tensor, temperature: float, student: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SparseCodec`; the target gives the others nothing."""
        classes, weights = self._fields(records)
        if self.k == self.num_classes:
            return student.gather(1, classes), temperature * weights.log().clamp(min=LOG_ZERO)
        target = torch.cat([weights, torch.zeros_like(weights[:, :1])], dim=1)
        return GroupedLogits.apply(student, classes, temperature), temperature * target.log().clamp(min=LOG_ZERO)

    def top1(self, records: torch.Tensor) -> torch.Tensor:
        """The class with the largest weight, int64 [n]."""
        classes, weights = self._fields(records)
        return classes.gather(1, weights.argmax(dim=1, keepdim=True))[:, 0]

    def std(self, records: torch.Tensor) -> torch.Tensor:
        """Raises NotImplementedError: probabilities do not tell it."""
        raise NotImplementedError

    def unsupported(self, kd: KDConfig, combine: str | None) -> str | None:
        """See `Codec`: only kd and soft_target take probabilities, at the temperature that classes were drawn at."""
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
        """See `Codec`: the largest difference of a probability, [n]; of classes drawn at random, how much they are too
        probable for that."""
        classes, weights = self._fields(records)
        excess = (logits / self.temperature).softmax(dim=1).gather(1, classes) - weights
        exact = weights > 1.1 * weights.amin(dim=1, keepdim=True)
        return torch.where(exact, excess.abs(), excess.clamp(min=0)).amax(dim=1)

    def _fields(self, records: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """classes int64 [n, k], weights float32 [n, k]."""
        classes, weights = records.split(2 * self.k, dim=1)
        return unpack_classes(classes), unpack_float16(weights)

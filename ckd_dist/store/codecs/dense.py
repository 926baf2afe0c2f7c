"""The codec `dense`: all logits, in half precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from ckd_dist.store.codecs.full import FullCodec
from ckd_dist.store.codecs.packing import to_bytes
from ckd_dist.store.options import CodecConfig


@dataclass(frozen=True)
class Dense(FullCodec):
    """All logits: for every loss."""

    name: ClassVar[str] = "dense"

    dtype: Literal["float16", "bfloat16"] = "float16"

    @classmethod
    def from_options(cls, config: CodecConfig, num_classes: int) -> Dense:
        """See `Codec`; fits any number of classes."""
        return cls(num_classes, config.dtype or "float16")

    @classmethod
    def suited_to(cls, num_classes: int, temperature: float) -> Dense:
        """See `Codec`; the temperature does not matter."""
        return cls(num_classes)

    def array(self, count: int) -> tuple[np.dtype, tuple[int, ...]]:
        """(type, shape) of a shard of `count` records; numpy has no bfloat16: its bits stand in uint16."""
        return np.dtype("<f2" if self.dtype == "float16" else "<u2"), (count, self.num_classes)

    def encode(
        self, logits: torch.Tensor, labels: torch.Tensor | None = None, draws: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits float32 [n, classes] -> records uint8 [n, bytes]; labels and draws do not matter."""
        return to_bytes(logits.to(getattr(torch, self.dtype)))

    def decode(
        self, records: torch.Tensor, temperature: float | torch.Tensor, student: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Records uint8 [n, bytes] -> logits float32 [n, classes], whatever the temperature and the student."""
        return records.contiguous().view(getattr(torch, self.dtype)).float()

    def deviation(self, records: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """See `Codec`: the largest difference of a logit, in standard deviations of that image's logits, [n]."""
        return (self.decode(records, 1.0) - logits).abs().amax(dim=1) / logits.std(dim=1)

"""What the codecs that give all logits back have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ckd_dist.nn.options import KDConfig
from ckd_dist.store.codecs.base import Codec


@dataclass(frozen=True)
class FullCodec(Codec):
    """A codec whose records give all logits, whatever the temperature."""

    def std(self, records: torch.Tensor) -> torch.Tensor:
        """Standard deviation of the logits over all classes, float32 [n]."""
        return self.decode(records, 1.0).std(dim=1)

    def unsupported(self, kd: KDConfig, combine: str | None) -> str | None:
        """See `Codec`: mse and standardized do not take the mean of probabilities."""
        if combine == "probabilities" and kd.loss in ("mse", "standardized"):
            return f"kd.loss {kd.loss} needs logits, and teacher.combine probabilities gives none"
        return None

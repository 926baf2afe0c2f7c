"""The interface of a codec."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import torch
from typing_extensions import Self

from ckd_dist.nn.options import KDConfig
from ckd_dist.store.options import CodecConfig


@dataclass(frozen=True)
class Codec(ABC):
    """How the logits of an image become a record of a fixed number of bytes, and a target of a loss again."""

    __pydantic_config__ = {"extra": "forbid"}
    name: ClassVar[str]
    """In `--codec` and in a store's manifest."""
    needs_draws: ClassVar[bool] = False
    """Whether `encode` is random, and needs `draws`."""
    is_fitted: ClassVar[bool] = False
    """Whether `encode` and `decode` need a basis that is fitted to a checkpoint, see `transform.Transform.fitted`."""

    num_classes: int

    @classmethod
    @abstractmethod
    def from_options(cls, config: CodecConfig, num_classes: int) -> Self:
        """The codec with the parameters that `config` gives; raises `UserError` where they do not fit `num_classes`."""

    @classmethod
    @abstractmethod
    def suited_to(cls, num_classes: int, temperature: float) -> Self:
        """The smallest codec of this kind that a loss at `temperature` can use, if it can use any of this kind."""

    def to_dict(self) -> dict:
        """Name and parameters, as a store's manifest holds them."""
        return {"name": self.name, **{key: value for key, value in asdict(self).items() if key != "num_classes"}}

    @property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        dtype, shape = self.array(1)
        return dtype.itemsize * int(np.prod(shape))

    @abstractmethod
    def array(self, count: int) -> tuple[np.dtype, tuple[int, ...]]:
        """(type, shape) of the array in a shard of `count` records."""

    @abstractmethod
    def encode(self, logits: torch.Tensor, labels: torch.Tensor, draws: torch.Tensor | None = None) -> torch.Tensor:
        """Logits float32 [n, classes] -> records uint8 [n, bytes]. `labels` are int64 [n]; `draws`, for a codec that
        `needs_draws`, float64 [n], uniform in [0, 1)."""

    @abstractmethod
    def decode(
        self, records: torch.Tensor, temperature: float | torch.Tensor, student: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Records uint8 [n, bytes] -> logits float32 [n, classes] whose softmax at `temperature`, a number or [n, 1],
        is the teacher's, as far as the record tells. What it does not tell may be filled in from `student`, logits
        [n, classes]."""

    @abstractmethod
    def std(self, records: torch.Tensor) -> torch.Tensor:
        """Standard deviation of the teacher's logits over all classes, float32 [n]."""

    @abstractmethod
    def unsupported(self, kd: KDConfig, combine: str | None) -> str | None:
        """Why the loss `kd` cannot be computed from records, or None where it can. `combine` is how the logits of an
        ensemble's checkpoints are averaged, see `losses.ensemble_logits`; None for a single checkpoint."""

    @abstractmethod
    def deviation(self, records: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """How far records uint8 [n, bytes] are from the logits float32 [n, classes] that they should hold, [n]; in a
        unit of the codec's, in which `verify.TOLERANCE` is small."""

"""What the codecs that keep only k of the classes have in common."""

# No `from __future__ import annotations`: pydantic 2.6 would evaluate the text in the module of a subclass.
from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field

from ckd_dist.core.errors import require
from ckd_dist.store.codecs.base import Codec
from ckd_dist.store.options import CodecConfig

LOG_ZERO = -1e4
"""Stands for the logarithm of a probability of 0: its exp is 0, and no loss becomes infinite or nan of it."""


@dataclass(frozen=True)
class SparseCodec(Codec):
    """A codec that keeps k of the classes; the rest is known, at most, by its probability as a whole."""

    k: Annotated[int, Field(ge=1, le=65536)]

    @abstractmethod
    def grouped(
        self, records: torch.Tensor, temperature: float, student: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(student, teacher): logits at `temperature` of the k classes and of one more that stands for all others,
        float32 [n, k + 1], from records uint8 [n, bytes] and the student's logits [n, classes]. Where k is the number
        of classes, there are no others: [n, k]."""

    @abstractmethod
    def top1(self, records: torch.Tensor) -> torch.Tensor:
        """The most probable class, int64 [n]."""


def require_classes_fit(config: CodecConfig, num_classes: int) -> int:
    """The k that the options give; raises `UserError` where it, or a class in 16 bits, does not fit `num_classes`."""
    assert config.k is not None
    require(config.k <= num_classes, f"k is {config.k}, the images have {num_classes} classes: give fewer")
    require(num_classes <= 65536, f"codec {config.codec} holds up to 65536 classes, the images have {num_classes}")
    return config.k


class GroupedLogits(torch.autograd.Function):
    """Logits [n, classes] -> [n, k + 1]: those of `classes` int64 [n, k], and one whose exponential at `temperature` is
    the sum of those of all others. The same out of autograd's own operations takes twice as long."""

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
        """The gradient of the last column goes to the other classes, in proportion to their softmax."""
        shares, classes = ctx.saved_tensors
        kept, rest = gradient[0].split([classes.shape[1], 1], dim=1)
        return (shares * rest).scatter_(1, classes, kept), None, None

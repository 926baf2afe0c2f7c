"""Tensors as the bytes of records, and back."""

from __future__ import annotations

import torch


def to_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor [n, m], uint8 [n, m * itemsize]."""
    return tensor.contiguous().view(torch.uint8)


def pack_classes(classes: torch.Tensor) -> torch.Tensor:
    """Classes int64 [n, k], each below 65536 -> uint16 as bytes, uint8 [n, 2 * k]."""
    return to_bytes(classes.to(torch.int16))


def unpack_classes(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_classes`: uint8 [n, 2 * k] -> int64 [n, k]."""
    return packed.contiguous().view(torch.int16).long() & 0xFFFF


def unpack_float16(packed: torch.Tensor) -> torch.Tensor:
    """Float16 as bytes, uint8 [n, 2 * k] -> float32 [n, k]."""
    return packed.contiguous().view(torch.float16).float()

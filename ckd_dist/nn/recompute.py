"""Activation checkpointing: a model's blocks keep their input and compute the rest again on the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ckd_dist.core.errors import require


def recompute_blocks(model: nn.Module, name: str) -> None:
    """Have the blocks of a model recompute their activations in the backward pass; its weights and their names stay.

    After Chen et al., "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174). Gradients and the statistics
    of batch norm are those without it. Raises `UserError` where the model `name` has no blocks.
    """
    blocks = list(_blocks(model))
    require(bool(blocks), f"recompute: {name} is not made of blocks, modules in an nn.Sequential: leave it out")
    for block in blocks:
        block.forward = partial(_forward, block, block.forward)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Modules with parts of their own that stand in a sequence or a list, the outermost ones."""
    in_a_row = type(module) in (nn.Sequential, nn.ModuleList)
    for child in module.children():
        is_row = type(child) in (nn.Sequential, nn.ModuleList)
        if in_a_row and not is_row and len(list(child.parameters(recurse=True))) > 1 and any(child.children()):
            yield child
        else:
            yield from _blocks(child)


def _forward(block: nn.Module, forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), _statistics_stay(block)

    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts, **options)


@contextmanager
def _statistics_stay(block: nn.Module) -> Iterator[None]:
    """Batch norm does not count a batch that it sees again: it counts it in copies."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    kept = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update({name: each if each is None else each.clone() for name, each in norm._buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)

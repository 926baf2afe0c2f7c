"""Forward passes: what a model's output holds, models that are not trained, and the precision that they run in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def logits_of(output: Any) -> torch.Tensor:
    """The logits in what a model gives: the tensor itself, `.logits`, `["logits"]`, or the first of a tuple. Raises
    `TypeError` where there are none."""
    found = output
    if not isinstance(output, torch.Tensor):
        found = getattr(output, "logits", None)
        if found is None and isinstance(output, Mapping):
            found = output.get("logits")
        elif found is None and isinstance(output, (tuple, list)) and output:
            found = output[0]
    if not isinstance(found, torch.Tensor):
        raise TypeError(f"a {type(output).__name__} without logits")
    return found


def auxiliary_logits(output: Any) -> list[torch.Tensor]:
    """Other logits in what a model gives, those of auxiliary heads: tensors of the logits' shape, and not the same."""
    if isinstance(output, torch.Tensor):
        return []
    logits = logits_of(output)
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else []
    return [each for each in values if _is_like(each, logits) and each is not logits]


def _is_like(value: Any, logits: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == logits.shape


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Autocast to `amp`, the option --amp: bfloat16, float16 or off."""
    return torch.autocast(device.type, getattr(torch, amp, None), enabled=amp != "off")


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on the device in channels_last order, ready for inference."""
    return model.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)


@torch.inference_mode()
def forward_logits(model: nn.Module, images: torch.Tensor, amp: str) -> torch.Tensor:
    """Logits of a model in eval mode, float32 [n, classes], without gradients."""
    with autocast(images.device, amp):
        return logits_of(model(images)).float()


@torch.inference_mode()
def forward_features(model: nn.Module, layer: str, images: torch.Tensor, amp: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(output of the module `layer` in the type of `amp`, logits in float32) of a model in eval mode."""
    found: list[torch.Tensor] = []
    hook = model.get_submodule(layer).register_forward_hook(lambda module, inputs, output: found.append(output))
    try:
        logits = forward_logits(model, images, amp)
    finally:
        hook.remove()
    return found[0], logits

"""Forward passes of models that are not trained, and the precision that they run in."""

from __future__ import annotations

import torch
from torch import nn


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
        return model(images).float()


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

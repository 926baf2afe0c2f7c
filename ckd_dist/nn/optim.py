"""Optimisers, parameter groups, the moving average of weights, and schedules as pure functions of time."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from ckd_dist.core.errors import require
from ckd_dist.nn.models import timm
from ckd_dist.nn.options import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, AdamW or LAMB over `parameter_groups`; fused where the device has it. A group's rate
    is its `lr_scale`, where it has one, times the schedule's.

    Raises `UserError` for `layer_decay` of a model whose layers are not known.
    """
    groups = layer_groups(model, config) if config.layer_decay is not None else parameter_groups(model, config)
    if config.name == "lamb":
        return timm("timm.optim", "optim.name").Lamb(groups, lr=config.lr)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, fused=True)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=True)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """One group with weight decay and, unless `decay_norm_and_bias`, one without it: parameters of fewer than two
    dimensions, that is biases and the scales and shifts of normalisation."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.decay_norm_and_bias:
        return [{"params": parameters, "weight_decay": config.weight_decay}]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def layer_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """The same for each layer of a timm model, with its share of the learning rate as `lr_scale`: 1 for the last one,
    and for each before it `layer_decay` times as much."""
    require(
        hasattr(model, "group_matcher"),
        "optim.layer_decay: the layers of this model are not known: take one of timm's, --model.name timm/NAME",
    )
    return timm("timm.optim", "optim.layer_decay").param_groups_layer_decay(
        model,
        config.weight_decay,
        weight_decay_exclude_1d=not config.decay_norm_and_bias,
        layer_decay=config.layer_decay,
    )


def image_size(epoch: int, *, start: int | None, final: int, epochs: int) -> int:
    """Side of the training images in an epoch, in pixels: `final`, or, given `start`, that until 73 % of the epochs are
    over, then linearly more up to `final` from 85 % on, in multiples of 32 (of 4, up to 64).

    The idea is progressive resizing as in FFCV's ImageNet recipes, with their proportions.
    """
    if start is None:
        return final
    progress = min(1.0, max(0.0, (epoch / epochs - 0.73) / 0.12))
    multiple = 32 if final > 64 else 4
    size = round((start + (final - start) * progress) / multiple) * multiple
    return min(max(size, start), final)


def learning_rate(step: int, config: OptimConfig, *, steps_per_epoch: int, epochs: int) -> float:
    """Learning rate of optimiser step `step`, counted from 0 over the whole run.

    Warm-up rises linearly to `config.lr`; cosine and linear then fall to 0 at the last step's end, trapezoid in the
    last fifth of all steps; step and multistep count epochs from the start of the run. Cosine falls so in each of its
    `cycles`, after Huang et al., "Snapshot Ensembles: Train 1, get M for free" (arXiv 1704.00109).
    """
    warmup = config.warmup_epochs * steps_per_epoch
    if step + 1 <= warmup:
        return config.lr * (step + 1) / warmup
    total = epochs * steps_per_epoch
    progress = max(0.0, step - warmup) / max(1, total - warmup)
    epoch = step // steps_per_epoch
    if config.schedule == "cosine":
        if config.cycles > 1:
            cycle = total / config.cycles
            first = max(warmup, cycle * (step // cycle))  # warm-up is a part of the first one
            progress = (step - first) / (cycle * (step // cycle + 1) - first)
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "linear":
        return config.lr * (1 - progress)
    if config.schedule == "trapezoid":  # after arXiv 2405.18392, cooldown of a fifth
        return config.lr * min(1.0, 5 * (1 - step / total))
    if config.schedule == "step":
        return config.lr * config.gamma ** (epoch // config.step_epochs)
    if config.schedule == "multistep":
        return config.lr * config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    return config.lr


class MovingAverage:
    """An exponential moving average of a model's weights and statistics: decay * average + (1 - decay) * model.

    The decay rises to `decay` with the number of steps, as 1 - 1 / steps^(2/3): an average over the whole of a
    young training would be little but its initial weights. At 0.9999 it is reached after a million steps. The rise is
    that of timm's `ModelEmaV3` (huggingface/pytorch-image-models, timm/utils/model_ema.py).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.module = copy.deepcopy(model).requires_grad_(False)
        self._decay = decay
        pairs = [*zip(self.module.state_dict().values(), model.state_dict().values(), strict=True)]
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._averages, self._values = [average for average, _ in floats], [value for _, value in floats]
        self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Update with the model after `steps` steps, at least 1; without synchronising with the device."""
        torch._foreach_lerp_(self._averages, self._values, 1 - min(self._decay, 1 - steps ** (-2 / 3)))
        for average, value in self._counters:
            average.copy_(value)

"""Options of the network, its optimiser and the distillation loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ckd_dist.core.errors import require
from ckd_dist.core.options import COUNT, RATE, SHARE, TEMPERATURE, require_ranges


@dataclass(kw_only=True)
class ModelConfig:
    """The network."""

    name: str
    """resnet8/20/32/56/110 (with projection shortcuts), wrn_16_2, wrn_40_1, wrn_40_2, mobilenetv2_075 (for 32x32
    images); a classification model of torchvision, such as resnet50; timm/NAME; hf/FOLDER, an image classifier of
    transformers; FILE.py:NAME or package.module:NAME, a function or class of your own, whose code is run."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the network's function or class: --model.options.NAME VALUE, or all of them as YAML. The number of
    classes is given by itself."""
    weights: str | None = None
    """Initial weights: a checkpoint of this or another program (torch or safetensors), or the name of
    weights that the network's library publishes, DEFAULT for those it recommends."""
    auxiliary_weight: float = 0.0
    """Weight of the loss of auxiliary heads, of networks that have such; 0: they are not trained."""

    def __post_init__(self) -> None:
        require_ranges(self, "model.", auxiliary_weight=(0, 1000))


@dataclass(kw_only=True)
class OptimConfig:
    """Optimiser and learning-rate schedule."""

    name: Literal["sgd", "adamw", "lamb"] = "sgd"
    """sgd is SGD with Nesterov momentum; lamb is timm's."""
    lr: float = 0.1
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum of sgd."""
    weight_decay: float = 5e-4
    """L2 penalty (sgd), decoupled decay (adamw), or a part of the update (lamb)."""
    decay_norm_and_bias: bool = True
    """Apply weight decay to biases and normalisation weights too; ImageNet recipes set false."""
    layer_decay: float | None = None
    """Each layer of a timm model learns at this share of the rate of the one above it, as 0.75: for fine-tuning."""
    schedule: Literal["cosine", "linear", "trapezoid", "step", "multistep", "constant"] = "cosine"
    """Shape of the learning rate after warm-up; trapezoid: constant, and over the last fifth linearly down to 0."""
    cycles: int = 1
    """cosine: times that the rate falls from lr to 0, each in an equal share of the epochs; a teacher keeps a
    checkpoint at the end of each, a snapshot ensemble."""
    warmup_epochs: float = 0.0
    """Linear rise from 0 to lr over so many epochs."""
    step_epochs: int = 60
    """step: multiply by gamma after every so many epochs."""
    milestones: list[int] = field(default_factory=list)
    """multistep: epochs at which the rate is multiplied by gamma."""
    gamma: float = 0.1
    """Factor of step and multistep."""
    clip_grad_norm: float | None = None
    """Largest L2 norm of the whole gradient; default: no clipping."""

    def __post_init__(self) -> None:
        require_ranges(
            self,
            "optim.",
            lr=RATE,
            momentum=(0, 0.9999),
            weight_decay=(0, 10),
            layer_decay=(0.01, 1),
            cycles=COUNT,
            warmup_epochs=(0, COUNT[1]),
            step_epochs=COUNT,
            milestones=COUNT,
            gamma=(0, 10),
            clip_grad_norm=(1e-9, 1_000_000_000),
        )
        require(
            bool(self.milestones) == (self.schedule == "multistep"),
            "optim.milestones goes with --optim.schedule multistep, and multistep needs it",
        )
        require(self.cycles == 1 or self.schedule == "cosine", "optim.cycles goes with --optim.schedule cosine")


LabelLossName = Literal["cross_entropy", "binary_cross_entropy"]
"""Of what a model pays for not saying the label, see `losses.LABEL_LOSSES`."""
LossName = Literal["kd", "soft_target", "mse", "dkd", "dist", "standardized"]
"""Of a distillation loss, see `losses.distillation`."""


@dataclass(kw_only=True)
class KDConfig:
    """The distillation loss: alpha * CE(label) + (1 - alpha) * loss(student, teacher)."""

    loss: LossName = "kd"
    """kd: T^2 * KL(teacher/T || student/T), the paper's; soft_target: the cross entropy of the same; mse: of the
    logits; dkd: decoupled; dist: correlations; standardized: kd of standardised logits."""
    alpha: float = 0.5
    """Weight of the label's cross entropy."""
    temperature: float = 5.0
    """Temperature T of both softmaxes; mse has none."""
    beta: float = 8.0
    """dkd: weight of the classes other than the label's."""
    feature_weight: float = 0.0
    """Weight of ReviewKD's loss of feature maps, added to the two, from one checkpoint of teacher.run to networks
    whose stages end with maps; 0: none. Published with alpha 1: 1 or 8 on ImageNet, 0.6 to 8 on CIFAR-100."""

    def __post_init__(self) -> None:
        require_ranges(self, "kd.", alpha=SHARE, temperature=TEMPERATURE, beta=(0, 1000), feature_weight=(0, 1000))

"""Options of the choice of a teacher's checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

from ckd_dist.core.options import COUNT, RATE, SEED, Amp, Scaling, require_ranges
from ckd_dist.data.options import ViewDataConfig
from ckd_dist.store.options import TrajectoryConfig


@dataclass(kw_only=True)
class SelectDataConfig(ViewDataConfig):
    """Where the images come from and how their views are drawn."""

    val: str
    """Held-out images to score on: a .beton file. Never the test set."""


@dataclass(kw_only=True)
class ProbeConfig:
    """The decoder and the classifier that are trained on each checkpoint's features."""

    steps: int = 300
    """Optimiser steps, on batches of data.batch_size."""
    lr: float = 3e-3
    """Peak learning rate of Adam; it falls to 0 as a cosine."""
    repeats: int = 3
    """Probes of different initial weights for each checkpoint; they give the estimates' deviation."""

    def __post_init__(self) -> None:
        require_ranges(self, "probe.", steps=COUNT, lr=RATE, repeats=(1, 1000))


@dataclass(kw_only=True)
class SelectConfig:
    """Choose the teacher's checkpoint by the mutual information of its features with image and label."""

    data: SelectDataConfig
    teacher: TrajectoryConfig
    run_dir: str
    """Folder of this selection: selection.json and what it took."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    layer: str | None = None
    """Module whose output is F: a map, tokens, or a vector; default: the last map before the pooling, of a transformer
    the tokens of its last block."""
    scaling: Scaling = "raw"
    """How I(X;F), a value a pixel, and I(Y;F), a value an image, are scaled over the checkpoints before they are added.
    raw is the formula as the paper prints it: I(Y;F), which differs more, decides mostly, so that the choice is never
    far from the last checkpoint. minmax and zscore give both the same range or deviation: in the documented study
    they choose an early checkpoint that teaches badly."""
    weight: float = 1.0
    """Weight of I(Y;F)."""
    seed: int = 0
    """Seed of the probes' weights and of the order of the images."""
    amp: Amp = "auto"
    """Precision, as in train_teacher, of the teacher's forward pass."""
    student: str = "resnet18"
    """Model that the cost is compared with: training one such student from each checkpoint, by a short timing."""
    student_epochs: int = 16
    """Its epochs."""

    def __post_init__(self) -> None:
        require_ranges(self, seed=SEED, weight=(0, 1_000_000), student_epochs=COUNT)

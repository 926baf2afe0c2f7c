"""Options of a logit store, and of the teacher's run that fills it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from ckd_dist.core.errors import require
from ckd_dist.core.options import COUNT, SEED, TEMPERATURE, Amp, require_ranges
from ckd_dist.data.options import ViewDataConfig


@dataclass(kw_only=True)
class TrajectoryConfig:
    """The teacher's run."""

    run: str
    """Run folder of train_teacher."""
    checkpoints: list[int] = field(default_factory=list)
    """Epochs of the checkpoints to cache; default: all of the run."""
    model: str | None = None
    """Where its network is code of your own, its name as in model.name: that code is run."""

    def __post_init__(self) -> None:
        require_ranges(self, "teacher.", checkpoints=COUNT)


@dataclass(kw_only=True)
class CachedTrajectoryConfig(TrajectoryConfig):
    """The teacher's run."""

    name: str | None = None
    """Name of this run in a store of several runs: its checkpoints are then NAME/EPOCH to distill."""
    classes: list[int | str] | str | None = None
    """Which of the teacher's classes are kept, in the order of the images' classes: a list of indices or names, or a
    file with one of them in each line; for students of fewer classes than the teacher's. Default: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self.name
        require(
            name is None or bool(re.fullmatch(r"(?!epoch_\d+$)[A-Za-z][\w-]*", name)),
            f"teacher.name is {name}: give letters, digits, - and _, the first a letter",
        )


@dataclass(kw_only=True)
class CodecConfig:
    """What a store keeps of each image's logits."""

    codec: Literal["dense", "transform", "topk", "sampled"] = "dense"
    """dense: all logits, 2 bytes a class, for every loss; transform: all logits in `bytes` bytes by a basis fitted to
    each checkpoint, for every loss; topk: the k largest and statistics of all, 4k + 12 bytes, for
    kd, soft_target, dkd and standardized at every temperature; sampled: k classes drawn from the teacher's softmax, an
    unbiased target, 4k bytes, for kd and soft_target at one temperature."""
    k: int | None = None
    """topk and sampled: classes kept of each image."""
    dtype: Literal["float16", "bfloat16"] | None = None
    """dense: type of the logits; default: float16."""
    bytes: int | None = None
    """transform: bytes of an image's logits; default: 54."""
    sample_temperature: float | None = None
    """sampled: temperature of the softmax that classes are drawn from, and of the loss; default: 1."""

    def __post_init__(self) -> None:
        require_ranges(self, k=(2, COUNT[1]), bytes=(2, 4096), sample_temperature=TEMPERATURE)
        sparse = self.codec in ("topk", "sampled")
        require(sparse == (self.k is not None), "k goes with --codec topk and sampled, which need it")
        require(self.codec == "dense" or self.dtype is None, f"dtype is for --codec dense, not {self.codec}")
        require(self.codec == "transform" or self.bytes is None, f"bytes is for --codec transform, not {self.codec}")
        temperature = self.sample_temperature
        require(temperature is None or self.codec == "sampled", "sample_temperature is for --codec sampled")


@dataclass(kw_only=True)
class CacheConfig(CodecConfig):
    """Compute the logits of a teacher's checkpoints once, for every image and view."""

    data: ViewDataConfig
    teacher: CachedTrajectoryConfig
    store: str
    """Folder of the logit store; given again, caching goes on with the first missing shard."""
    views: int = 1
    """Number of views of every image: as many epochs as a student sees before they repeat."""
    seed: int = 0
    """Seed of the views."""
    amp: Amp = "auto"
    """Precision of the teacher's forward pass, as in train_teacher; auto: the store's, if there is one."""
    shard_size: int = 65536
    """Records (images of one view) in a shard file."""
    teachers_at_once: int | None = None
    """Checkpoints held in memory at a time, each group with a pass over the images of its own; default: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ranges(self, views=COUNT, seed=SEED, shard_size=(1, 1_000_000_000), teachers_at_once=COUNT)


@dataclass(kw_only=True)
class PlanConfig(CacheConfig):
    """Tell what a caching with these options takes."""

    json: bool = False
    """Print JSON."""
    trial_seconds: float = 5.0
    """How long to cache, into a temporary folder, to tell the time, and of more than 32 classes to compute records to
    compare codecs by; 0: tell the size only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ranges(self, trial_seconds=(0, 86_400))

"""Options of trainings and evaluations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ckd_dist.core.errors import require
from ckd_dist.core.options import COUNT, SEED, Amp, require_ranges
from ckd_dist.data.options import EvalDataConfig, TrainDataConfig
from ckd_dist.nn.options import KDConfig, ModelConfig, OptimConfig


@dataclass(kw_only=True)
class TeacherConfig:
    """Where the teacher's logits come from; neither store nor run: the student is trained plainly."""

    store: str | None = None
    """Logit store written by cache_logits."""
    run: str | None = None
    """Run folder of train_teacher: the teacher runs online, at every step."""
    checkpoints: list[int | str] = field(default_factory=list)
    """Epochs of the teacher's checkpoints, NAME/EPOCH for one of a run that was cached by name; default: the last."""
    selection: str | None = None
    """Folder of select_teacher: the checkpoint that it chose is the teacher."""
    combine: Literal["logits", "probabilities", "sequence"] = "logits"
    """How several checkpoints teach: by the mean of their logits, by the mean of their softmaxes at the loss's
    temperature, or one after another, each for its share of the student's epochs."""
    weights: list[float] = field(default_factory=list)
    """Weight of each checkpoint in the mean, or its share of the epochs; default: equal."""

    def __post_init__(self) -> None:
        require_ranges(self, "teacher.", weights=(1e-6, 1_000_000))
        require(
            self.store is None or self.run is None,
            "teacher.store and teacher.run are both given: choose cached logits or the online teacher",
        )
        require(
            not self.checkpoints or bool(self.store or self.run),
            "teacher.checkpoints is given without a teacher: add --teacher.store or --teacher.run",
        )
        require(
            self.selection is None or (bool(self.store or self.run) and not self.checkpoints),
            "teacher.selection goes with teacher.store or teacher.run, and without teacher.checkpoints",
        )
        require(
            len(set(self.checkpoints)) == len(self.checkpoints),
            f"teacher.checkpoints {self.checkpoints} names a checkpoint twice",
        )
        require(
            not self.weights or len(self.weights) == len(self.checkpoints),
            f"teacher.weights has {len(self.weights)} values for {len(self.checkpoints)} teacher.checkpoints",
        )

    @property
    def at_once(self) -> str | None:
        """How several checkpoints teach at once, if they do."""
        return self.combine if len(self.checkpoints) > 1 and self.combine != "sequence" else None


# ------------------------------------------------------------------------------------------- commands


@dataclass(kw_only=True)
class TrainConfig:
    """What every training has in common."""

    data: TrainDataConfig
    model: ModelConfig
    run_dir: str
    """Folder of this run; given again, the run goes on from its last saved step."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    epochs: int = 8
    """Passes over the training images."""
    label_smoothing: float = 0.0
    """Share of the label's probability that is spread over all classes."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and dropout."""
    amp: Amp = "auto"
    """Mixed precision: autocast to this type (float16 with a gradient scaler), or off: float32 throughout. auto:
    bfloat16 where the device has it natively, else float16 on GPUs and off on CPUs; a run goes on as it began."""
    ema_decay: float | None = None
    """Evaluate and keep an exponential moving average of the weights, as 0.9999, instead of the weights; the decay
    rises to this with the number of steps. Figures of the weights themselves stand beside, as raw_top1 and so on."""
    compile: bool = False
    """Compile the model with torch.compile."""
    save_every: int | None = None
    """Epochs between the checkpoints that are kept; default: ten of a teacher's run, a student's last one."""
    save_last_every: int = 1000
    """Steps between the saves that exact resume goes on from (and at every epoch's end)."""
    log_every: int = 50
    """Steps between the lines of metrics.jsonl."""
    tensorboard: bool = False
    """Write TensorBoard event files too (needs the extra `tensorboard`)."""
    log_to: str | None = None
    """A function of yours, module:function, that rank 0 calls with every line of metrics.jsonl, a dict: for Weights &
    Biases, MLflow or Trackio."""

    def __post_init__(self) -> None:
        require_ranges(
            self,
            epochs=COUNT,
            label_smoothing=(0, 0.999),
            seed=SEED,
            ema_decay=(1e-6, 0.9999999),
            save_every=COUNT,
            save_last_every=(1, 1_000_000_000),
            log_every=(1, 1_000_000_000),
        )


@dataclass(kw_only=True)
class TrainTeacherConfig(TrainConfig):
    """Train a teacher and keep its trajectory of checkpoints."""


@dataclass(kw_only=True)
class DistillConfig(TrainConfig):
    """Train a student from a teacher's cached or online logits, or plainly."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    kd: KDConfig = field(default_factory=KDConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.teacher.combine == "logits" or any(len(members) > 1 for members in self._teachers()),
            f"teacher.combine {self.teacher.combine} is for several checkpoints: name them in --teacher.checkpoints, "
            "those of a search in --grid.teachers",
        )

    def _teachers(self) -> list[list[int | str]]:
        return [self.teacher.checkpoints]


@dataclass(kw_only=True)
class EvaluateConfig:
    """Evaluate a checkpoint: each image is counted once, whatever the number of processes."""

    data: EvalDataConfig
    checkpoint: str
    """A file of a run's checkpoints folder."""
    amp: Amp = "auto"
    """Precision, as in train_teacher, of the forward pass."""

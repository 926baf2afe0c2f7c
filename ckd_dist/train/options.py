"""Options of trainings and evaluations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ckd_dist.core.errors import require
from ckd_dist.core.options import COUNT, SEED, SHARE, Amp, require_ranges
from ckd_dist.data.options import EvalDataConfig, TrainDataConfig
from ckd_dist.nn.options import KDConfig, LabelLossName, ModelConfig, OptimConfig


@dataclass(kw_only=True)
class TeacherConfig:
    """Where the teacher's logits come from; neither store nor run: the student is trained plainly."""

    store: str | None = None
    """Logit store written by cache_logits."""
    run: str | None = None
    """Run folder of train_teacher: the teacher runs online, at every step."""
    model: str | None = None
    """Where the network of teacher.run is code of your own, its name as in model.name: that code is run."""
    checkpoints: list[int | str] = field(default_factory=list)
    """Epochs of the teacher's checkpoints, NAME/EPOCH for one of a run that was cached by name; default: the last."""
    selection: str | None = None
    """Folder of select_teacher, or of a race of search: what it chose is the teacher."""
    combine: Literal["logits", "probabilities", "sequence"] = "logits"
    """How several checkpoints teach: by the mean of their logits, by the mean of their softmaxes at the loss's
    temperature, or one after another, each for its share of the student's epochs."""
    weights: list[float] = field(default_factory=list)
    """Weight of each checkpoint in the mean, or its share of the epochs; default: equal."""
    calibration: str | None = None
    """Store of the checkpoints' own answers to images that the teacher was not trained on: cache_logits --data.train
    HELD_OUT --data.augment center_crop. Their logits are multiplied by what makes the labels of these images most
    probable: by 1 / temperature and, where several teach by the mean of their logits, weights."""
    read_ahead: float | None = None
    """GB of memory on each node for the records of the store that an epoch and the next one need, read in large pieces
    before their turn; default: 0, none, where the store fits in half of the memory, else a quarter of the memory."""

    def __post_init__(self) -> None:
        require_ranges(self, "teacher.", weights=(1e-6, 1_000_000), read_ahead=(0, 1_000_000))
        require(
            self.store is None or self.run is None,
            "teacher.store and teacher.run are both given: choose cached logits or the online teacher",
        )
        require(
            not self.checkpoints or bool(self.store or self.run),
            "teacher.checkpoints is given without a teacher: add --teacher.store or --teacher.run",
        )
        require(
            self.calibration is None or bool(self.store or self.run),
            "teacher.calibration is given without a teacher: add --teacher.store or --teacher.run",
        )
        require(
            self.calibration is None or not self.weights,
            "teacher.calibration finds weights, and teacher.weights gives some: leave one of them out",
        )
        require(
            self.calibration is None or self.combine != "probabilities",
            "teacher.calibration is for logits: give --teacher.combine logits or sequence, or leave it out",
        )
        require(
            self.selection is None or (bool(self.store or self.run) and not self.checkpoints),
            "teacher.selection goes with teacher.store or teacher.run, and without teacher.checkpoints",
        )
        require(
            len(set(self.checkpoints)) == len(self.checkpoints),
            f"teacher.checkpoints {self.checkpoints} names a checkpoint twice",
        )
        require(self.model is None or self.run is not None, "teacher.model goes with --teacher.run")
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
    label_loss: LabelLossName = "cross_entropy"
    """What the label asks for: cross_entropy, or binary_cross_entropy, the mean over the classes, as in "ResNet strikes
    back"; it is much smaller, so the learning rate, or alpha, is another."""
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
    accumulate: int = 1
    """Parts that a step's images go through the model in, one after another, for models whose batch does not fit into
    memory: the gradients add up to the same, but batch norm sees each part alone."""
    recompute: bool = False
    """Keep the activations at the edges of the model's blocks only and compute those within again on the way back: for
    memory, at the cost of another forward pass."""
    compile: bool | Literal["reduce-overhead", "max-autotune"] = False
    """Compile the model with torch.compile; reduce-overhead: with CUDA graphs, for small networks; max-autotune: with
    them and the fastest of several kernels, which takes minutes."""
    save_every: int | None = None
    """Epochs between the checkpoints that are kept; default: ten of a teacher's run, or one at the end of each
    of its optim.cycles, and a student's last one."""
    save_last_every: int = 1000
    """Steps between the saves that exact resume goes on from (and at every epoch's end)."""
    val_every: int = 1
    """Epochs between the evaluations on data.val; the last epoch has one in any case."""
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
            accumulate=COUNT,
            label_smoothing=(0, 0.999),
            seed=SEED,
            ema_decay=(1e-6, 0.9999999),
            save_every=COUNT,
            save_last_every=(1, 1_000_000_000),
            val_every=COUNT,
            log_every=(1, 1_000_000_000),
        )
        require(
            self.epochs % self.optim.cycles == 0,
            f"optim.cycles {self.optim.cycles} does not divide the {self.epochs} epochs: choose one that does",
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
        if self.kd.feature_weight:
            require(
                self.teacher.run is not None,
                "kd.feature_weight compares feature maps, which no store holds: give distill --teacher.run, or drop it",
            )
            require(
                len(self.teacher.checkpoints) <= 1,
                "kd.feature_weight compares the feature maps of one checkpoint: name one in --teacher.checkpoints",
            )
            require(not self.compile, "compile is not for kd.feature_weight, which looks into the model: leave one out")

    def _teachers(self) -> list[list[int | str]]:
        return [self.teacher.checkpoints]


@dataclass(kw_only=True)
class EvaluateConfig:
    """Evaluate a checkpoint: each image is counted once, whatever the number of processes."""

    data: EvalDataConfig
    checkpoint: str
    """A file of a run's checkpoints folder."""
    model: str | None = None
    """Where its network is code of your own, its name as in model.name: that code is run."""
    mirror: bool = False
    """Take the mean of the logits of every image and its mirror image, as FFCV's published ImageNet figures do."""
    amp: Amp = "auto"
    """Precision, as in train_teacher, of the forward pass."""


@dataclass(kw_only=True)
class AdoptConfig:
    """Take checkpoints of another program's training as a run."""

    data: EvalDataConfig
    model: ModelConfig
    files: list[str]
    """The checkpoints: files of torch.save or safetensors, or folders of torch.distributed.checkpoint."""
    run_dir: str
    """Folder of the run that is made of them."""
    epochs: list[int] = field(default_factory=list)
    """Epoch of each file, which is its name in the run; default: what the entry `epoch` of each file says."""
    key: str | None = None
    """Where in the files the weights are, as model_ema or state_dict.student; default: the first that fit."""
    classes: str | None = None
    """File with the name of each of the network's classes, a line each, where the images show some of them only; with
    --data.map_classes by_name. Default: the classes of the images."""
    mean: list[float] | None = None
    """Of red, green and blue in [0, 1], that the network's input is normalised by; default: of the images."""
    std: list[float] | None = None
    """Its deviation; default: of the images."""
    min_top1: float | None = None
    """Refuse a checkpoint that is right in less than so many percent of the images."""
    trust: bool = False
    """Read folders of torch.distributed.checkpoint too, whose index is a pickle: it may run what its writer wanted."""
    amp: Amp = "auto"
    """Precision, as in train_teacher, of the forward pass."""

    def __post_init__(self) -> None:
        require_ranges(self, epochs=(0, COUNT[1]), mean=SHARE, std=(1e-6, 1), min_top1=(0, 100))
        require(bool(self.files), "files is empty: name a checkpoint")
        require(self.model.weights is None, "model.weights: the weights are those of --files: leave it out")
        require(
            len(self.epochs) in (0, len(self.files)),
            f"epochs has {len(self.epochs)} values for {len(self.files)} files: give one for each, or none",
        )
        for name in ("mean", "std"):
            value = getattr(self, name)
            require(value is None or len(value) == 3, f"{name} is {value}: give three numbers, of red, green and blue")


@dataclass(kw_only=True)
class ExportConfig:
    """Write the network of a checkpoint in a form that other programs take."""

    checkpoint: str
    """A file of a run's checkpoints folder."""
    format: Literal["state_dict", "safetensors", "onnx", "torchscript", "torch_export"]
    """state_dict, safetensors: the weights by name; onnx, torchscript, torch_export: a program for batches of any
    size."""
    out: str
    """The file to write."""
    model: str | None = None
    """Where its network is code of your own, its name as in model.name: that code is run."""

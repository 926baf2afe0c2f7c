"""The options of every command, and how they are read: defaults < YAML < command line.

Nothing here imports torch, so that ``--help`` and a refused option are answered at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import jsonargparse

T = TypeVar("T")

Amp = Literal["auto", "bfloat16", "float16", "off"]
MapClasses = Literal["by_name", "by_position"]
Scaling = Literal["raw", "minmax", "zscore"]
"""How I(X;F) and I(Y;F) are scaled over the checkpoints before they are added."""


class UserError(ValueError):
    """Bad input: shown to the user as one line that names the option or file and the mend."""


class TrainingError(RuntimeError):
    """Training cannot go on (a loss that is not finite): one line, exit status 1."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


Range = tuple[float, float]
"""The least and the greatest value that an option takes: whatever is beyond is a slip of the hand."""
COUNT: Range = (1, 1_000_000)
SIDE: Range = (8, 8192)
SEED: Range = (0, 2**31 - 1)
RATE: Range = (1e-12, 1000)
TEMPERATURE: Range = (0.001, 1000)
SHARE: Range = (0, 1)


def require_ranges(config: object, section: str = "", /, **ranges: Range) -> None:
    """Raise `UserError` unless these options of a section, numbers or lists of numbers, are in their ranges; None is,
    not-a-number is in none."""
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        for each in value if isinstance(value, list) else [value]:
            require(each is None or low <= each <= high, f"{section}{name} is {each}: give {low:,} to {high:,}")


# ------------------------------------------------------------------------------------------- sections


@dataclass(kw_only=True)
class LoaderConfig:
    """How images are read."""

    batch_size: int = 128
    """Images an optimiser step, over all ranks; for cache_logits and evaluate: images a forward pass."""
    image_size: int | None = None
    """Side of the square image a model sees, in pixels; default: for a teacher the side that it was trained at, in an
    evaluation the one that it was evaluated at, else the stored size of small images, else 224."""
    workers: int | None = None
    """Decoding threads of each rank; default: its share of the cores on a GPU node, 1 on a CPU."""
    os_cache: bool = True
    """Read through the system's page cache; false: each rank reads pages into memory of its own."""
    verify: bool = True
    """Compare a .beton file with its hash when it is first used, which reads all of it once: X.beton.verified beside
    it, or a file in ~/.cache/ckd_dist, remembers its size and time."""
    map_classes: MapClasses | None = None
    """Where classes have other names, or another order, than those of the model, the store or the training images:
    by_name maps labels to the class of the same name, 007 and 7 being the same; by_position takes them as they are,
    since only the names differ. Default: that is refused."""

    def __post_init__(self) -> None:
        require_ranges(self, "data.", batch_size=COUNT, image_size=SIDE, workers=(1, 1024))


@dataclass(kw_only=True)
class ViewDataConfig(LoaderConfig):
    """Where the images come from and how their views are drawn."""

    train: str
    """Training images: a .beton file of data_prep.write_beton."""
    augment: Literal["random_resized_crop", "pad_crop"] | None = None
    """Kind of view; default: the store's, else pad_crop for images of one size up to 64 px, else
    random_resized_crop."""
    crop_scale_min: float | None = None
    """Smallest share of the area that random_resized_crop keeps; default: the store's, else 0.08."""
    flip: bool | None = None
    """Mirror half of the views; default: the store's, else true."""
    color_jitter: float | None = None
    """Change brightness, contrast and saturation, each by up to this share; default: the store's, else 0."""
    erase: float | None = None
    """Probability that a box of a view is erased; default: the store's, else 0."""
    mixup: float | None = None
    """Blend every image with another by a weight from Beta(mixup, mixup); default: the store's, else 0: never."""
    cutmix: float | None = None
    """Show another image in a box of every image, its area from Beta(cutmix, cutmix); with mixup too, either takes half
    of the images. Mixing decodes two images for one; default: the store's, else 0: never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ranges(
            self, "data.", crop_scale_min=(1e-6, 1), color_jitter=(0, 10), erase=SHARE, mixup=(0, 10), cutmix=(0, 10)
        )


@dataclass(kw_only=True)
class TrainDataConfig(ViewDataConfig):
    """Where the images come from and how their views are drawn."""

    val: str | None = None
    """Images to evaluate on after every epoch: a .beton file."""
    views: int | None = None
    """Number of distinct views: epoch e uses view e mod views; default: as many as the store holds, else a
    new view every epoch."""
    view_seed: int | None = None
    """Seed of the views, apart from --seed; default: the store's, else 0."""
    order: Literal["random", "quasi_random"] = "random"
    """random: any image may come at any time. quasi_random, for files larger than memory: the file is read once an
    epoch, its pages (mostly 8 MB) in random order, and images are shuffled within a window of them."""
    window_pages: int = 128
    """quasi_random: pages in a window; twice as many should fit into memory."""
    start_image_size: int | None = None
    """Train on images of this side at first, for speed: from 73 % to 85 % of the epochs it rises to image_size."""
    val_image_size: int | None = None
    """Evaluate on images of this side; default: image_size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ranges(
            self,
            "data.",
            views=COUNT,
            view_seed=SEED,
            window_pages=COUNT,
            start_image_size=SIDE,
            val_image_size=SIDE,
        )


@dataclass(kw_only=True)
class EvalDataConfig(LoaderConfig):
    """Where the images come from."""

    val: str
    """Images to evaluate on: a .beton file of data_prep.write_beton."""


@dataclass(kw_only=True)
class ModelConfig:
    """The network."""

    name: str
    """resnet8/20/32/56/110 (with projection shortcuts), wrn_16_2, wrn_40_1, wrn_40_2, mobilenetv2_075 (for 32x32
    images), or any classification model of torchvision, such as resnet50."""
    weights: str | None = None
    """Initial weights: a file with a state dict, or a checkpoint of this system."""


@dataclass(kw_only=True)
class OptimConfig:
    """Optimiser and learning-rate schedule."""

    name: Literal["sgd", "adamw"] = "sgd"
    """sgd is SGD with Nesterov momentum."""
    lr: float = 0.1
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum of sgd."""
    weight_decay: float = 5e-4
    """L2 penalty (sgd) or decoupled decay (adamw)."""
    decay_norm_and_bias: bool = True
    """Apply weight decay to biases and normalisation weights too; ImageNet recipes set false."""
    schedule: Literal["cosine", "linear", "step", "multistep", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
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


@dataclass(kw_only=True)
class KDConfig:
    """The distillation loss: alpha * CE(label) + (1 - alpha) * loss(student, teacher)."""

    loss: Literal["kd", "soft_target", "mse", "dkd", "dist", "standardized"] = "kd"
    """kd: T^2 * KL(teacher/T || student/T), the paper's; soft_target: the cross entropy of the same; mse: of the
    logits; dkd: decoupled; dist: correlations; standardized: kd of standardised logits."""
    alpha: float = 0.5
    """Weight of the label's cross entropy."""
    temperature: float = 5.0
    """Temperature T of both softmaxes; mse has none."""
    beta: float = 8.0
    """dkd: weight of the classes other than the label's."""

    def __post_init__(self) -> None:
        require_ranges(self, "kd.", alpha=SHARE, temperature=TEMPERATURE, beta=(0, 1000))


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


@dataclass(kw_only=True)
class TrajectoryConfig:
    """The teacher's run."""

    run: str
    """Run folder of train_teacher."""
    checkpoints: list[int] = field(default_factory=list)
    """Epochs of the checkpoints to cache; default: all of the run."""

    def __post_init__(self) -> None:
        require_ranges(self, "teacher.", checkpoints=COUNT)


@dataclass(kw_only=True)
class CachedTrajectoryConfig(TrajectoryConfig):
    """The teacher's run."""

    name: str | None = None
    """Name of this run in a store of several runs: its checkpoints are then NAME/EPOCH to distill."""

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

    codec: Literal["dense", "topk", "sampled"] = "dense"
    """dense: all logits, 2 bytes a class, for every loss; topk: the k largest and statistics of all, 4k + 12 bytes, for
    kd, soft_target, dkd and standardized at every temperature; sampled: k classes drawn from the teacher's softmax, an
    unbiased target, 4k bytes, for kd and soft_target at one temperature."""
    k: int | None = None
    """topk and sampled: classes kept of each image."""
    dtype: Literal["float16", "bfloat16"] | None = None
    """dense: type of the logits; default: float16."""
    sample_temperature: float | None = None
    """sampled: temperature of the softmax that classes are drawn from, and of the loss; default: 1."""

    def __post_init__(self) -> None:
        require_ranges(self, k=(2, COUNT[1]), sample_temperature=TEMPERATURE)
        sparse = self.codec != "dense"
        require(sparse == (self.k is not None), "k goes with --codec topk and sampled, which need it")
        require(not sparse or self.dtype is None, f"dtype is for --codec dense, not {self.codec}")
        temperature = self.sample_temperature
        require(temperature is None or self.codec == "sampled", "sample_temperature is for --codec sampled")


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
class SearchDataConfig(TrainDataConfig):
    """Where the images come from and how their views are drawn."""

    test: str | None = None
    """Images for the final figures: a .beton file, used once, for the chosen students only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.val is not None, "data.val is missing: held-out images to choose on")


@dataclass(kw_only=True)
class GridConfig:
    """What students differ in: every combination of the values listed here. An empty list stands for the one value of
    the option that it is named after."""

    teachers: list[list[int | str]] = field(default_factory=list)
    """For each teacher the checkpoints that teach together, as in teacher.checkpoints: [[20],[40],[20,40]]; [] among
    them is the student without a teacher."""
    models: list[str] = field(default_factory=list)
    """Students, as in model.name."""
    losses: list[Literal["kd", "soft_target", "mse", "dkd", "dist", "standardized"]] = field(default_factory=list)
    """As in kd.loss."""
    alphas: list[float] = field(default_factory=list)
    """As in kd.alpha."""
    temperatures: list[float] = field(default_factory=list)
    """As in kd.temperature."""
    seeds: list[int] = field(default_factory=list)
    """As in seed; a setting is judged by the mean over the seeds."""
    trials: int | None = None
    """Try only so many combinations of loss, alpha and temperature, drawn at random, the same for every teacher;
    default: all."""

    def __post_init__(self) -> None:
        require_ranges(self, "grid.", alphas=SHARE, temperatures=TEMPERATURE, seeds=SEED, trials=COUNT)
        for name in ("teachers", "models", "losses", "alphas", "temperatures", "seeds"):
            values = getattr(self, name)
            repeated = [value for i, value in enumerate(values) if value in values[:i]]
            require(not repeated, f"grid.{name} names {repeated[:1]} twice")


@dataclass(kw_only=True)
class SearchConfig(DistillConfig):
    """Train many students from one logit store, and choose each teacher's best setting on held-out images."""

    data: SearchDataConfig
    grid: GridConfig = field(default_factory=GridConfig)
    students_at_once: int = 8
    """Students of one seed that are trained side by side, on one loader and one read of the store; each holds its
    weights and its optimiser's state in memory."""
    processes: int = 1
    """Processes on this machine that share the students out, each with its part of the cores, or a GPU."""
    part: str | None = None
    """Train only this part of the students, such as 3/16, and choose nothing: for job arrays."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ranges(self, students_at_once=(1, 10_000), processes=(1, 1024))
        require(self.teacher.store is not None, "teacher.store is missing: a search reads cached logits")
        require(self.teacher.selection is None, "teacher.selection is not for a search: name grid.teachers")
        require(not self.teacher.weights, "teacher.weights is not for a search: its ensembles have equal weights")
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", self.part or "1/1")
        require(
            found is not None and 1 <= int(found[1]) <= int(found[2]), f"part is {self.part}: give 1/16 to 16/16, say"
        )

    def _teachers(self) -> list[list[int | str]]:
        return self.grid.teachers or super()._teachers()


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
    """How long to cache, into a temporary folder, to tell the time; 0: tell the size only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ranges(self, trial_seconds=(0, 86_400))


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
    """Module whose output is F; default: the last feature map before pooling."""
    scaling: Scaling = "raw"
    """How I(X;F), a value a pixel, and I(Y;F), a value an image, are scaled over the checkpoints before they are added.
    raw is the formula as the paper prints it: I(Y;F), which differs more, decides mostly, so that the choice is never
    far from the last checkpoint. minmax and zscore give both the same range or deviation: in the study of the README
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


@dataclass(kw_only=True)
class EvaluateConfig:
    """Evaluate a checkpoint: each image is counted once, whatever the number of processes."""

    data: EvalDataConfig
    checkpoint: str
    """A file of a run's checkpoints folder."""
    amp: Amp = "auto"
    """Precision, as in train_teacher, of the forward pass."""


COMMANDS: dict[str, type] = {
    "ckd_dist.train_teacher": TrainTeacherConfig,
    "ckd_dist.cache_logits": CacheConfig,
    "ckd_dist.select_teacher": SelectConfig,
    "ckd_dist.distill": DistillConfig,
    "ckd_dist.search": SearchConfig,
    "ckd_dist.evaluate": EvaluateConfig,
}
"""Module of a command -> its options."""


# ------------------------------------------------------------------------------------------- reading


def load_config(
    cls: type[T], argv: Sequence[str] | None = None, *, prog: str | None = None, description: str | None = None
) -> T:
    """Read a `cls` from its defaults, ``--config X.yaml`` and dotted options, later ones winning.

    Raises `UserError`, one line, for an unknown key (with the nearest known one), a value of the wrong type or
    a contradiction. ``--help`` and ``--print_config`` print and raise `SystemExit(0)`.
    """
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=prog, description=description or cls.__doc__, exit_on_error=False, formatter_class=_HelpFormatter
    )
    parser.add_argument("--config", action=_ConfigFile, help="YAML file with any of the options below.")
    parser.add_class_arguments(cls)
    for action in parser._actions:
        if action.dest in _section_names(parser):  # --optim FILE would be read past all checks
            del parser._option_string_actions[f"--{action.dest}"]
            action.help = argparse.SUPPRESS
    argv = option_words(sys.argv[1:] if argv is None else argv)
    try:
        return cls(**_sections(parser.instantiate(parser.parse_args(argv)), cls))
    except jsonargparse.ArgumentError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        raise UserError(str(cause) if cause else _one_line(str(error), parser)) from None


def option_words(words: Sequence[str]) -> list[str]:
    """A command line in which options have the names of fields: --shard-size is --shard_size."""
    return [re.sub(r"^--[\w.-]+", lambda m: "--" + m[0][2:].replace("-", "_"), word) for word in words]


def flag_words(words: Sequence[str], *flags: str) -> list[str]:
    """A command line in which the options `flags` may stand without a value: --json is --json=true."""
    return [f"{word}=true" if word[:2] == "--" and word[2:] in flags else word for word in words]


def to_dict(config: object) -> dict:
    """The resolved configuration as plain dicts and lists, as written to config.yaml."""
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)
    return dataclasses.asdict(config)


def flatten(values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


class Parser(argparse.ArgumentParser):
    """A command line with words that are no options: errors are `UserError`, the help keeps the module's text."""

    def __init__(self, **options: Any):
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})

    def error(self, message: str) -> NoReturn:
        """Raise `UserError`."""
        raise UserError(f"{message} (see --help)")


class _ConfigFile(jsonargparse.ActionConfigFile):
    """A file of options, read by `read_yaml`; jsonargparse gets its content as JSON."""

    def __call__(self, parser, cfg, values, option_string=None):
        content = read_yaml(values, "config")
        for section in _section_names(parser):
            value = content.get(section, {})
            require(isinstance(value, dict), f"config: {values}: {section} is {value}: give its options by name")
        try:
            super().__call__(parser, cfg, json.dumps(content, ensure_ascii=False), option_string)
        except UnicodeEncodeError as error:
            letter = error.object[error.start]
            raise UserError(f"config: {values}: this locale has no {letter!a}: set LC_ALL=C.UTF-8") from None


def _section_names(parser: jsonargparse.ArgumentParser) -> set[str]:
    words = [option for action in parser._actions for option in action.option_strings]
    return {word[2:].partition(".")[0] for word in words if "." in word}


def read_yaml(path: str | Path, option: str) -> dict[str, Any]:
    """What a YAML file of options says, in plain values; it is UTF-8 in every locale.

    Raises `UserError`, one line, where it is no regular file, which could be without an end, or no mapping, and where
    its aliases refer to themselves or multiply beyond the largest size.
    """
    require(os.path.exists(path), f"{option}: no such file: {path}")
    require(os.path.isfile(path), f"{option}: {path} is not a regular file")
    import yaml

    try:
        with open(path, "rb") as file:
            content = file.read(_LARGEST_FILE + 1).decode()
        values = jsonargparse.get_loader("yaml")(content)
        size = len(content)
        for part in json.JSONEncoder().iterencode(values):
            size += len(part)
            if size > 2 * _LARGEST_FILE:
                raise ValueError("it is too large")
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else re.sub(r"\s+", " ", str(error))
        raise UserError(f"{option}: {path} cannot be read as YAML ({reason})") from None
    require(isinstance(values, dict), f"{option}: {path} holds no options: write them as name: value")
    return values


_LARGEST_FILE = 1 << 20


class _HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with the module's text as it stands, and without the usage block, which lists every option twice."""

    def add_usage(self, usage, actions, groups, prefix=None):
        super().add_usage("%(prog)s [--config X.yaml] [--section.option VALUE ...]", actions, groups, prefix)


def _sections(namespace: jsonargparse.Namespace, cls: type) -> dict:
    return {f.name: getattr(namespace, f.name) for f in dataclasses.fields(cls)}


def _one_line(message: str, parser: jsonargparse.ArgumentParser) -> str:
    """jsonargparse's message on one line, with the nearest known option for an unknown one."""
    message = re.sub(r"\s*\n\s*", " ", message.strip())
    message = re.sub(r"Expected a <class '(\w+)'>", r"expected \1", message)
    message = re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"expected one of \1", message)
    known = [option[2:] for action in parser._actions for option in action.option_strings if option[:2] == "--"]
    unknown = None
    if match := re.search(r"unrecognized arguments: (.*)", message):
        unknown = match[1].split()[0].lstrip("-").split("=")[0]
        message = f"unknown option --{unknown}"
    elif match := re.search(r"Group '([^']*)' does not accept option '([^']*)'", message):
        unknown = f"{match[1]}.{match[2]}"
        message = f"unknown key {unknown} in the configuration file"
    elif match := re.search(r"Option '([^']*)' is not accepted", message):
        unknown = match[1]
        message = f"unknown key {unknown} in the configuration file"
    elif match := re.search(r"required: (.*)", message):
        message = f"missing option: --{match[1].replace(', ', ', --')}"
    elif match := re.search(r'Parser key "([^"]*)": *(.*)', message):
        message = f"option {match[1]}: {match[2]}"
    if unknown and (near := difflib.get_close_matches(unknown, known, n=1)):
        message += f"; did you mean --{near[0]}?"
    return f"{message} (see --help)"

"""Options of a search."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ckd_dist.core.errors import require
from ckd_dist.core.options import COUNT, SEED, SHARE, TEMPERATURE, require_ranges
from ckd_dist.data.options import TrainDataConfig
from ckd_dist.nn.options import LossName
from ckd_dist.train.options import DistillConfig


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
    losses: list[LossName] = field(default_factory=list)
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
    race: bool = False
    """Find the best of all settings of all teachers by a race, which drops those that are behind, instead of training
    all to the end; its seeds are seed, seed + 1, and so on."""
    race_budget: float | None = None
    """What a race may cost, in students of the full length; default: 15 % of three seeds of every setting."""
    race_hours: float | None = None
    """The same in hours of training, those of all processes together."""
    race_prior: str | None = None
    """Store of the teachers' own answers to the images of data.val: cache_logits --data.train VAL --data.augment
    center_crop. The race is then run among those that answer best, as many as the budget has room for at the full
    length."""
    race_error: float = 0.05
    """Probability at most that a race drops the best by its test."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ranges(
            self,
            students_at_once=(1, 10_000),
            processes=(1, 1024),
            race_budget=(0.01, 1_000_000),
            race_hours=(1e-6, 1_000_000),
            race_error=(1e-6, 0.5),
        )
        require(not self.race or not self.grid.seeds, "grid.seeds is not for a race, which takes as many as it needs")
        require(not self.race or len(self.grid.models) <= 1, "grid.models: a race is for one student: run one for each")
        require(
            not self.race or [] not in self.grid.teachers,
            "grid.teachers: [], no teacher, is not for a race: labels teach faster at first, so that short schedules "
            "would say that it is best; train it beside, with distill or search",
        )
        for name in ("race_budget", "race_hours", "race_prior"):
            require(self.race or getattr(self, name) is None, f"{name} goes with --race")
        require(self.race_budget is None or self.race_hours is None, "race_budget and race_hours are both given")
        require(self.teacher.store is not None, "teacher.store is missing: a search reads cached logits")
        require(self.teacher.selection is None, "teacher.selection is not for a search: name grid.teachers")
        require(not self.teacher.weights, "teacher.weights is not for a search: its ensembles have equal weights")
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", self.part or "1/1")
        require(
            found is not None and 1 <= int(found[1]) <= int(found[2]), f"part is {self.part}: give 1/16 to 16/16, say"
        )

    def _teachers(self) -> list[list[int | str]]:
        return self.grid.teachers or super()._teachers()

"""A race among the candidates of a search: its students trained, asked and compared until the rule ends it."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ckd_dist.core import dist
from ckd_dist.core.console import say
from ckd_dist.core.files import lock
from ckd_dist.core.identity import require_same
from ckd_dist.core.run_folder import read_summary
from ckd_dist.nn.options import OptimConfig
from ckd_dist.search import prior, rule
from ckd_dist.search.held_out import read_answers, write_answers
from ckd_dist.search.rule import Outcome, Rung, Scores, Student
from ckd_dist.search.trials import Search, Trial, side_by_side

if TYPE_CHECKING:
    import torch

RUNGS = ((0.1, 0.5), (1.0, 1.0))
"""Share of the epochs, and of the budget that may be spent by the end of that rung."""
FULL_SEEDS = 3
"""Of trying all, against which the budget is told."""
DEFAULT_BUDGET = 0.15
"""Share of trying all."""


@dataclass(frozen=True)
class Race:
    """A race, with what its rule is given."""

    search: Search
    candidates: list[Trial]
    """Each as its student of the full length and the first seed."""
    rungs: list[Rung]
    last: list[int]
    """Candidates of the last checkpoint alone, which the best is compared with."""
    order: list[int] | None
    """The likeliest to teach best first, where that is known."""

    @property
    def first(self) -> list[Student]:
        """Students of the first look."""
        rung = self.rungs[0]
        candidates: Sequence[int] = range(len(self.candidates))
        if self.order:
            rung, candidates = self.rungs[-1], self.order[:2]
        return [Student(k, rung.epochs, seed) for k in candidates for seed in (0, 1)]


def prepare(search: Search) -> Race:
    """The race among the trials of a search, all of one seed; collective."""
    candidates = search.trials
    singles = [each for trial in candidates if len(each := trial.config.teacher.checkpoints) == 1]
    last = max(singles, key=lambda names: _order(names[0]), default=None)
    lasts = [k for k, trial in enumerate(candidates) if trial.config.teacher.checkpoints == last]
    order = None
    if search.config.race_prior is not None:
        order = dist.on_main(lambda: prior.order(search, candidates))
    return Race(search, candidates, rungs_of(search.config.epochs), lasts, order)


def rungs_of(epochs: int) -> list[Rung]:
    """Of students of so many epochs."""
    rungs: list[Rung] = []
    for share, spent in RUNGS:
        length = max(1, round(share * epochs))
        rungs = [*(each for each in rungs if each.epochs < length), Rung(length, spent)]
    return rungs


def everything(candidates: Sequence[Trial]) -> float:
    """What it costs to try all, in students of the full length."""
    return float(FULL_SEEDS * len(candidates))


def _order(name: int | str) -> tuple[bool, int]:
    """Later epochs later, those of named runs before those of the unnamed one."""
    return isinstance(name, int), int(str(name).rpartition("/")[2])


def student_of(race: Race, student: Student) -> Trial:
    """The run of a student: an ordinary one, of a schedule that is shortened as a whole."""
    trial, full = race.candidates[student.candidate], race.search.config.epochs
    config, seed = trial.config, race.search.config.seed + student.seed
    folder = Path(config.run_dir)
    name = folder.name.removesuffix(f"_seed_{config.seed}")
    if student.epochs < full:
        name += f"_epochs_{student.epochs}"
    optim = shortened(config.optim, student.epochs / full)
    run_dir = str(folder.with_name(f"{name}_seed_{seed}"))
    return replace(trial, config=replace(config, epochs=student.epochs, optim=optim, seed=seed, run_dir=run_dir))


def shortened(config: OptimConfig, share: float) -> OptimConfig:
    """A schedule that takes this share of its time."""
    milestones = sorted({max(1, round(share * each)) for each in config.milestones})
    step_epochs = max(1, round(share * config.step_epochs))
    return replace(config, warmup_epochs=share * config.warmup_epochs, step_epochs=step_epochs, milestones=milestones)


def budget(race: Race) -> float:
    """What the race may cost, in students of the full length; where it is given in hours, by what the students of the
    first look took."""
    config = race.search.config
    if config.race_hours is None:
        return config.race_budget or DEFAULT_BUDGET * everything(race.candidates)
    return 3600 * config.race_hours / statistics.mean(seconds(race, student) for student in race.first)


def seconds(race: Race, student: Student) -> float:
    """What one of the full length takes, by a student that was trained."""
    summary = read_summary(Path(student_of(race, student).config.run_dir))
    assert summary is not None
    return summary.train_seconds / summary.side_by_side * race.search.config.epochs / student.epochs


def run(race: Race, device: torch.device, number: int, parts: int) -> Outcome:
    """Run the race to its end, together with other processes that do the same: of `parts` of them, this is `number`.
    Collective."""
    dist.on_main(lambda: require_same(Path(race.search.config.run_dir), race.search.origin))
    looks = itertools.count(1)

    def scores_of(wanted: list[Student]) -> Scores:
        trials = [student_of(race, each) for each in wanted]
        _train(race.search, trials, device, number, parts, next(looks))
        return {student: _score(trial) for student, trial in zip(wanted, trials, strict=True)}

    error, count = race.search.config.race_error, len(race.candidates)
    if race.order:
        return rule.race_in_order(race.order, race.rungs[-1].epochs, scores_of, lambda: budget(race), error)
    return rule.race(count, race.rungs, scores_of, lambda: budget(race), error, race.last)


def _train(search: Search, trials: list[Trial], device: torch.device, number: int, parts: int, look: int) -> None:
    """Train and ask students, side by side, as far as no other process does, and return when all are done. Each process
    begins with another group; one that has nothing left to do takes over those of processes that died."""
    from ckd_dist.train import students

    groups = side_by_side(trials, search.config.students_at_once, parts)
    turns = [*range(number - 1, len(groups)), *range(min(number - 1, len(groups)))]
    said = time.monotonic()
    while left := [turn for turn in turns if _unasked(groups[turn])]:
        worked = False
        for turn in left:
            with _claim(search, look, turn) as mine:
                if mine and _unasked(groups[turn]):
                    worked, names = True, _untrained(search, groups[turn])
                    if names:
                        say(f"look {look}: {', '.join(names)}")
                        configs = [trial.config for trial in groups[turn] if trial.name in names]
                        students.train(configs, search.student_images, device)
                    write_answers(search, groups[turn], device)
        if not worked:
            time.sleep(0.5)
            if time.monotonic() - said > 60:
                said = time.monotonic()
                say(f"waiting for {len(left)} groups of students that other processes train")


def _untrained(search: Search, group: list[Trial]) -> list[str]:
    return dist.on_main(lambda: [trial.name for trial in group if not search.is_complete(trial)])


def _unasked(group: list[Trial]) -> bool:
    return dist.on_main(lambda: any(read_answers(trial) is None for trial in group))


@contextmanager
def _claim(search: Search, look: int, turn: int) -> Iterator[bool]:
    """Whether nobody else trains this group of students, on any node; collective. The claim ends with the process."""
    path = Path(search.config.run_dir) / f".look_{look}_group_{turn}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        mine = dist.on_main(lambda: lock(file))
        yield mine
        if mine and dist.rank() == 0:
            path.unlink(missing_ok=True)


def _score(trial: Trial) -> np.ndarray:
    answers = read_answers(trial)
    assert answers is not None
    return answers.correct.astype(np.float32)

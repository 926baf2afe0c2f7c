"""What the students of ckd_dist.studies.trajectories say: evidence.json for the report and the documentation.

  python -m ckd_dist.studies.evidence RUN_DIR [OUT]

A choice of a teacher is judged by students that it did not look at: of the five seeds of a candidate three are for the
choice and two for the judgement, of the held-out images one half each, in every combination, and the mean is taken. How
far a way to choose is behind is told against trying all with three seeds, which is judged by the same. Writes OUT
(default RUN_DIR/evidence.json); what it holds of other trainings stays, so that a study may grow.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from scipy import stats

from ckd_dist.core.evidence import Case, Evidence, Series, Way, joined, read_errors, read_evidence
from ckd_dist.core.files import write_bytes_atomically
from ckd_dist.core.process import run_process
from ckd_dist.core.results import read_selection
from ckd_dist.search import racing, rule
from ckd_dist.search.rule import Scores, Student
from ckd_dist.studies.trajectories import (
    CANDIDATES,
    EPOCHS,
    HALF,
    KEPT,
    LAST,
    MODELS,
    RUNGS,
    SEEDS,
    SHORT,
    TUNED_ON,
    short,
)

TRIED = 3
"""Seeds of trying all."""
BUDGETS = (5, 10, 15, 20, 30)
"""Of races, in percent of trying all."""


def main() -> None:
    """Read all answers, write the evidence."""
    if len(sys.argv) not in (2, 3) or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if len(sys.argv) == 2 else 2)
    run_dir = Path(sys.argv[1])
    cases = [Students(path.parent, model) for path in sorted(run_dir.glob("*/*/answers.npz")) for model in MODELS]
    errors = next(iter(sorted(run_dir.glob("*/*/errors.json"))), None)
    evidence = Evidence(
        format=1,
        candidates=len(CANDIDATES),
        seeds=TRIED,
        tuned_on=[TUNED_ON],
        ways=ways(cases),
        claims=series(cases, claims),
        predictors=series([case for case in cases if (case.task, case.teacher) == TUNED_ON], predictors),
        losses=series([case for case in cases if case.model == MODELS[0]], losses),
        errors=read_errors(errors, "RUN_DIR") if errors else None,
    )
    out = Path(sys.argv[2]) if len(sys.argv) == 3 else run_dir / "evidence.json"
    if out.exists():
        evidence = joined(read_evidence(out, "OUT"), evidence, "OUT")
    write_bytes_atomically(out, (json.dumps(asdict(evidence), indent=1) + "\n").encode())


# ------------------------------------------------------------------------------------------- students


@dataclass(frozen=True)
class Fold:
    """What a choice may look at: seeds in this order, and this half of the images. What is left judges it."""

    seeds: tuple[int, ...]
    half: int


FOLDS = [
    Fold((*three, *(seed for seed in range(SEEDS) if seed not in three)), half)
    for three in itertools.combinations(range(SEEDS), TRIED)
    for half in (0, 1)
]


@dataclass(frozen=True)
class Students:
    """Students of one kind and one teacher."""

    run: Path
    model: str

    @property
    def task(self) -> str:
        """Its name."""
        return self.run.parent.name

    @property
    def teacher(self) -> int:
        """Seed of its training."""
        return int(self.run.name)

    def case(self, value: float) -> Case:
        """A value, with what it is of."""
        return Case(self.task, self.teacher, short(self.model), float(value))

    @cached_property
    def _file(self) -> dict[str, np.ndarray]:
        with np.load(self.run / "answers.npz", allow_pickle=False) as file:
            return dict(file)

    @cached_property
    def searches(self) -> list[str]:
        """Names of those that there are."""
        return list(dict.fromkeys(key.split("/")[0] for key in self._file if not key.startswith("own/")))

    @cached_property
    def own_top1(self) -> np.ndarray:
        """Of the teachers among the candidates, on each half of the images, float [candidates - 1, 2]."""
        own = np.unpackbits(self._file["own/correct"], axis=1)
        return np.stack([own[:, half::2].mean(axis=1) for half in (0, 1)], axis=1)

    @cached_property
    def correct(self) -> dict[str, np.ndarray]:
        """Search -> bool [candidates, seeds, images]."""
        name = short(self.model)
        return {
            search: np.unpackbits(self._file[f"{search}/{name}/correct"], axis=2).astype(bool)
            for search in self.searches
        }

    def loss(self, search: str) -> np.ndarray:
        """Calibrated, float32 [candidates, seeds]."""
        return self._file[f"{search}/{short(self.model)}/loss"]

    def agreement(self, search: str) -> np.ndarray:
        """With the teacher, float64 [candidates, seeds]."""
        return self._file[f"{search}/{short(self.model)}/agreement"]

    @cached_property
    def top1(self) -> dict[str, np.ndarray]:
        """Search -> percent by candidate, seed and half of the images, float [candidates, seeds, 2]."""
        return {
            name: 100 * np.stack([own[:, :, half::2].mean(axis=2) for half in (0, 1)], axis=2)
            for name, own in self.correct.items()
        }

    @cached_property
    def truth(self) -> np.ndarray:
        """Top-1 of every candidate by all that there is, float [candidates]."""
        return self.top1[FULL].mean(axis=(1, 2))

    @cached_property
    def divergences(self) -> dict[str, np.ndarray]:
        """Of every checkpoint from the one before, and to a student that had no teacher, in nats [checkpoints]."""
        return {"step": self._file["own/step"], "plain": self._file[f"own/{short(self.model)}"]}

    def looked_at(self, fold: Fold, search: str, seeds: int = TRIED) -> np.ndarray:
        """Top-1 by what a choice may look at, float [candidates]."""
        return self.top1[search][:, fold.seeds[:seeds], fold.half].mean(axis=1)

    def judged(self, fold: Fold, search: str) -> np.ndarray:
        """Top-1 by what it may not, float [candidates]."""
        return self.top1[search][:, fold.seeds[TRIED:], 1 - fold.half].mean(axis=1)


FULL = f"whole_{EPOCHS}"


# ------------------------------------------------------------------------------------------- ways to choose


def ways(cases: list[Students]) -> list[Way]:
    """Every way to choose, judged in every case."""
    found: dict[str, Way] = {}
    for case in cases:
        for name, cost, choose in ways_of(case):
            way = found.setdefault(name, Way(name, cost, [], []))
            behind, regret = [], []
            for fold in FOLDS:
                judged, chosen = case.judged(fold, FULL), choose(fold)
                behind.append(judged[case.looked_at(fold, FULL).argmax()] - judged[chosen].mean())
                regret.append(case.truth.max() - case.truth[chosen].mean())
            way.behind.append(case.case(statistics.mean(behind)))
            way.regret.append(case.case(statistics.mean(regret)))
    return list(found.values())


Choice = Callable[[Fold], int | list[int]]
"""Number of the chosen candidate, or several that chance is to choose from."""


def ways_of(case: Students) -> Iterator[tuple[str, float, Choice]]:
    """(Name, cost as a share of trying all, the choice)."""
    for seeds in range(1, TRIED + 1):
        yield f"trying all, {seeds} seed{'s' * (seeds > 1)}", seeds / TRIED, partial(_best_of, case, seeds)
    for percent in BUDGETS:
        budget = percent / 100 * TRIED * len(CANDIDATES)
        yield f"race without a prior, {percent} %", percent / 100, partial(_winner, case, budget)
        yield f"race with a prior, {percent} %", percent / 100, partial(_winner, case, budget, in_order=True)
    singles = [CANDIDATES.index([epoch]) for epoch in KEPT]
    selection = read_selection(case.run / "selection" / "selection.json", "RUN_DIR")
    of = {each.epoch: each for each in selection.checkpoints}
    for name, scores in {
        **{f"Algorithm 1, {scaling}": [of[e].scores[scaling] for e in KEPT] for scaling in selection.choices},
        "teacher's top-1": [of[e].top1 for e in KEPT],
        "least calibrated loss": [-(of[e].calibrated_loss or 0) for e in KEPT],
        "least calibration error": [-of[e].calibration_error for e in KEPT],
        "largest entropy": [of[e].entropy for e in KEPT],
        "largest conditional mutual information": [of[e].conditional_mutual_information for e in KEPT],
        "smallest step from the one before": (-case.divergences["step"]).tolist(),
        "nearest to a student without a teacher": (-case.divergences["plain"]).tolist(),
    }.items():
        yield name, 0.0, partial(_always, singles[int(np.argmax(scores))])
    for name, members in {
        "last checkpoint": [LAST],
        "half-way checkpoint": [HALF],
        "half-way and last together": [HALF, LAST],
        "no teacher": [],
    }.items():
        yield name, 0.0, partial(_always, CANDIDATES.index(members))
    yield "a checkpoint at random", 0.0, partial(_always, singles)


def _always(chosen: int | list[int], _: Fold) -> int | list[int]:
    return chosen


def _best_of(case: Students, seeds: int, fold: Fold) -> int:
    return int(case.looked_at(fold, FULL, seeds).argmax())


def _winner(case: Students, budget: float, fold: Fold, in_order: bool = False) -> int:
    return race(case, fold, budget, in_order).leader + 1


def race(case: Students, fold: Fold, budget: float, in_order: bool) -> rule.Outcome:
    """A race as `search --race` runs it, on the answers of a fold, among all candidates but the first, no teacher."""
    correct = {epochs: case.correct[f"whole_{epochs}"][:, :, fold.half :: 2] for epochs in RUNGS}

    def scores_of(wanted: list[Student]) -> Scores:
        return {s: correct[s.epochs][s.candidate + 1, _seed(fold, s)].astype(np.float32) for s in wanted}

    if in_order:
        order = (-case.own_top1[:, fold.half]).argsort(kind="stable").tolist()
        return rule.race_in_order(order, EPOCHS, scores_of, lambda: budget, 0.05)
    last = [CANDIDATES.index([LAST]) - 1]
    return rule.race(len(CANDIDATES) - 1, racing.rungs_of(EPOCHS), scores_of, lambda: budget, 0.05, last)


def _seed(fold: Fold, student: Student) -> int:
    """The seed of a student; those of the full length are not those that judge. Beyond them they come again."""
    count = TRIED if student.epochs == EPOCHS else SHORT[student.epochs]
    return [seed for seed in fold.seeds if student.epochs == EPOCHS or seed < count][student.seed % count]


# ------------------------------------------------------------------------------------------- the paper's claims


def claims(case: Students) -> Iterator[tuple[str, float]]:
    """(What is compared, the mean difference in points of top-1)."""
    single = {epoch: CANDIDATES.index([epoch]) for epoch in KEPT}
    earlier = [number for epoch, number in single.items() if epoch != LAST]
    pair, controls = CANDIDATES.index([HALF, LAST]), ("smooth", "average", "full")
    by_information = {
        name.partition(", ")[2]: choose(FOLDS[0]) for name, _, choose in ways_of(case) if name.startswith("Algorithm 1")
    }
    loss = _own_losses(case)
    stopped = single[min(loss, key=lambda epoch: loss[epoch])]
    found: dict[str, list[float]] = {}
    for fold in FOLDS:
        judged, seen = case.judged(fold, FULL), case.looked_at(fold, FULL)
        last = judged[single[LAST]]
        of = dict(zip(controls, case.judged(fold, "controls"), strict=True))
        of["sequence"] = case.judged(fold, "sequence")[0]
        heats = [FULL, *(f"last_T_{temperature}" for temperature in (1, 2, 8))]
        place = [single[LAST] if search == FULL else 0 for search in heats]
        hottest = int(np.argmax([case.looked_at(fold, s)[p] for s, p in zip(heats, place, strict=True)]))
        searched = case.judged(fold, heats[hottest])[place[hottest]]
        best = judged[max(earlier, key=lambda number: seen[number])]
        for name, value in {
            "best earlier checkpoint - last": best - last,
            "half-way checkpoint - last": judged[single[HALF]] - last,
            "an earlier checkpoint at random - last": judged[earlier].mean() - last,
            "checkpoint of the least held-out loss - last": judged[stopped] - last,
            "last, the best of four temperatures - last": searched - last,
            "last of a teacher with label smoothing - last": of["smooth"] - last,
            "last moving average of the weights - last": of["average"] - last,
            "half-way, then last - last": of["sequence"] - last,
            "best earlier checkpoint - last, the best of four temperatures": best - searched,
            "snapshot ensemble of two - full ensemble of two": judged[pair] - of["full"],
            "snapshot ensemble of two - last": judged[pair] - last,
            "full ensemble of two - last": of["full"] - last,
            "teacher - none": last - judged[CANDIDATES.index([])],
            **{f"chosen by information, {s} - last": judged[n] - last for s, n in by_information.items()},
            **{
                f"chosen by information, {s} - one at random": judged[n] - judged[[*single.values()]].mean()
                for s, n in by_information.items()
            },
        }.items():
            found.setdefault(name, []).append(float(value))
    for name, values in found.items():
        yield name, statistics.mean(values)


def _own_losses(case: Students) -> dict[int, float]:
    """Checkpoint -> held-out loss of the teacher itself."""
    return {line["epoch"] + 1: line["loss"] for line in _evaluations(case.run / "teacher")}


def _evaluations(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["split"] == "val"]


def losses(case: Students) -> Iterator[tuple[str, float]]:
    """(Checkpoint, held-out loss of the teacher itself)."""
    for epoch, loss in _own_losses(case).items():
        yield str(epoch), loss


# ------------------------------------------------------------------------------------------- what tells beforehand

FIRST = 2
"""Seeds of what is looked at; the others tell what is true."""


def predictors(case: Students) -> Iterator[tuple[str, float]]:
    """(What is looked at, its rank correlation over the teachers with the top-1 of other students in the end), of what
    there is."""
    truth = case.top1[FULL][1:, FIRST:].mean(axis=(1, 2))

    def correlation(values: np.ndarray) -> float:
        return float(stats.spearmanr(values[-len(truth) :], truth).statistic)

    yield "the teacher: top-1, 0 %", correlation(case.own_top1.mean(axis=1))
    kinds = {"whole": "a short whole schedule", "trapezoid": "a constant rate and a decay"}
    for kind, epochs in itertools.product(kinds, SHORT):
        search, what, share = f"{kind}_{epochs}", kinds[kind], f"{100 * epochs // EPOCHS} %"
        if search in case.searches:
            yield f"{what}: top-1, {share}", correlation(case.top1[search][:, :FIRST].mean(axis=(1, 2)))
            yield f"{what}: calibrated loss, {share}", correlation(-case.loss(search)[:, :FIRST].mean(axis=1))
            if kind == "whole":
                yield f"{what}: agreement, {share}", correlation(case.agreement(search)[:, :FIRST].mean(axis=1))
    if "running" in case.searches:
        yield from _of_running(case, correlation)
    yield "other seeds of the whole training: top-1, 100 %", correlation(case.top1[FULL][:, :FIRST].mean(axis=(1, 2)))


def _of_running(case: Students, correlation: Callable[[np.ndarray], float]) -> Iterator[tuple[str, float]]:
    lines = _running(case)
    for key, what in {"raw_": "the running student", "": "its moving average"}.items():
        for figure, sign in {"top1": 1, "loss": -1}.items():
            for epochs in SHORT:
                values = [[sign * own[epochs - 1][key + figure] for own in seeds] for seeds in lines]
                name = "top-1" if figure == "top1" else "loss"
                yield f"{what}: {name}, {100 * epochs // EPOCHS} %", correlation(np.mean(values, axis=1))


def _running(case: Students) -> list[list[list[dict]]]:
    """For each candidate and each of its seeds, what it was after every epoch."""
    folder, found = case.run / "students" / "running" / "students", []
    for members in CANDIDATES:
        name = f"{case.model.replace(':', '.')}_teacher_{'+'.join(map(str, members)) or 'none'}"
        paths = sorted(folder.glob(f"{name}_kd_*_seed_*") if members else folder.glob(f"{name}_seed_*"))
        found.append([_evaluations(path) for path in paths])
    return found


def series(cases: list[Students], figures: Callable[[Students], Iterator[tuple[str, float]]]) -> list[Series]:
    """Figures of all cases, by their names."""
    found: dict[str, Series] = {}
    for case in cases:
        for name, value in figures(case):
            found.setdefault(name, Series(name, [])).cases.append(case.case(value))
    return list(found.values())


if __name__ == "__main__":
    run_process(main)

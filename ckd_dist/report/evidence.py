"""What a study of several teachers found: evidence.json as tables and pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from matplotlib.figure import Figure
from scipy import stats

from ckd_dist.core.evidence import Case, Errors, Evidence, Recipes, Way
from ckd_dist.report.figures import BLUE, GREEN, GREY, ORANGE, plain_axes


@dataclass(frozen=True)
class Summary:
    """Of a quantity over the trainings of teachers, each the mean over its kinds of students."""

    mean: float
    error: float | None
    """Standard error; None of one training."""
    count: int

    @property
    def half(self) -> float:
        """Half of the 95 % interval, by Student's t; infinite for one training."""
        return float(stats.t.ppf(0.975, self.count - 1)) * self.error if self.error is not None else math.inf

    @property
    def detectable(self) -> float:
        """Size of a difference that would have been found in four of five studies like this, two-sided at 5 %."""
        return self.half + float(stats.t.ppf(0.8, self.count - 1)) * self.error if self.error is not None else math.inf

    @property
    def words(self) -> str:
        """Mean and interval."""
        return f"{self.mean:+.2f} ± {self.half:.2f}" if self.error is not None else f"{self.mean:+.2f}"


def summary(cases: Sequence[Case]) -> Summary:
    """Over teachers; raises `ValueError` where there is none."""
    trainings: dict[tuple, list[float]] = {}
    for case in cases:
        trainings.setdefault((case.task, case.teacher), []).append(case.value)
    means = [statistics.mean(values) for values in trainings.values()]
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
    return Summary(statistics.mean(means), error, len(means))


class Table(NamedTuple):
    """With what is to be known of it."""

    title: str
    text: str
    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> list[str]:
        """Its lines, for a README."""
        return [f"| {' | '.join(line)} |" for line in (self.head, ["---"] * len(self.head), *self.rows)]


def tables(found: Evidence) -> dict[str, Table]:
    """All that there are, by short names."""
    made = {"ways": _ways(found), "claims": _claims(found), "predictors": _predictors(found)}
    return made | ({"errors": _errors(found.errors)} if found.errors else {})


def _ways(found: Evidence) -> Table:
    judged = fresh(found)
    rows = []
    for way in judged:
        cells = [way.name, f"{100 * way.cost:.0f}", summary(way.behind).words, summary(way.regret).words]
        rows.append([*cells, *(f"{summary(cases).mean:+.2f}" for cases in _by_task(way.behind).values())])
    text = (
        f"Points of top-1 below the choice of trying all {found.candidates} with {found.seeds} seeds each, by students "
        "and images that neither looked at; regret: below the best mean of all. Mean and 95 % interval over "
        f"{summary(judged[0].behind).count} trainings of teachers"
        f"{', none of which the race was tuned on' if judged is not found.ways else ''}; the last columns are the "
        "first one by tasks."
    )
    head = ["choice by", "cost, %", "behind trying all", "regret", *_by_task(judged[0].behind)]
    return Table("What each way to choose a teacher costs", text, head, rows)


def _claims(found: Evidence) -> Table:
    rows = []
    for claim in found.claims:
        of = summary(claim.cases)
        verdict, seen = "", ""
        if of.error is not None:
            verdict, seen = "differs" if abs(of.mean) > of.half else "within noise", f"{of.detectable:.2f}"
        tasks = [f"{summary(cases).mean:+.2f}" for cases in _by_task(claim.cases).values()]
        rows.append([claim.name, of.words, verdict, *tasks, seen])
    text = (
        "Differences of students' top-1 in points, paired by seeds and images; what had to be chosen was chosen by "
        f"others than those that judge. Mean and 95 % interval over {summary(found.claims[0].cases).count} trainings "
        "of teachers, then by tasks; a difference of the size in the last column would have been found in four of five "
        "such studies."
    )
    head = ["difference", "points", "", *_by_task(found.claims[0].cases), "could be seen"]
    return Table("Which teacher teaches better", text, head, rows)


def _predictors(found: Evidence) -> Table:
    shares = list(dict.fromkeys(series.name.rpartition(", ")[2] for series in found.predictors))
    kinds: dict[str, dict[str, str]] = {}
    for series in found.predictors:
        kind, _, share = series.name.rpartition(", ")
        kinds.setdefault(kind, {})[share] = f"{statistics.mean(case.value for case in series.cases):.2f}"
    text = (
        "Spearman's rank correlation, over the candidates, of two seeds at a share of the epochs with what other seeds "
        f"reach in the end: mean over {len(found.predictors[0].cases)} pairs of teacher and student."
    )
    rows = [[kind, *(of.get(share, "") for share in shares)] for kind, of in kinds.items()]
    return Table("What tells beforehand", text, ["looked at", *shares], rows)


def _errors(found: Errors) -> Table:
    rows = [
        [f"{of.rule}, {100 * of.budget:.0f} %", _share(of.dropped, of.races), _share(of.told_apart, of.races)]
        for of in found.equal
    ]
    good = found.planted
    text = (
        f"Ten equal teachers: students of one checkpoint are dealt out among ten candidates, {found.equal[0].races} "
        "times; the races in which a given one of them was dropped by the test, and in which all but one were. One "
        f"good teacher among nine that were trained for a few epochs, {good.races} races without a prior at "
        f"{100 * good.cost:.1f} % of the cost of trying all: it was chosen in {_share(good.found, good.races)}, and "
        f"all others dropped in {_share(good.alone, good.races)}. In brackets 95 % intervals (Clopper and Pearson)."
    )
    return Table("How often a race errs", text, ["equal teachers", "one dropped", "one alone left"], rows)


def _share(count: int, of: int) -> str:
    """A percentage with its interval."""
    low, high = stats.binomtest(count, of).proportion_ci()
    return f"{100 * count / of:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def recipes(found: Recipes) -> Table:
    """What each part of a recipe is worth."""
    plain = _by_task(found.plain.cases)
    rows = [["plain", "", "", *(f"{summary(cases).mean:.2f}" for cases in plain.values())]]
    for change in found.changes:
        of, by_task = summary(change.cases), _by_task(change.cases)
        verdict = "" if of.error is None else "differs" if abs(of.mean) > of.half else "within noise"
        by = [summary(by_task[task]).words if task in by_task else "" for task in plain]
        rows.append([change.name, of.words, verdict, *by])
    counts = ", ".join(f"{summary(cases).count} of {task}" for task, cases in plain.items())
    text = (
        "Held-out top-1 of the plain recipe's students in percent, and by how many points it differs where one part is "
        "another: paired by training of the teacher and seed, mean and 95 % interval over the trainings of all tasks "
        f"({counts}), then of each; where there is nothing, the recipe was not run."
    )
    return Table("What each part of a recipe is worth", text, ["recipe", "points", "", *plain], rows)


def fresh(found: Evidence) -> list[Way]:
    """Ways judged without the teachers that the race was tuned on, unless there are no others."""
    ways = [
        Way(way.name, way.cost, *(_without(found.tuned_on, cases) for cases in (way.behind, way.regret)))
        for way in found.ways
    ]
    return ways if all(way.behind for way in ways) else found.ways


def _without(trainings: Sequence[tuple[str, int]], cases: Sequence[Case]) -> list[Case]:
    return [case for case in cases if (case.task, case.teacher) not in trainings]


def _by_task(cases: Sequence[Case]) -> dict[str, list[Case]]:
    found: dict[str, list[Case]] = {}
    for case in cases:
        found.setdefault(case.task, []).append(case)
    return found


# ------------------------------------------------------------------------------------------- pictures


def plane(found: Evidence) -> Figure:
    """How far each way to choose is behind trying all, against its cost; beside it those that cost no student."""
    figure, axes = plain_axes(columns=2, width=11.0, height=4.2)
    costly, free = axes[0]
    ways = fresh(found)
    for kind, color in {"race without a prior": ORANGE, "race with a prior": GREEN, "trying all": BLUE}.items():
        own = [way for way in ways if way.name.startswith(f"{kind},")]
        of = [summary(way.behind) for way in own]
        x, y, errors = [100 * way.cost for way in own], [each.mean for each in of], list(map(_bar, of))
        costly.errorbar(x, y, errors, color=color, marker="o", capsize=3, label=kind)
    costly.axhline(0, color="black", linewidth=0.8)
    costly.set_xlabel("students trained, % of trying all")
    costly.set_ylabel("points of top-1 behind trying all")
    costly.legend(frameon=False, fontsize=9)
    known = {way.name: summary(way.behind) for way in ways if way.cost == 0}
    names = sorted(known, key=lambda name: -known[name].mean)
    means, errors = [known[name].mean for name in names], [_bar(known[name]) for name in names]
    free.errorbar(means, range(len(names)), xerr=errors, color=GREY, marker="o", linestyle="", capsize=3)
    free.set_yticks(range(len(names)), names, fontsize=8)
    free.axvline(0, color="black", linewidth=0.8)
    free.set_xlabel("points behind, for no student")
    return figure


def _bar(of: Summary) -> float:
    return of.half if of.error is not None else 0.0


def own_losses(found: Evidence) -> Figure:
    """Held-out loss of the teachers themselves over their training."""
    tasks = list(_by_task(found.losses[0].cases))
    figure, axes = plain_axes(columns=len(tasks), width=3.2 * len(tasks), height=3.0)
    for ax, task in zip(axes[0], tasks, strict=True):
        for teacher in dict.fromkeys(case.teacher for case in found.losses[0].cases if case.task == task):
            curve = [
                (int(series.name), case.value)
                for series in found.losses
                for case in series.cases
                if (case.task, case.teacher) == (task, teacher)
            ]
            ax.plot(*zip(*curve, strict=True), marker=".", color=ORANGE, alpha=0.7)
        ax.set_title(task, fontsize=10)
        ax.set_xlabel("epoch of the teacher")
    axes[0, 0].set_ylabel("held-out loss, nats")
    return figure

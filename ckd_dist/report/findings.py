"""What a study says: differences with their noise, and what each way to choose a teacher costs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from ckd_dist.core import results
from ckd_dist.core.blocks import residuals
from ckd_dist.core.errors import require
from ckd_dist.core.evidence import Evidence, read_evidence
from ckd_dist.core.identity import read_lineage
from ckd_dist.core.options import Scaling
from ckd_dist.core.results import Candidate, Selection
from ckd_dist.selection.mi import SCALINGS, scores

SIGNIFICANT = 0.05
"""A difference whose adjusted p is above is called within the noise."""


@dataclass(frozen=True)
class StudentGroup:
    """Students of one model and one teacher, with the setting that was chosen for it on held-out images."""

    model: str
    teacher: str
    """Checkpoints joined by +, or none."""
    weights_sha256: str | None
    """Of the checkpoints, joined by +; None where there are none, or an older version did not keep it."""
    loss: str | None
    alpha: float | None
    temperature: float | None
    students: tuple[str, ...]
    """Names of the runs, one a seed."""
    seeds: tuple[int, ...]
    val: tuple[float, ...]
    """Top-1 on held-out images, percent, one a seed."""
    test: tuple[float, ...]
    """Top-1 on test images; empty where there were none."""

    @property
    def top1(self) -> tuple[float, ...]:
        """On test images if there were any, else on held-out ones."""
        return self.test or self.val

    @property
    def mean(self) -> float:
        """Of `top1`."""
        return statistics.mean(self.top1)

    @property
    def size(self) -> int:
        """Number of checkpoints in the teacher: more than 1 for an ensemble."""
        return self.teacher.count("+") + 1

    @property
    def epoch(self) -> int | None:
        """Of the checkpoint, if it is a single one of the unnamed run."""
        return int(self.teacher) if self.teacher.isdecimal() else None


def student_groups(rows: Sequence[dict]) -> list[StudentGroup]:
    """The chosen students of results.csv, in its order."""
    found = []
    for (model, teacher), same in results.grouped([row for row in rows if row["chosen"]], "model", "teacher"):
        same = sorted(same, key=lambda row: row["seed"])
        first = same[0]
        found.append(
            StudentGroup(
                model=model,
                teacher=teacher,
                weights_sha256=first["weights_sha256"],
                loss=first["loss"],
                alpha=first["alpha"],
                temperature=first["temperature"],
                students=tuple(row["student"] for row in same),
                seeds=tuple(row["seed"] for row in same),
                val=tuple(row["val_top1"] for row in same),
                test=tuple(row["test_top1"] for row in same if row["test_top1"] is not None),
            )
        )
    return found


@dataclass(frozen=True)
class Selected:
    """What a run of select_teacher left."""

    result: Selection
    cost: results.Cost | None


@dataclass(frozen=True)
class Study:
    """All there is under a folder of runs."""

    search: Path
    """Folder of the search, of all runs where there is none."""
    rows: list[dict]
    """Its results.csv, empty where there is none."""
    selections: list[Selected]
    """Of the checkpoints that students were distilled from, or might have been; that of the last feature map first."""
    bench: results.Bench | None
    races: dict[str, results.Race]
    """By their folders under that of the runs."""
    evidence: Evidence | None
    """Of a study of several teachers."""
    notes: list[str]
    """What is left out, and why."""
    files: list[Path]
    """What was read."""

    def curve(self, student: str) -> list[float]:
        """Top-1 on held-out images after every epoch, empty where its run, the one of results.csv, is not there any
        more."""
        folder = self.search / "students" / student
        path = folder / "metrics.jsonl"
        row = next(row for row in self.rows if row["student"] == student)
        return results.read_curve(path, "RUNS") if path.exists() and _is_of(folder, row) else []


def _is_of(folder: Path, row: dict) -> bool:
    """Whether the run in `folder` is that of a row of results.csv, as far as both tell."""
    lineage = read_lineage(folder, "RUNS")
    return lineage is None or row["identity"] in (None, lineage.identity)


def read_study(runs: Path) -> Study:
    """Read all there is under `runs`; raises `UserError` when there is no search, no race and no evidence, or more
    than one search, or a file is damaged."""
    require(runs.is_dir(), f"RUNS: no such folder: {runs}")
    tables = sorted(runs.rglob("results.csv"))
    found = sorted(runs.rglob("race.json"))
    races = {str(path.parent.relative_to(runs)): results.read_race(path, "RUNS") for path in found}
    studies = sorted(runs.rglob("evidence.json"))[:1]
    evidence = read_evidence(studies[0], "RUNS") if studies else None
    require(bool(tables or races or evidence), f"RUNS: no results.csv under {runs}: let ckd_dist.search finish first")
    if not tables:
        return Study(runs, [], [], None, races, evidence, [], [*found, *studies])
    require(len(tables) == 1, f"RUNS: {', '.join(map(str, tables))}: name a folder with one search")
    rows = results.read_table(tables[0], "RUNS")
    require(any(row["chosen"] for row in rows), f"RUNS: {tables[0]} has no chosen students")
    teacher_weights = {weights for row in rows for weights in (row["weights_sha256"] or "").split("+")}
    is_known = all(row["weights_sha256"] or row["teacher"] == "none" for row in rows)
    selections, taken, notes = [], [], []
    for path in sorted(runs.rglob("selection.json")):
        result, cost = results.read_selection(path, "RUNS"), path.with_name("cost.json")
        if is_known and teacher_weights.isdisjoint(each.weights_sha256 for each in result.checkpoints):
            notes.append(f"{path} is of another teacher: by their weights, none of its checkpoints taught the students")
        else:
            taken.append(path)
            selections.append(Selected(result, results.read_cost(cost, "RUNS") if cost.exists() else None))
    if selections and not is_known:
        notes.append(
            f"{tables[0]} is of an older version and does not tell the weights that taught: whether the selections are "
            "of the same teachers is not known, so they are not held against the students"
        )
    others = [row["student"] for row in rows if not _is_of(tables[0].parent / "students" / row["student"], row)]
    if others:
        notes.append(
            f"learning curves of {len(others)} students, first {others[0]}: these are other runs than those of "
            f"{tables[0]}; the same search again makes it anew"
        )
    # The last feature map is the output of all features together: its name has the fewest parts, and is the last.
    selections.sort(key=lambda selected: selected.result.layer, reverse=True)
    selections.sort(key=lambda selected: selected.result.layer.count("."))
    benches = sorted(runs.rglob("bench.json"))[:1]
    bench = results.read_bench(benches[0], "RUNS") if benches else None
    files = [tables[0], *taken, *benches, *found, *studies]
    return Study(tables[0].parent, rows, selections, bench, races, evidence, notes, files)


# ------------------------------------------------------------------------------------------- differences


@dataclass(frozen=True)
class Difference:
    """Of two teachers' students, paired by seed."""

    mean: float
    deviation: float | None
    p: float | None
    """Of a two-sided test, see `differences`; None where there is but one seed."""
    adjusted_p: float | None
    """By Holm's method, for all the differences that are tested together."""

    @property
    def within_noise(self) -> bool:
        """Whether the difference may well be chance."""
        return self.adjusted_p is None or self.adjusted_p > SIGNIFICANT


def last_checkpoint(each: Sequence[StudentGroup]) -> StudentGroup | None:
    """The students of the last single checkpoint: of the usual teacher, with which others are compared."""
    singles = [one for one in each if one.epoch is not None]
    return max(singles, key=lambda one: one.epoch or 0, default=None)


def differences(each: Sequence[StudentGroup], base: StudentGroup) -> list[Difference | None]:
    """Top-1 of each minus that of `base`, one of them; None for `base` itself, and where they have no seed in common.

    A randomised block design, the seeds being the blocks: teacher and seed add up, and what they leave unexplained is
    the noise, taken to be the same for all teachers. For two teachers this is the paired t-test; with more of them few
    seeds tell more, since all show how large the noise is.
    """
    seeds = sorted(set.intersection(*(set(one.seeds) for one in each)))
    if not seeds:
        return [None] * len(each)
    values = np.array([[one.top1[one.seeds.index(seed)] for seed in seeds] for one in each])
    apart = values - values[list(each).index(base)]
    deviations = apart.std(axis=1, ddof=1) if len(seeds) > 1 else [None] * len(each)
    ps: list[float | None] = [None] * len(each)
    if len(seeds) > 1 and len(each) > 1:
        noise, freedom = residuals(values)
        error = np.sqrt(2 * noise / freedom / len(seeds))
        with np.errstate(divide="ignore", invalid="ignore"):  # no noise at all: 0 for a difference, 1 for none
            ratio = np.nan_to_num(np.abs(apart.mean(1)) / error, nan=0.0, posinf=np.inf)
        ps = (2 * stats.t.sf(ratio, freedom)).tolist()
    others = [number for number, one in enumerate(each) if one != base]
    found: list[Difference | None] = [None] * len(each)
    adjusted: Sequence[float | None] = holm([p for p in (ps[number] for number in others) if p is not None])
    for number, adjusted_p in zip(others, adjusted or [None] * len(others), strict=True):
        found[number] = Difference(float(apart[number].mean()), deviations[number], ps[number], adjusted_p)
    return found


def holm(ps: Sequence[float]) -> list[float]:
    """p values adjusted for their number (Holm, "A simple sequentially rejective multiple test procedure", 1979)."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(np.argsort(ps)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted


# ------------------------------------------------------------------------------------------- ways to choose


@dataclass(frozen=True)
class WayToChoose:
    """What comes of choosing the teacher's checkpoint by a score."""

    name: str
    epoch: int
    """Of the checkpoint with the best score."""
    regret: float
    """Top-1 of the best checkpoint's students minus that of the chosen one's, percent."""
    correlation: float | None
    """Spearman's, of the score and the students' top-1 over the checkpoints; None for a fixed choice."""
    p: float | None
    """Of the correlation: that no order is behind it."""


def in_common(each: Sequence[StudentGroup], selection: Selection) -> list[tuple[Candidate, StudentGroup]]:
    """The checkpoints that a selection and students both know, by their weights, in the order of training."""
    by_weights = {one.weights_sha256: one for one in each}
    candidates = selection.checkpoints
    return [(found, by_weights[found.weights_sha256]) for found in candidates if found.weights_sha256 in by_weights]


def ways_to_choose(pairs: Sequence[tuple[Candidate, StudentGroup]], selection: Selection) -> list[WayToChoose]:
    """All scores of a selection and the fixed choices, judged by the students of each checkpoint: of what they have
    `in_common`, at least one checkpoint."""
    epochs = [found.epoch for found, _ in pairs]
    top1 = np.array([one.mean for _, one in pairs])
    val = np.array([statistics.mean(one.val) for _, one in pairs])

    def column(key: str) -> np.ndarray:
        return np.array([getattr(found, key) for found, _ in pairs], dtype=float)

    image, label = column("image_information"), column("label_information")
    found = [
        _scored(f"I(X;F) + I(Y;F), {s}", epochs, scores(image, label, s, selection.weight), top1) for s in SCALINGS
    ]
    known = all(found.calibrated_loss is not None for found, _ in pairs)
    for name, values in (
        *([("least calibrated loss", -column("calibrated_loss"))] if known else []),
        ("I(X;F)", image),
        ("I(Y;F)", label),
        ("teacher's top-1", column("top1")),
        ("least calibration error", -column("calibration_error")),
        ("largest entropy", column("entropy")),
        ("largest conditional mutual information", column("conditional_mutual_information")),
        ("agreement with the last checkpoint", column("agreement_with_last")),
    ):
        found.append(_scored(name, epochs, values, top1))
    for name, epoch in (("half-way checkpoint", selection.fixed.half), ("last checkpoint", epochs[-1])):
        if epoch in epochs:
            found.append(WayToChoose(name, epoch, float(top1.max() - top1[epochs.index(epoch)]), None, None))
    found.append(_scored("students of all, on held-out images", epochs, val, top1))
    return found


def _scored(name: str, epochs: list[int], values: np.ndarray, top1: np.ndarray) -> WayToChoose:
    best = int(values.argmax())
    correlation = p = None
    if len(epochs) > 2 and np.ptp(values) > 0 and np.ptp(top1) > 0:
        correlation, p = spearman(values, top1)
    return WayToChoose(name, epochs[best], float(top1.max() - top1[best]), correlation, p)


def spearman(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Spearman's rank correlation and its p, two-sided. Below eight pairs p is exact, from all orders that there are:
    the usual approximation is far too small there, 0 for three pairs."""
    correlation, p = map(float, stats.spearmanr(a, b))
    if len(a) < 8:
        # For given ranks, the correlation goes with the sum of their products.
        ranks = stats.rankdata(b) - (len(b) + 1) / 2

        def products(order: np.ndarray, axis: int) -> np.ndarray:
            return (order * ranks).sum(axis)

        p = float(stats.permutation_test((stats.rankdata(a),), products, permutation_type="pairings").pvalue)
    return correlation, p


def chosen_epochs(selection: Selection, scaling: Scaling, weights: Sequence[float]) -> list[int]:
    """The checkpoint that I(X;F) + weight * I(Y;F) chooses, for each weight."""
    rows = selection.checkpoints
    image, label = np.array([[row.image_information, row.label_information] for row in rows]).T
    return [rows[int(scores(image, label, scaling, weight).argmax())].epoch for weight in weights]

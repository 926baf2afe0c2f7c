"""The rule of a race: which students are to be trained next, who is out, and how sure that is. Pure: it is given scores
and gives names, so that a race which was killed comes to the same end.

All candidates begin with few epochs, a whole schedule each, on the same images in the same order from the same initial
weights. Who is behind the leader by more than the noise is out; places go to further seeds of those that remain, and
the best of them go on to longer schedules: successive halving (Jamieson and Talwalkar, arXiv 1502.07943) with a paired
test in the place of the half. The test: a candidate's difference from the leader, over seeds and held-out images,
against its standard error, with Student's t at error / (candidates - 1), so that by the union bound the best candidate
of a look is dropped with probability `error` at most; look k has 6 / (pi k)^2 of the error, and all looks together all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy import stats

from ckd_dist.core.blocks import Residuals, residuals
from ckd_dist.core.results import RaceDrop


class Student(NamedTuple):
    """To be trained."""

    candidate: int
    epochs: int
    seed: int
    """Counted from 0."""


Scores = dict[Student, np.ndarray]
"""What each student reached on every held-out image, float [images]: higher is better."""


@dataclass(frozen=True)
class Rung:
    """A length of training."""

    epochs: int
    share: float
    """Of the budget that may be spent up to the end of this rung."""


@dataclass(frozen=True)
class Comparison:
    """The leader against another."""

    difference: float
    """Mean score of the leader less the other's."""
    by_seed: float
    """Its variance, of the seeds."""
    by_image: float
    """And of the images."""
    freedom: int
    """Degrees of it."""

    @property
    def error(self) -> float:
        """Standard error of the difference."""
        return math.sqrt(self.by_seed + self.by_image)

    def interval(self, confidence: float) -> tuple[float, float]:
        """That the true difference is in, by Student's t."""
        half = float(stats.t.ppf(0.5 + confidence / 2, max(1, self.freedom))) * self.error
        return self.difference - half, self.difference + half


@dataclass
class Outcome:
    """How a race ended."""

    leader: int
    standing: list[int]
    """Candidates that were not told apart from the leader by the test on the last rung, the leader first."""
    epochs: int
    seeds: int
    """Of the last rung that was run."""
    against: dict[int, Comparison] = field(default_factory=dict)
    """The leader against each of the others that were on the last rung."""
    drops: list[RaceDrop] = field(default_factory=list)
    cost: float = 0.0
    """In students of the full length."""


def compare(scores: np.ndarray, leader: int, noise: Residuals) -> dict[int, Comparison]:
    """The row `leader` of scores [candidates, seeds, images] against each other row.

    Two things are drawn at random: seeds, whose residual effect has one variance for all candidates, that of `noise`;
    and images, by the deviation over images of the mean difference.
    """
    candidates, seeds, images = scores.shape
    by_seed = 2 * noise.squares / max(1, noise.freedom) / seeds
    found = {}
    for other in range(candidates):
        if other != leader:
            difference = (scores[leader] - scores[other]).mean(axis=0)
            by_image = difference.var(ddof=1) / images if images > 1 else 0.0
            found[other] = Comparison(float(difference.mean()), by_seed, float(by_image), noise.freedom)
    return found


def behind(comparisons: dict[int, Comparison], error: float) -> list[int]:
    """Who is not the best, each with a probability of `error` at most that it is all the same."""
    found = []
    for other, each in comparisons.items():
        quantile = float(stats.t.ppf(1 - error / len(comparisons), max(1, each.freedom)))
        if each.difference > quantile * each.error and each.difference > 0:
            found.append(other)
    return found


def race(
    candidates: int,
    rungs: Sequence[Rung],
    scores_of: Callable[[list[Student]], Scores],
    budget: Callable[[], float],
    error: float,
    keep: Sequence[int] = (),
) -> Outcome:
    """How a race ends. `scores_of` trains these students, at every look others, and gives the scores of all of them.

    `budget`: in students of the last rung's length; it is asked for after the first look, two seeds of every candidate
    on the first rung, which is taken in any case. `keep`: of these, the best goes on where there is room for three, to
    be compared with.
    """
    running, scores, looks, spent = list(range(candidates)), Scores(), 0, 0.0
    outcome = Outcome(0, running, rungs[0].epochs, 0)
    before = Residuals(0.0, 0)  # of shorter rungs: what seeds do there is no less
    for number, rung in enumerate(rungs):
        price = rung.epochs / rungs[-1].epochs
        goes_on, limit = True, math.inf
        if number:
            goes_on, limit = _limit(rungs, number, budget(), spent + 4 * price)
            running = _cut(outcome, running, max(2, int((limit - spent) / (2 * price) + 1e-9)), keep, spent)
        seeds, noise = 0, Residuals(0.0, 0)
        while len(running) > 1:
            more = 2 if seeds == 0 else 1
            cost = more * price * len(running)
            if looks == 1 and not number:
                goes_on, limit = _limit(rungs, number, budget(), spent)
            if spent + cost > limit + 1e-9:
                break
            scores |= scores_of([Student(c, rung.epochs, s) for c in running for s in range(seeds, seeds + more)])
            seeds, looks, spent = seeds + more, looks + 1, spent + cost
            of = np.stack([[scores[Student(c, rung.epochs, s)] for s in range(seeds)] for c in running])
            leader, noise = int(of.mean(axis=(1, 2)).argmax()), residuals(of.mean(axis=2))
            found = compare(of, leader, before + noise)
            out = behind(found, error * 6 / (math.pi * looks) ** 2)
            outcome.drops += [RaceDrop(running[k], rung.epochs, seeds, found[k].difference, True, spent) for k in out]
            outcome.leader, outcome.epochs, outcome.seeds, outcome.cost = running[leader], rung.epochs, seeds, spent
            outcome.against = {running[k]: each for k, each in found.items()}
            rest = sorted((k for k in range(len(running)) if k not in out), key=lambda k: -of[k].mean())
            running = [running[k] for k in rest]
            outcome.standing = running
        before = before + noise
        if len(running) == 1 or not goes_on:
            break
    return outcome


def _limit(rungs: Sequence[Rung], number: int, budget: float, least: float) -> tuple[bool, float]:
    """(whether the next rung can be paid for, two seeds of two candidates there; what may be spent by the end of this
    one), where the first look at this one brings the cost to `least`."""
    if number + 1 == len(rungs):
        return False, budget
    rest = budget - 4 * rungs[number + 1].epochs / rungs[-1].epochs
    goes_on = least <= rest + 1e-9
    return goes_on, min(budget * rungs[number].share, rest) if goes_on else budget


def _cut(outcome: Outcome, running: list[int], most: int, keep: Sequence[int], spent: float) -> list[int]:
    """The best of those that run, whose order is that of their scores; where there is room for three, the best of those
    to keep among them."""
    going_on = running[:most]
    kept = next((candidate for candidate in running if candidate in keep), None)
    if kept is not None and kept not in going_on and most > 2:
        going_on = [*going_on[:-1], kept]
    for candidate in running:
        if candidate not in going_on:
            difference = outcome.against[candidate].difference
            outcome.drops.append(RaceDrop(candidate, outcome.epochs, outcome.seeds, difference, False, spent))
    return going_on

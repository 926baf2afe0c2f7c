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


class _Play:
    """A race as it stands."""

    def __init__(self, running: list[int], length: int, scores_of: Callable[[list[Student]], Scores], error: float):
        """`length`: epochs of the full length."""
        self.running, self.spent, self.looks = running, 0.0, 0
        self.outcome = Outcome(running[0], running, 0, 0)
        self._length, self._scores_of, self._error = length, scores_of, error
        self._scores = Scores()
        self._before = Residuals(0.0, 0)  # of shorter rungs: what seeds do there is no less
        self._noise = Residuals(0.0, 0)

    def price(self, epochs: int, seeds: int) -> float:
        """Of so many seeds of all that run."""
        return seeds * len(self.running) * epochs / self._length

    def next_rung(self) -> None:
        """What comes is of another length."""
        self._before, self._noise = self._before + self._noise, Residuals(0.0, 0)

    def look(self, epochs: int, seeds: int, new: Sequence[int] = ()) -> None:
        """Train what is missing for all that run, and for those that are `new`, to have so many seeds, and drop who is
        behind."""
        self.running = [*self.running, *new]
        wanted = [Student(c, epochs, s) for c in self.running for s in range(seeds)]
        missing = [each for each in wanted if each not in self._scores]
        self._scores |= self._scores_of(missing)
        self.looks, self.spent = self.looks + 1, self.spent + len(missing) * epochs / self._length
        running, outcome = self.running, self.outcome
        of = np.stack([[self._scores[Student(c, epochs, s)] for s in range(seeds)] for c in running])
        leader, self._noise = int(of.mean(axis=(1, 2)).argmax()), residuals(of.mean(axis=2))
        found = compare(of, leader, self._before + self._noise)
        out = behind(found, self._error * 6 / (math.pi * self.looks) ** 2)
        outcome.drops += [RaceDrop(running[k], epochs, seeds, found[k].difference, True, self.spent) for k in out]
        outcome.leader, outcome.epochs, outcome.seeds, outcome.cost = running[leader], epochs, seeds, self.spent
        outcome.against = {running[k]: each for k, each in found.items()}
        rest = sorted((k for k in range(len(running)) if k not in out), key=lambda k: -of[k].mean())
        self.running = outcome.standing = [running[k] for k in rest]

    def leave(self, candidates: Sequence[int]) -> None:
        """These are out for want of budget."""
        for candidate in candidates:
            known = self.outcome.against.get(candidate)
            epochs, seeds = (self.outcome.epochs, self.outcome.seeds) if known else (0, 0)
            behind = known.difference if known else None
            self.outcome.drops.append(RaceDrop(candidate, epochs, seeds, behind, False, self.spent))
        self.running = [each for each in self.running if each not in candidates]


def race(
    candidates: int,
    rungs: Sequence[Rung],
    scores_of: Callable[[list[Student]], Scores],
    budget: Callable[[], float],
    error: float,
    keep: Sequence[int] = (),
) -> Outcome:
    """How a race of all candidates ends. `scores_of` trains students, at every look others, and gives their scores.

    `budget`: in students of the last rung's length; it is asked for after the first look, two seeds of every candidate
    on the first rung, which is taken in any case. `keep`: of these, the best goes on where there is room for three, to
    be compared with.
    """
    play = _Play([*range(candidates)], rungs[-1].epochs, scores_of, error)
    for number, rung in enumerate(rungs):
        price = rung.epochs / rungs[-1].epochs
        goes_on, limit = True, math.inf
        if number:
            goes_on, limit = _limit(rungs, number, budget(), play.spent + 4 * price)
            room = max(2, int((limit - play.spent) / (2 * price) + 1e-9))
            going_on = _kept(play.running, room, keep)
            play.leave([each for each in play.running if each not in going_on])
            play.next_rung()
        seeds = 0
        while len(play.running) > 1:
            more = 2 if seeds == 0 else 1
            if play.looks == 1 and not number:
                goes_on, limit = _limit(rungs, number, budget(), play.spent)
            if play.spent + play.price(rung.epochs, more) > limit + 1e-9:
                break
            seeds += more
            play.look(rung.epochs, seeds)
        if len(play.running) == 1 or not goes_on:
            break
    return play.outcome


def race_in_order(
    order: Sequence[int],
    epochs: int,
    scores_of: Callable[[list[Student]], Scores],
    budget: Callable[[], float],
    error: float,
) -> Outcome:
    """How a race ends among candidates of which something is known, the likeliest first: there are students of the full
    length only, two seeds of as many candidates as the budget has room for, and more of those that are not told apart.

    The first two run in any case, and the budget is asked for then.
    """
    play = _Play([*order[:2]], epochs, scores_of, error)
    play.look(epochs, 2)
    limit = budget() + 1e-9
    room = 2 + max(0, int((limit - play.spent) / 2))
    play.leave(order[room:])
    if order[2:room]:
        play.look(epochs, 2, order[2:room])
    while len(play.running) > 1 and play.spent + play.price(epochs, 1) <= limit:
        play.look(epochs, play.outcome.seeds + 1)
    return play.outcome


def _limit(rungs: Sequence[Rung], number: int, budget: float, least: float) -> tuple[bool, float]:
    """(whether the next rung can be paid for, two seeds of two candidates there; what may be spent by the end of this
    one), where the first look at this one brings the cost to `least`."""
    if number + 1 == len(rungs):
        return False, budget
    rest = budget - 4 * rungs[number + 1].epochs / rungs[-1].epochs
    goes_on = least <= rest + 1e-9
    return goes_on, min(budget * rungs[number].share, rest) if goes_on else budget


def _kept(running: list[int], most: int, keep: Sequence[int]) -> list[int]:
    """The best of those that run, whose order is that of their scores; where there is room for three, the best of those
    to keep among them."""
    going_on = running[:most]
    kept = next((candidate for candidate in running if candidate in keep), None)
    if kept is not None and kept not in going_on and most > 2:
        going_on = [*going_on[:-1], kept]
    return going_on

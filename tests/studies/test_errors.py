"""Races of students that are dealt out among equal candidates, and of one candidate that is better."""

from __future__ import annotations

import numpy as np

from ckd_dist.studies import errors
from ckd_dist.studies.trajectories import EPOCHS


def pool(seed, better=0.0):
    """Students of every rung, a hundred, right on an image by chance; of the first ten more often."""
    generator = np.random.default_rng(seed)
    likely = np.full((100, 1), 0.7)
    likely[:10] += better
    shape = (100, 800)
    return {epochs: (generator.random(shape) < likely).astype(np.float32) for epochs in (2, 8, EPOCHS)}


def test_equal_candidates_are_seldom_told_apart(monkeypatch):
    monkeypatch.setattr(errors, "GAMES", 60)
    for in_order in (False, True):
        ends = errors._games(pool(0), 18, in_order)
        assert len(ends) == 60 and all(end.cost <= 18 + 1e-9 for end in ends)
        assert sum(len(end.standing) == 1 for end in ends) <= 6
        assert len({end.leader for end in ends}) > 5  # the students were dealt out anew


def test_students_that_differ_are_dropped(monkeypatch):
    monkeypatch.setattr(errors, "GAMES", 20)
    students = pool(1, better=0.2)
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Undealt())
    ends = errors._games(students, 18, True)
    assert all(end.leader == 0 and len(end.standing) == 1 for end in ends)


class Undealt:
    """A generator that leaves everything in its place."""

    def permutation(self, count):
        return np.arange(count)

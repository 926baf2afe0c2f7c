"""evidence.json: what the study of several teachers found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ckd_dist.core.files import read_json

_FINITE = {"allow_inf_nan": False}
"""For pydantic: what is not a number, or not finite, is damage."""


@dataclass(frozen=True)
class Case:
    """One training of a teacher, and one kind of student."""

    task: str
    teacher: int
    """Seed of its training."""
    student: str
    value: float

    __pydantic_config__ = _FINITE


@dataclass(frozen=True)
class Series:
    """A quantity in many cases."""

    name: str
    cases: list[Case]


@dataclass(frozen=True)
class Way:
    """To choose a teacher."""

    name: str
    cost: float
    """In students trained, as a share of trying all with three seeds."""
    behind: list[Case]
    """Points of top-1 that its choice is below that of trying all, by students that neither looked at."""
    regret: list[Case]
    """Points that its choice is below the best mean of all five seeds."""

    __pydantic_config__ = _FINITE


@dataclass(frozen=True)
class Equal:
    """Races, played on what students answered, of candidates of which none is better."""

    rule: str
    budget: float
    """A share of trying all with three seeds."""
    races: int
    dropped: int
    """In which one given candidate was dropped by the test."""
    told_apart: int
    """In which all but one were."""

    __pydantic_config__ = _FINITE


@dataclass(frozen=True)
class Planted:
    """Races of one good candidate among others that are not."""

    races: int
    found: int
    """In which it was chosen."""
    alone: int
    """And all others dropped."""
    cost: float
    """Mean, as a share of trying all with three seeds."""

    __pydantic_config__ = _FINITE


@dataclass(frozen=True)
class Errors:
    """errors.json: how often the race is wrong where the truth is known."""

    equal: list[Equal]
    planted: Planted


@dataclass(frozen=True)
class Evidence:
    """evidence.json: what the study of several teachers found."""

    format: Literal[1]
    candidates: int
    """Among which was chosen."""
    seeds: int
    """Of trying all of them."""
    tuned_on: list[tuple[str, int]]
    """Tasks and teachers that the race was tuned on."""
    ways: list[Way]
    claims: list[Series]
    """Differences in points of top-1."""
    predictors: list[Series]
    """Rank correlations with what students are in the end; the name ends with the percentage of the epochs."""
    losses: list[Series]
    """Of a teacher over its own training, on held-out images: a series for each checkpoint."""
    errors: Errors | None
    """None where they were not counted."""


def read_evidence(path: Path, option: str) -> Evidence:
    """evidence.json; raises `UserError` where it is damaged."""
    return read_json(path, Evidence, option, "remove it, or run ckd_dist.studies.evidence again")


def read_errors(path: Path, option: str) -> Errors:
    """errors.json; raises `UserError` where it is damaged."""
    return read_json(path, Errors, option, "remove it, or run ckd_dist.studies.errors again")

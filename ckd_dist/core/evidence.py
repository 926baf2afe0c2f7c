"""evidence.json: what the study of several teachers found."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ckd_dist.core.errors import require
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


@dataclass(frozen=True)
class Recipes:
    """recipes.json: what each part of a recipe is worth."""

    format: Literal[1]
    plain: Series
    """Top-1 of the plain recipe, in percent."""
    changes: list[Series]
    """By what is done otherwise: differences in points of top-1, in some or all of the cases."""


def read_recipes(path: Path, option: str) -> Recipes:
    """recipes.json; raises `UserError` where it is damaged."""
    return read_json(path, Recipes, option, "remove it, or run ckd_dist.studies.recipes again")


def read_evidence(path: Path, option: str) -> Evidence:
    """evidence.json; raises `UserError` where it is damaged."""
    return read_json(path, Evidence, option, "remove it, or run ckd_dist.studies.evidence again")


def read_errors(path: Path, option: str) -> Errors:
    """errors.json; raises `UserError` where it is damaged."""
    return read_json(path, Errors, option, "remove it, or run ckd_dist.studies.errors again")


def joined(old: Evidence, new: Evidence, option: str) -> Evidence:
    """The new evidence, with what the old one has of other trainings; raises `UserError` where the two are not of the
    same ways and comparisons."""
    trainings = {(case.task, case.teacher) for case in new.ways[0].behind}
    same = all(
        [each.name for each in before] == [each.name for each in now]
        for before, now in ((old.ways, new.ways), (old.claims, new.claims), (old.losses, new.losses))
    )
    require(same, f"{option}: it is of another version: remove it")

    def cases(before: list[Case], now: list[Case]) -> list[Case]:
        rest = [case for case in before if (case.task, case.teacher) not in trainings]
        return sorted([*rest, *now], key=lambda case: (case.task, case.teacher))

    def series(before: list[Series], now: list[Series]) -> list[Series]:
        return [Series(then.name, cases(then.cases, each.cases)) for then, each in zip(before, now, strict=True)]

    return replace(
        new,
        ways=[
            replace(each, behind=cases(then.behind, each.behind), regret=cases(then.regret, each.regret))
            for then, each in zip(old.ways, new.ways, strict=True)
        ],
        claims=series(old.claims, new.claims),
        losses=series(old.losses, new.losses),
        predictors=new.predictors or old.predictors,
        errors=new.errors or old.errors,
    )

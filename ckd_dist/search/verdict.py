"""How a race ended, in words and as race.json."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

from scipy import stats

from ckd_dist.core.console import format_seconds, say
from ckd_dist.core.files import write_bytes_atomically
from ckd_dist.search.racing import Race, budget, everything, seconds
from ckd_dist.search.rule import Outcome, Student
from ckd_dist.search.trials import Trial

WORTH_TELLING = 0.2
"""Points of top-1."""


def report(race: Race, outcome: Outcome) -> None:
    """Say how a race ended, and write race.json into its folder."""
    words = verdict(race, outcome)
    for line in words:
        say(line)
    path = Path(race.search.config.run_dir) / "race.json"
    chosen = race.candidates[outcome.leader]
    members = race.search.teacher.manifest.members
    checkpoints = race.search.teacher.manifest.checkpoints
    weights = {str(name): checkpoints[members[name]]["weights_sha256"] for name in chosen.config.teacher.checkpoints}
    setting = chosen.setting
    values = {
        "format": 1,
        "choice": weights,
        "setting": {key: getattr(setting, key) for key in ("loss", "alpha", "temperature")},
        "model": chosen.model,
        "candidates": [name_of(trial) for trial in race.candidates],
        "verdict": words,
        "budget": budget(race),
        "error": race.search.config.race_error,
        **asdict(outcome),
    }
    write_bytes_atomically(path, (json.dumps(values, indent=2) + "\n").encode())
    say(f"{path}: distill --teacher.selection takes it")


def name_of(trial: Trial) -> str:
    """A candidate, in words."""
    setting = trial.setting
    assert setting
    of = f"alpha {setting.alpha:g}, T {setting.temperature:g}"
    return f"{trial.model}, checkpoint {trial.teacher}, {setting.loss}, {of}"


def verdict(race: Race, outcome: Outcome) -> list[str]:
    """What is known when a race has ended, and how well."""
    full, leader = race.search.config.epochs, name_of(race.candidates[outcome.leader])
    schedule = f"{outcome.seeds} seeds of {outcome.epochs} epochs" + f" of {full}" * (outcome.epochs < full)
    behind = [drop.behind for drop in outcome.drops if not drop.tested and drop.behind is not None]
    not_begun = sum(drop.behind is None for drop in outcome.drops)
    others = [each for each in outcome.standing if each != outcome.leader]
    lines = []
    if not others:
        lines.append(f"best: {leader}; {_over_last(race, outcome)} ({schedule})")
    else:
        names = "; ".join(name_of(race.candidates[each]) for each in outcome.standing)
        lines.append(f"these {len(outcome.standing)} cannot be told apart at this budget: {names} ({schedule})")
        lines.append(f"highest mean: {leader}; {_over_last(race, outcome)}")
        if any(each in race.last for each in outcome.standing):
            lines.append("the last checkpoint is one of them, and costs least: no other needs to be kept or cached")
        lines.append(_more(race, outcome, len(others)))
    if behind:
        lines.append(
            f"{len(behind)} more were left behind by up to {100 * max(behind):.2f} points without being told apart, "
            "for want of budget"
        )
    if not_begun:
        lines.append(f"{not_begun} were not begun: their own answers to held-out images are worse")
    share = outcome.cost / everything(race.candidates)
    lines.append(
        f"cost: {outcome.cost:.2f} of {budget(race):.2f} students of the full length, {100 * share:.1f} % of trying "
        f"all {len(race.candidates)} with three seeds"
    )
    return lines


def _over_last(race: Race, outcome: Outcome) -> str:
    """The leader against the last checkpoint alone, in its best setting on the last rung."""
    if outcome.leader in race.last:
        return "it is the last checkpoint"
    known = {each: outcome.against[each] for each in race.last if each in outcome.against}
    if not known:
        not_begun = {drop.candidate for drop in outcome.drops if drop.behind is None}
        return f"the last checkpoint was {'not begun' if not_begun.issuperset(race.last) else 'behind before'}"
    best = min(known.values(), key=lambda each: each.difference)
    low, high = best.interval(0.95)
    return (
        f"{100 * best.difference:+.2f} points over the last checkpoint, 95 % interval {100 * low:.2f} to "
        f"{100 * high:.2f}"
    )


def _more(race: Race, outcome: Outcome, others: int) -> str:
    """What it would take to tell differences that are worth it."""
    nearest = [outcome.against[each] for each in outcome.standing if each in outcome.against]
    wanted, quantile = WORTH_TELLING / 100, float(stats.norm.ppf(1 - race.search.config.race_error / max(1, others)))
    by_image = max(each.by_image for each in nearest)
    by_seed = max(each.by_seed for each in nearest) * outcome.seeds
    room = (wanted / quantile) ** 2 - by_image
    what = f"to tell {WORTH_TELLING} points apart takes"
    if room <= 0:
        times = math.ceil(by_image / (wanted / quantile) ** 2)
        return f"{what} {times} times as many held-out images, and more seeds"
    needed = max(outcome.seeds, math.ceil(by_seed / room))
    students = (needed - outcome.seeds) * len(outcome.standing) * outcome.epochs / race.search.config.epochs
    took = seconds(race, Student(outcome.leader, outcome.epochs, 0))
    return f"{what} some {math.ceil(students)} more students of the full length, {format_seconds(students * took)}"

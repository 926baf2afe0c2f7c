"""What tells beforehand which teacher's students are best in the end, and what that costs: tables of the documentation.

  python -m ckd_dist.studies.races [RUN_DIR]

For each task and each of several trainings of a resnet20 teacher, resnet8 students of every checkpoint, of an ensemble
and of none: five seeds of 20 epochs, the truth, on test images; and two seeds of 5, 10, 20 and 40 % of the epochs, with
the whole of a cosine schedule and of a trapezoidal one. Beside them what costs no student, the scores of
select_teacher; and races, at several budgets. About 45 minutes a teacher on two CPU cores; run again, what is complete
is not repeated. Writes races.json and races.md into RUN_DIR (default runs/races).
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ckd_dist.core.options import load_config
from ckd_dist.core.results import grouped, read_race, read_selection, read_table
from ckd_dist.search.options import SearchConfig
from ckd_dist.studies.commands import run_in_folder, run_module, write_images

if TYPE_CHECKING:
    pass

EPOCHS, SHARES, SEEDS = 20, {1: 5, 2: 10, 4: 20, 8: 40}, (0, 1)
"""Epochs of the students, of the short ones and their percentage, and seeds of these."""
BUDGETS = (3.6, 5.4, 10.8)
"""Of races, in students: 10, 15 and 30 % of three seeds of the twelve candidates."""
TEACHERS = "[[],[2],[4],[6],[8],[10],[12],[14],[16],[18],[20],[10,20]]"
STUDENTS = [
    *("--model.name", "resnet8", "--grid.teachers", TEACHERS, "--kd.alpha", 0.1, "--kd.temperature", 4),
    *("--optim.warmup_epochs", 0, "--students_at_once", 12, "--log_every", 100, "--data.views", EPOCHS),
    *("--processes", len(os.sched_getaffinity(0))),
]


@dataclass(frozen=True)
class Task:
    """Images, and the seeds of the teachers that are trained on them."""

    name: str
    dataset: str
    images: int
    teachers: tuple[int, ...] = (0, 1, 2)


TASKS = (Task("fashion", "fashion_mnist", 3000), Task("stacked", "stacked_fashion_mnist", 6000))


def main(folder: Path) -> None:
    """Run what is missing in `folder`, print and write the tables."""
    found = {}
    for task in TASKS:
        for seed in task.teachers:
            train(folder / task.name, task, seed)
            found[f"{task.name}, teacher {seed}"] = predictors(folder / task.name, str(seed))
    (folder / "races.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    table = "\n".join(markdown(found))
    (folder / "races.md").write_text(table + "\n", encoding="utf-8")
    print(table)


# ------------------------------------------------------------------------------------------- students


def train(folder: Path, task: Task, seed: int) -> None:
    """A teacher, its store and all students."""
    write_images(folder, task.dataset, {"train": task.images, "holdout": 2000, "test": 10_000})
    run, images = folder / str(seed), ["--data.train", folder / "train.beton", "--data.val", folder / "holdout.beton"]
    teacher = ["--model.name", "resnet20", "--optim.schedule", "step", "--optim.step_epochs", 7, "--epochs", 20]
    teacher += ["--save_every", 2, "--seed", seed, "--run_dir", run / "teacher"]
    run_module(f"{task.name}: teacher {seed}", "ckd_dist.train_teacher", *images, *teacher)
    cache = ["--teacher.run", run / "teacher", "--views", EPOCHS, "--store", run / "store", "--data.batch_size", 256]
    run_module(f"{task.name}: its logits", "ckd_dist.cache_logits", *images[:2], *cache)
    probe = ["--data.batch_size", 32, "--probe.steps", 50, "--probe.lr", 0.01, "--probe.repeats", 2]
    select = [*probe, "--student", "resnet8", "--student_epochs", EPOCHS, "--run_dir", run / "selection"]
    run_module(f"{task.name}: scores", "ckd_dist.select_teacher", *images, "--teacher.run", run / "teacher", *select)
    for budget in BUDGETS:
        words = search_words(folder, run, "race", ["--epochs", EPOCHS, "--race", "--race_budget", budget])
        race = run / f"race_{budget:g}.json"
        if not race.exists():
            run_module(f"{task.name}: a race for {budget} students", "ckd_dist.search", *words)
            (run / "race" / "race.json").replace(race)
    for name, options in searches(folder).items():
        run_module(f"{task.name}: {name}", "ckd_dist.search", *search_words(folder, run, name, options))


def search_words(folder: Path, run: Path, name: str, options: Sequence[object]) -> list[object]:
    """The command line of a search of the students of a teacher, in the folder `name` of its `run`."""
    images = ["--data.train", folder / "train.beton", "--data.val", folder / "holdout.beton"]
    return [*images, *STUDENTS, "--teacher.store", run / "store", *options, "--run_dir", run / name]


def searches(folder: Path) -> dict[str, list[object]]:
    """Name -> options of the searches that a teacher's students are trained by."""
    found: dict[str, list[object]] = {}
    for epochs in SHARES:
        short = ["--epochs", epochs, "--grid.seeds", json.dumps(SEEDS)]
        found[f"short_{epochs}"] = [*short]
        found[f"trapezoid_{epochs}"] = [*short, "--optim.schedule", "trapezoid"]
    truth = ["--epochs", EPOCHS, "--grid.seeds", "[0,1,2,3,4]", "--data.test", folder / "test.beton"]
    found["full"] = [*truth, "--ema_decay", 0.98, "--save_every", 1]
    return found


# ------------------------------------------------------------------------------------------- what predicts


def predictors(folder: Path, teacher: str) -> dict[str, dict[str, float]]:
    """Name of a candidate -> the true mean top-1 on test images, and what each predictor says of it: higher is
    better."""
    run = folder / teacher
    found: dict[str, dict[str, float]] = {}
    for (name,), rows in grouped(read_table(run / "full" / "results.csv", "RUN_DIR"), "teacher"):
        found[name] = {"truth": statistics.mean(row["test_top1"] for row in rows)}
        lines = [_metrics(run / "full" / "students" / row["student"]) for row in rows if row["seed"] in SEEDS]
        for epochs, share in SHARES.items():
            for key, what in {"raw_": "the running student", "": "its moving average"}.items():
                for figure, sign in {"top1": 1, "loss": -1}.items():
                    values = [sign * each[epochs - 1][key + figure] for each in lines]
                    found[name][f"{what}, {figure}, {share} %"] = statistics.mean(values)
    for kind, what in {"short": "a short whole schedule", "trapezoid": "a constant rate and a decay"}.items():
        for epochs, share in SHARES.items():
            for name, answers in _answers(folder, run, f"{kind}_{epochs}").items():
                for figure, of in FIGURES.items():
                    found[name][f"{what}, {figure}, {share} %"] = statistics.mean(map(of, answers))
    selection = read_selection(run / "selection" / "selection.json", "RUN_DIR")
    for each in selection.checkpoints:
        scores = {f"Algorithm 1, {scaling}": value for scaling, value in each.scores.items()}
        scores |= {"teacher's top-1": each.top1, "least calibration error": -each.calibration_error}
        scores |= {"largest entropy": each.entropy, "agreement with the last": each.agreement_with_last}
        scores |= {"largest conditional mutual information": each.conditional_mutual_information}
        found[str(each.epoch)] |= {f"{name}, free": value for name, value in scores.items()}
    for budget in BUDGETS:
        race = read_race(run / f"race_{budget:g}.json", "RUN_DIR")
        chosen = "+".join(race.choice) or "none"
        for name, said in found.items():
            said[f"race, {budget:g} students"] = float(name == chosen)
    return found


FIGURES: dict[str, Callable] = {
    "top1": lambda answers: float(answers.correct.mean()),
    "calibrated loss": lambda answers: -float(answers.loss.mean()),
}


def _metrics(student: Path) -> list[dict]:
    lines = map(json.loads, (student / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["split"] == "val"]


def _answers(folder: Path, run: Path, name: str) -> dict[str, list]:
    """Candidate -> what its students, by seeds, answer to the held-out images."""
    from ckd_dist.core import dist
    from ckd_dist.search.held_out import read_answers, write_answers
    from ckd_dist.search.trials import prepare

    words = search_words(folder, run, name, searches(folder)[name])
    search = prepare(load_config(SearchConfig, [str(word) for word in words]))
    with dist.process_group() as device:
        write_answers(search, search.trials, device)
    found: dict[str, list] = {}
    for trial in search.trials:
        found.setdefault(trial.teacher, []).append(read_answers(trial))
    return found


def markdown(found: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """For each predictor its rank correlation with the truth, and the regret of its choice: means over the teachers. By
    share of the epochs; then what is free, and the races."""
    names = list(dict.fromkeys(name for each in found.values() for values in each.values() for name in values))
    kinds = list(dict.fromkeys(name.rpartition(", ")[0] for name in names if name.endswith(" %")))
    lines = [f"| what is looked at | {' | '.join(f'{share} %' for share in SHARES.values())} |"]
    lines.append(f"|{'---|' * (1 + len(SHARES))}")
    for kind in kinds:
        cells = [_judged(found, f"{kind}, {share} %") for share in SHARES.values()]
        lines.append(f"| {kind} | {' | '.join(f'{rho:.2f}, {regret:.2f}' for rho, regret in cells)} |")
    lines += ["", "| choice by | rank correlation | regret |", "|---|---|---|"]
    for name in (name for name in names if name.endswith((", free", " students"))):
        rho, regret = _judged(found, name)
        lines.append(f"| {name} | {'' if name.endswith('students') else f'{rho:.2f}'} | {regret:.2f} |")
    truths = [{name: values["truth"] for name, values in each.items()} for each in found.values()]
    fixed = {"last checkpoint": "20", "checkpoint 10": "10", "ensemble 10+20": "10+20", "no teacher": "none"}
    for what, name in fixed.items():
        lines.append(f"| {what} | | {statistics.mean(max(each.values()) - each[name] for each in truths):.2f} |")
    at_random = statistics.mean(max(each.values()) - statistics.mean(each.values()) for each in truths)
    lines.append(f"| any at random | | {at_random:.2f} |")
    return lines


def _judged(found: dict[str, dict[str, dict[str, float]]], name: str) -> tuple[float, float]:
    """(Spearman's correlation of a predictor and the truth over the candidates that it tells of, the regret of the one
    that it puts first), means over the teachers."""
    from scipy import stats

    correlations, regrets = [], []
    for candidates in found.values():
        pairs = [(each["truth"], each[name]) for each in candidates.values() if name in each]
        correlations.append(float(stats.spearmanr(*zip(*pairs, strict=True)).statistic))
        best = max(each["truth"] for each in candidates.values())
        regrets.append(best - max(pairs, key=lambda pair: pair[1])[0])
    return statistics.mean(correlations), statistics.mean(regrets)


if __name__ == "__main__":
    run_in_folder(main, "runs/races")

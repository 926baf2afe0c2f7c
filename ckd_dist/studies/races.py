"""What of a short training tells which teacher's students are best in the end: the tables of the documentation.

  python -m ckd_dist.studies.races [RUN_DIR]

For each task and each of several trainings of a resnet20 teacher, resnet8 students of every checkpoint, of an ensemble
and of none: five seeds of 20 epochs, the truth, on test images; and two seeds of 5, 10, 20 and 40 % of the epochs, with
the whole of a cosine schedule and of a trapezoidal one. About half an hour a teacher on two CPU cores; run again, what
is complete is not repeated. Writes races.json and races.md into RUN_DIR (default runs/races).
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ckd_dist.core.options import load_config
from ckd_dist.core.results import grouped, read_table
from ckd_dist.search.options import SearchConfig
from ckd_dist.studies.commands import run_in_folder, run_module

if TYPE_CHECKING:
    import numpy as np

EPOCHS, SHARES, SEEDS = 20, {1: 5, 2: 10, 4: 20, 8: 40}, (0, 1)
"""Epochs of the students, of the short ones and their percentage, and seeds of these."""
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
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in {"train": task.images, "holdout": 2000, "test": 10_000}.items():
        path = folder / f"{split}.beton"
        if not path.exists():
            options = ["--dataset", task.dataset, "--split", split, "--holdout", 0.1, "--subset", count, "--out", path]
            run_module(f"{task.name}: {split}", "data_prep.write_beton", *options)
    run, images = folder / str(seed), ["--data.train", folder / "train.beton", "--data.val", folder / "holdout.beton"]
    teacher = ["--model.name", "resnet20", "--optim.schedule", "step", "--optim.step_epochs", 7, "--epochs", 20]
    teacher += ["--save_every", 2, "--seed", seed, "--run_dir", run / "teacher"]
    run_module(f"{task.name}: teacher {seed}", "ckd_dist.train_teacher", *images, *teacher)
    cache = ["--teacher.run", run / "teacher", "--views", EPOCHS, "--store", run / "store", "--data.batch_size", 256]
    run_module(f"{task.name}: its logits", "ckd_dist.cache_logits", *images[:2], *cache)
    for name, options in searches(folder).items():
        words = [*images, *STUDENTS, "--teacher.store", run / "store", *options, "--run_dir", run / name]
        run_module(f"{task.name}: {name}", "ckd_dist.search", *words)


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

    images = ["--data.train", folder / "train.beton", "--data.val", folder / "holdout.beton"]
    words = [*images, *STUDENTS, "--teacher.store", run / "store", *searches(folder)[name], "--run_dir", run / name]
    search = prepare(load_config(SearchConfig, [str(word) for word in words]))
    with dist.process_group() as device:
        write_answers(search, search.trials, device)
    found: dict[str, list] = {}
    for trial in search.trials:
        found.setdefault(trial.teacher, []).append(read_answers(trial))
    return found


def markdown(found: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """For each predictor: its rank correlation with the truth and the regret of its choice, by share of the epochs:
    means over the teachers."""
    import numpy as np
    from scipy import stats

    def judged(name: str) -> tuple[float, float]:
        correlations, regrets = [], []
        for candidates in found.values():
            truth: np.ndarray = np.array([each["truth"] for each in candidates.values()])
            said = np.array([each[name] for each in candidates.values()])
            correlations.append(float(stats.spearmanr(truth, said).statistic))
            regrets.append(float(truth.max() - truth[said.argmax()]))
        return statistics.mean(correlations), statistics.mean(regrets)

    names = [name for name in next(iter(next(iter(found.values())).values())) if name != "truth"]
    kinds = list(dict.fromkeys(name.rpartition(", ")[0] for name in names))
    lines = [f"| what is looked at | {' | '.join(f'{share} %' for share in SHARES.values())} |"]
    lines.append(f"|{'---|' * (1 + len(SHARES))}")
    for kind in kinds:
        cells = [judged(f"{kind}, {share} %") for share in SHARES.values()]
        lines.append(f"| {kind} | {' | '.join(f'{rho:.2f}, {regret:.2f}' for rho, regret in cells)} |")
    return lines


if __name__ == "__main__":
    run_in_folder(main, "runs/races")

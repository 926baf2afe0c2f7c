"""Which setting of each teacher is the best on held-out images, and what it reaches on test images."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ckd_dist.core import results
from ckd_dist.core.identity import read_lineage
from ckd_dist.search.trials import Search, Trial

if TYPE_CHECKING:
    import torch


def choose(trials: list[Trial]) -> list[dict]:
    """The rows of results.csv, without test figures: for each model and teacher, the setting with the best mean top-1
    on data.val over the seeds is chosen; of equals the one with the lower loss there, then the first."""
    from ckd_dist.core.run_folder import read_summary

    rows = []
    for trial in trials:
        folder = Path(trial.config.run_dir)
        summary, lineage = read_summary(folder), read_lineage(folder, "run_dir")
        setting = {key: getattr(trial.setting, key, None) for key in ("loss", "alpha", "temperature")}
        figures = {f"val_{key}": getattr(summary, key) for key in ("top1", "top5", "loss")}
        took = {key: getattr(summary, key) for key in ("train_seconds", "side_by_side")}
        named = {"student": trial.name, "weights_sha256": trial.weights_sha256}
        named.update({"model": trial.model, "teacher": trial.teacher, **setting})
        named["identity"] = lineage.identity if lineage else None
        rows.append({**named, "seed": trial.config.seed, "epochs": trial.config.epochs, **figures, **took})
    for _, same_teacher in results.grouped(rows, "model", "teacher"):
        means = {
            setting: (statistics.mean(r["val_top1"] for r in same), -statistics.mean(r["val_loss"] for r in same))
            for setting, same in results.grouped(same_teacher, "loss", "alpha", "temperature")
        }
        best = max(means, key=lambda setting: means[setting])
        for row in same_teacher:
            row["chosen"] = int((row["loss"], row["alpha"], row["temperature"]) == best)
    return rows


def is_of(table: list[dict], rows: list[dict]) -> bool:
    """Whether the rows of a results.csv are the `rows` of `choose`: of the same students, as they are now. Columns that
    it lacks, of an older version, are not compared."""
    lacking = {key for key in results.SINCE_OLDER if not any(line[key] for line in table)}
    kept = [key for key in results.COLUMNS if key not in lacking and not key.startswith("test_")]
    return [[line[key] for key in kept] for line in table] == [[row[key] for key in kept] for row in rows]


def test(search: Search, rows: list[dict], device: torch.device) -> None:
    """Add the test figures of the chosen students to their rows; collective."""
    from ckd_dist.data.loader import BetonLoader
    from ckd_dist.search.held_out import load_students
    from ckd_dist.train import evaluation

    config, info = search.config, search.images["data.test"]
    chosen = [(trial, row) for trial, row in zip(search.trials, rows, strict=True) if row["chosen"]]
    loader = None
    for start in range(0, len(chosen), config.students_at_once):
        group = chosen[start : start + config.students_at_once]
        found, metadata = load_students([trial for trial, _ in group], device)
        networks = {trial.name: network for (trial, _), network in zip(group, found, strict=True)}
        if loader is None:
            as_evaluated = replace(config.data, image_size=None)  # at the size that figures on data.val are of
            loader = BetonLoader.for_evaluation(info, as_evaluated, metadata, device)
        for (_, row), figures in zip(group, evaluation.evaluate(networks, loader, config.amp).values(), strict=True):
            row.update({f"test_{key}": value for key, value in figures.items()})


def show(rows: list[dict]) -> None:
    """Print the chosen setting of every model and teacher, and what its students reached."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Top-1 of the chosen settings, %: mean ± deviation over seeds", title_justify="left")
    for column in ("student", "teacher", "loss", "alpha", "T", "seeds", "held out", "test"):
        table.add_column(column, justify="left" if column in ("student", "teacher", "loss") else "right")
    for (model, teacher), same in results.grouped([row for row in rows if row["chosen"]], "model", "teacher"):
        setting = ["" if same[0][key] is None else str(same[0][key]) for key in ("loss", "alpha", "temperature")]
        figures = []
        for key in ("val_top1", "test_top1"):
            values = [row[key] for row in same if row[key] is not None]
            figures.append(results.mean_and_deviation(values) if values else "")
        table.add_row(model, teacher, *setting, str(len(same)), *figures)
    Console(highlight=False, width=120).print(table)

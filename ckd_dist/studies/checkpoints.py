"""The study of the README: which checkpoint of a teacher teaches best, on Fashion-MNIST under the paper's protocol.

  python -m ckd_dist.studies.checkpoints        at the root of the repository, whose configs/study it runs

Three ResNet-20 teachers, the logits of ten checkpoints, mutual information at three layers, 171 ResNet-8 students with
alpha and T searched for each teacher, and the report, in runs/study: about 100 minutes on two CPU cores. Every stage is
a command that a user would type; run again, what is complete is not repeated.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from ckd_dist.core.errors import require
from ckd_dist.core.process import run_process
from ckd_dist.studies.commands import console, run_module, write_images

CONFIGS, RUNS = Path("configs/study"), Path("runs/study")
IMAGES = {"train": 6000, "holdout": 2000, "test": 10000}
LAYERS = ("features.8", "features.5")
"""Beside the last feature map: the ends of the second and the first stage."""


def main() -> None:
    """Run every command; ends the process when one fails."""
    if sys.argv[1:]:
        print(__doc__)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    require(CONFIGS.is_dir(), f"{CONFIGS} is not here: run the study at the root of the repository")
    started = time.perf_counter()
    write_images(RUNS, "fashion_mnist", IMAGES)

    def run(title: str, config: str, *more: object, processes: int = 2) -> None:
        module = {"teacher": "train_teacher", "cache": "cache_logits", "select": "select_teacher"}.get(config, config)
        run_module(title, f"ckd_dist.{module}", "--config", CONFIGS / f"{config}.yaml", *more, processes=processes)

    run("the teacher and its trajectory", "teacher")
    run("the logits of every checkpoint", "cache")
    for seed, name in ((1, "b"), (2, "c")):
        folder = RUNS / f"teacher_{name}"
        run(f"teacher {name}, for full ensembles", "teacher", "--seed", seed, "--save_every", 20, "--run_dir", folder)
        run(f"the logits of teacher {name}", "cache", "--teacher.run", folder, "--teacher.name", name)
    run("mutual information", "select")
    for layer in LAYERS:
        run(f"mutual information at {layer}", "select", "--layer", layer, "--run_dir", RUNS / f"selection_{layer}")
    run("the students", "search", processes=0)
    if not (RUNS / "bench" / "bench.json").exists():
        run_module("what cached logits save", "ckd_dist.bench", RUNS / "bench", "--only", "epochs")
    run_module("the report", "ckd_dist.report", RUNS)
    console.print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    run_process(main)

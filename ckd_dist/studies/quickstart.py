"""The whole pipeline on Fashion-MNIST in two processes, a few minutes on two CPU cores.

  python -m ckd_dist.studies.quickstart [RUN_DIR] [--processes 2] [--images FOLDER]

Every stage is a command that a user would type; run again, what is complete is not repeated.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from rich.table import Table

from ckd_dist.core.options import Parser
from ckd_dist.core.process import run_process
from ckd_dist.studies.commands import console, run_module, write_images

TRAIN_IMAGES, HELD_OUT_IMAGES = 4000, 1000
TEACHER_EPOCHS, HALF_WAY, VIEWS, STUDENT_EPOCHS = 8, 4, 4, 4


def main() -> None:
    """Read the command line."""
    parser = Parser(prog="python -m ckd_dist.studies.quickstart", description=__doc__)
    parser.add_argument("run_dir", nargs="?", type=Path, default=Path("runs/quickstart"), metavar="RUN_DIR")
    parser.add_argument("--processes", type=int, default=2, help="of every command (default: 2)")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="where they are, or go (default: RUN_DIR)")
    options = parser.parse_args(sys.argv[1:])
    run(options.run_dir, options.images or options.run_dir, options.processes)


def prepare(images: Path) -> None:
    """Write the images, unless they are there."""
    write_images(images, "fashion_mnist", {"train": TRAIN_IMAGES, "holdout": HELD_OUT_IMAGES})


def run(folder: Path, images: Path, processes: int) -> None:
    """Run every command in `folder` and print what came out; ends the process when one fails."""
    started = time.perf_counter()
    prepare(images)
    train, held_out = images / "train.beton", images / "holdout.beton"

    data = ["--data.train", train, "--data.val", held_out]
    teacher, store = folder / "teacher", folder / "store"
    run_module(
        "the teacher and its trajectory",
        *("ckd_dist.train_teacher", *data, "--model.name", "resnet20", "--epochs", TEACHER_EPOCHS),
        *("--save_every", 2, "--run_dir", teacher),
        processes=processes,
    )
    caching = run_module(
        "the logits of every checkpoint",
        *("ckd_dist.cache_logits", "--data.train", train, "--teacher.run", teacher, "--store", store),
        *("--views", VIEWS, "--shard_size", 1000),
        processes=processes,
    )
    full, half = f"[{TEACHER_EPOCHS}]", f"[{HALF_WAY}]"
    both = f"[{HALF_WAY},{TEACHER_EPOCHS}]"
    students = {
        "plain": ("none", ["--data.views", VIEWS]),
        "full": (f"epoch {TEACHER_EPOCHS}, cached", ["--teacher.store", store, "--teacher.checkpoints", full]),
        "half": (f"epoch {HALF_WAY}, cached", ["--teacher.store", store, "--teacher.checkpoints", half]),
        "both": (f"epochs {both}, cached", ["--teacher.store", store, "--teacher.checkpoints", both]),
        "both_online": (
            f"epochs {both}, online",
            ["--teacher.run", teacher, "--teacher.checkpoints", both, "--data.views", VIEWS],
        ),
    }
    for name, (source, options) in students.items():
        run_module(
            f"student: teacher {source}",
            *("ckd_dist.distill", *data, "--model.name", "resnet8", "--epochs", STUDENT_EPOCHS, "--log_every", 1),
            *("--optim.warmup_epochs", 1, "--kd.alpha", 0.5, "--kd.temperature", 4, *options),
            *("--run_dir", folder / name),
            processes=processes,
        )
    report(folder, teacher, {name: source for name, (source, _) in students.items()}, caching)
    console.print(f"run folder: {folder}  ({time.perf_counter() - started:.0f} s in all)")


def report(folder: Path, teacher: Path, students: dict[str, str], caching: float) -> None:
    """Print the accuracies, the seconds, and what the cache changed."""
    table = Table(title=f"Teacher, resnet20: accuracy on {HELD_OUT_IMAGES} held-out images", title_justify="left")
    table.add_column("after epoch", justify="right")
    table.add_column("top-1 %", justify="right")
    for line in _metrics(teacher, "val"):
        if (line["epoch"] + 1) % 2 == 0:
            table.add_row(str(line["epoch"] + 1), f"{line['top1']:.2f}")
    console.print(table)

    summaries = {name: json.loads((folder / name / "summary.json").read_text(encoding="utf-8")) for name in students}
    table = Table(title="Students, resnet8", title_justify="left")
    for column in ("teacher", "top-1 %", "training s", "images/s"):
        table.add_column(column, justify="left" if column == "teacher" else "right")
    for name, source in students.items():
        s = summaries[name]
        table.add_row(source, f"{s['top1']:.2f}", f"{s['train_seconds']:.1f}", f"{s['images_per_s']:,.0f}")
    console.print(table)

    cached, online = (summaries[name]["train_seconds"] for name in ("both", "both_online"))
    losses = zip(_metrics(folder / "both", "train"), _metrics(folder / "both_online", "train"), strict=True)
    difference = max(abs(a["loss"] - b["loss"]) for a, b in losses)
    console.print(
        f"The ensemble's student took {cached:.1f} s from cached logits, {online:.1f} s with the online teachers; "
        f"caching took {caching:.1f} s, once for all students.\n"
        f"Largest difference of a step's loss between the two: {difference:.2g}.\n"
        "This size shows that the machine works. It is far too small, and has too few seeds, to show that the paper's "
        "effect holds."
    )


def _metrics(run: Path, split: str) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["split"] == split]


if __name__ == "__main__":
    run_process(main)

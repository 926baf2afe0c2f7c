"""What each part of a recipe is worth: students with it and without, of the teachers of ckd_dist.studies.trajectories.

  python -m ckd_dist.studies.recipes RUN_DIR [--tasks fashion,stacked,tiles] [--teachers 1,2,3] [--out FILE]

RUN_DIR is that of the trajectories, whose teachers, stores and held-out answers are used. The plain recipe is theirs: a
resnet8 taught by the last checkpoint, 20 epochs of random crops. Every other one differs from it in one part, and is
trained once for each training of a teacher, from the same seed. FILE (default RUN_DIR/recipes.json) has the differences
in held-out top-1. A student takes about a minute of a CPU core; run again, what is complete is not repeated.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from ckd_dist.core.evidence import Case, Recipes, Series
from ckd_dist.core.files import write_bytes_atomically
from ckd_dist.core.options import Parser
from ckd_dist.core.process import run_process
from ckd_dist.core.run_folder import read_summary
from ckd_dist.studies.commands import run_module
from ckd_dist.studies.trajectories import CROPS, EPOCHS, LAST, MODELS, TASKS

PLAIN = "plain"


@dataclass(frozen=True)
class Recipe:
    """What is done otherwise than in the plain one."""

    name: str
    student: tuple[object, ...] = ()
    """Options of distill."""
    views: tuple[object, ...] = ()
    """Options of cache_logits; where there are any, the teacher answers for these views."""
    online: bool = False
    """Whether the teacher answers at every step, for the images as the student sees them."""


RECIPES = (
    Recipe(PLAIN),
    Recipe("1 view instead of 20", ("--data.views", 1)),
    Recipe("5 views instead of 20", ("--data.views", 5)),
    Recipe("twice the epochs, from the same views", ("--epochs", 2 * EPOCHS)),
    Recipe("mixup of views", views=("--data.mixup", 1)),
    Recipe("mixup of pairs, with both answers", ("--data.pair_mixup", 1)),
    Recipe("mixup of pairs, with the teacher's answer", ("--data.pair_mixup", 1), online=True),
    Recipe("CutMix of views", views=("--data.cutmix", 1)),
    Recipe("CutMix of pairs, with both answers", ("--data.pair_cutmix", 1)),
    Recipe("CutMix of pairs, with the teacher's answer", ("--data.pair_cutmix", 1), online=True),
    Recipe("CutMix of pairs, twice the epochs", ("--data.pair_cutmix", 1, "--epochs", 2 * EPOCHS)),
    Recipe("RandAugment", views=("--data.policy", "rand_augment")),
    Recipe("TrivialAugment", views=("--data.policy", "trivial_augment")),
    Recipe("each image twice in a step", ("--data.repeats", 2)),
    Recipe("binary cross entropy", ("--label_loss", "binary_cross_entropy")),
    Recipe("moving average of the weights", ("--ema_decay", 0.99)),
)


def main() -> None:
    """Train what is missing, and write what is known."""
    parser = Parser(prog="python -m ckd_dist.studies.recipes", description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--tasks", default=",".join(task.name for task in TASKS), help="(default: all)")
    parser.add_argument("--teachers", default="1,2,3", help="seeds of their trainings (default: 1,2,3)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: RUN_DIR/recipes.json)")
    options = parser.parse_args(sys.argv[1:])
    for recipe in RECIPES:
        for task in filter(None, options.tasks.split(",")):
            for teacher in options.teachers.split(","):
                train(recipe, options.run_dir / task / teacher)
    found = asdict(read(options.run_dir))
    write_bytes_atomically(
        options.out or options.run_dir / "recipes.json", (json.dumps(found, indent=1) + "\n").encode()
    )


def folder(recipe: Recipe, run: Path) -> Path:
    """Where the student of a training of a teacher is."""
    return run / "recipes" / "".join(letter if letter.isalnum() else "_" for letter in recipe.name)


def train(recipe: Recipe, run: Path) -> None:
    """The student of a recipe, and the store that it needs."""
    title, student, store = f"{run.parent.name} {run.name}: {recipe.name}", folder(recipe, run), run / "store"
    if read_summary(student):
        return
    images: list[object] = ["--data.train", run.parent / "train.beton"]
    if recipe.views:
        store = student.with_name(f"{student.name}_store")
        words = [*images, "--teacher.run", run / "teacher", "--teacher.checkpoints", [LAST], "--views", EPOCHS]
        words += ["--store", store, "--data.batch_size", 500, *CROPS, *recipe.views]
        run_module(f"{title}, the teacher's logits", "ckd_dist.cache_logits", *words)
    words = [*images, "--data.val", run.parent / "holdout.beton", "--model.name", MODELS[0], "--seed", run.name]
    teacher = ["--teacher.run", run / "teacher", "--data.views", EPOCHS, *CROPS]
    words += teacher if recipe.online else ["--teacher.store", store]
    words += ["--teacher.checkpoints", [LAST], "--kd.alpha", 0.1, "--kd.temperature", 4]
    words += ["--data.batch_size", 64, "--epochs", EPOCHS, "--val_every", 2 * EPOCHS, "--log_every", 1000]
    run_module(title, "ckd_dist.distill", *words, *recipe.student, "--run_dir", student)


def read(run_dir: Path) -> Recipes:
    """What is known of every recipe, in the trainings of which the plain student is known."""
    top1 = {
        recipe.name: {
            run: summary.top1
            for run in sorted(run_dir.glob("*/*"))
            if (summary := read_summary(folder(recipe, run))) and summary.top1 is not None
        }
        for recipe in RECIPES
    }

    def series(name: str, values: dict[Path, float]) -> Series:
        return Series(name, [Case(run.parent.name, int(run.name), MODELS[0], value) for run, value in values.items()])

    plain = top1.pop(PLAIN)
    changes = {
        name: {run: value - plain[run] for run, value in values.items() if run in plain}
        for name, values in top1.items()
    }
    return Recipes(1, series(PLAIN, plain), [series(name, values) for name, values in changes.items() if values])


if __name__ == "__main__":
    run_process(main)

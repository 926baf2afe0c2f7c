"""What each part of a recipe is worth: students with it and without.

  python -m ckd_dist.studies.recipes RUN_DIR [--tasks fashion,stacked,tiles,all] [--teachers 1,2,3] [--out FILE]

Three tasks are those of ckd_dist.studies.trajectories, whose RUN_DIR it is: 2,000 to 3,000 images, with checkpoints of
each training of a teacher there. The fourth, all, is Fashion-MNIST whole, 50,000 images to train on and
10,000 held out, with teachers of its own. In the plain recipe a resnet8 learns from random crops, every epoch's views
new. Every other one differs from it in one part, and is trained once for each training of a teacher, from the same
seed. FILE (default RUN_DIR/recipes.json) has the differences in held-out top-1. A student takes half a minute of a CPU
core, of the fourth task one to three, all of it four hours; run again, what is complete is not repeated.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ckd_dist.core.errors import require
from ckd_dist.core.evidence import Case, Recipes, Series
from ckd_dist.core.files import write_bytes_atomically
from ckd_dist.core.options import Parser
from ckd_dist.core.process import run_process
from ckd_dist.core.run_folder import read_summary
from ckd_dist.studies import trajectories
from ckd_dist.studies.commands import run_module

STUDENT, PLAIN = trajectories.MODELS[0], "plain"
Words = tuple[object, ...]


@dataclass(frozen=True)
class Recipe:
    """What is done otherwise than in the plain one."""

    name: str
    student: Words | Callable[[int], Words] = ()
    """Options of distill; where they depend on the plain number of epochs, a function of it."""
    views: Words = ()
    """Options of cache_logits; where there are any, the teacher answers for these views."""
    calibrated: bool = False
    """Whether the teacher's logits are, by its answers to the held-out images."""
    online: bool = False
    """Whether the teacher answers at every step, for the images as the student sees them."""
    together: bool = False
    """Whether the half-way checkpoint teaches beside the last one, where there is one."""


RECIPES = (
    Recipe(PLAIN),
    Recipe("one view only", ("--data.views", 1)),
    Recipe("a quarter of the views", lambda epochs: ("--data.views", epochs // 4)),
    Recipe("twice the epochs, from the same views", lambda epochs: ("--epochs", 2 * epochs)),
    Recipe("four times the epochs, from the same views", lambda epochs: ("--epochs", 4 * epochs)),
    Recipe(
        "four times the epochs, from a quarter of the views",
        lambda epochs: ("--epochs", 4 * epochs, "--data.views", epochs // 4),
    ),
    Recipe("mixup of views", views=("--data.mixup", 1)),
    Recipe("mixup of pairs, with both answers", ("--data.pair_mixup", 1)),
    Recipe("mild mixup of pairs, with both answers", ("--data.pair_mixup", 0.2)),
    Recipe("mixup of pairs, with the teacher's answer", ("--data.pair_mixup", 1), online=True),
    Recipe("CutMix of views", views=("--data.cutmix", 1)),
    Recipe("CutMix of pairs, with both answers", ("--data.pair_cutmix", 1)),
    Recipe("CutMix of pairs, with the teacher's answer", ("--data.pair_cutmix", 1), online=True),
    Recipe("CutMix of pairs, twice the epochs", lambda epochs: ("--data.pair_cutmix", 1, "--epochs", 2 * epochs)),
    Recipe("RandAugment", views=("--data.policy", "rand_augment")),
    Recipe(
        "RandAugment, four times the epochs",
        lambda epochs: ("--epochs", 4 * epochs),
        views=("--data.policy", "rand_augment"),
    ),
    Recipe("TrivialAugment", views=("--data.policy", "trivial_augment")),
    Recipe("each image twice in a step", ("--data.repeats", 2)),
    Recipe("binary cross entropy", ("--label_loss", "binary_cross_entropy")),
    Recipe("moving average of the weights", ("--ema_decay", 0.99)),
    Recipe("calibrated teacher", calibrated=True),
    Recipe("calibrated teacher, at T 2", ("--kd.temperature", 2), calibrated=True),
    Recipe("half-way and last checkpoint", together=True),
    Recipe("half-way and last checkpoint, calibrated", together=True, calibrated=True),
    Recipe("feature maps", ("--kd.feature_weight", 1), online=True),
)


@dataclass(frozen=True)
class Setting:
    """What teachers and students of a task learn by."""

    task: trajectories.Task
    epochs: int = trajectories.EPOCHS
    """Of a plain student, and views."""
    teacher: int = trajectories.LAST
    """Epochs of a teacher; its rate falls after a half and three quarters of them."""
    half: int | None = trajectories.HALF
    """Where a checkpoint was kept."""


ALL = Setting(trajectories.Task("all", "fashion_mnist", 1 / 6, 50_000, 10_000), epochs=4, teacher=12, half=None)
SETTINGS = {setting.task.name: setting for setting in (*map(Setting, trajectories.TASKS), ALL)}


def main() -> None:
    """Train what is missing, and write what is known."""
    parser = Parser(prog="python -m ckd_dist.studies.recipes", description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--tasks", default=",".join(SETTINGS), help="(default: all four)")
    parser.add_argument("--teachers", default="1,2,3", help="seeds of their trainings (default: 1,2,3)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: RUN_DIR/recipes.json)")
    options = parser.parse_args(sys.argv[1:])
    wanted = [(SETTINGS[name], run) for name in options.tasks.split(",") for run in options.teachers.split(",")]
    for setting, seed in wanted:
        run = options.run_dir / setting.task.name / seed
        if setting is ALL:
            train_teacher(run)
        mend = "run ckd_dist.studies.trajectories first, or leave the task or the teacher out"
        require((run / "store").exists(), f"RUN_DIR: there is no {run / 'store'}: {mend}")
    for recipe in RECIPES:
        for setting, seed in wanted:
            train(recipe, setting, options.run_dir / setting.task.name / seed)
    found = json.dumps(asdict(read(options.run_dir)), indent=1) + "\n"
    write_bytes_atomically(options.out or options.run_dir / "recipes.json", found.encode())


def folder(recipe: Recipe, run: Path) -> Path:
    """Where the student of a training of a teacher is."""
    return run / "recipes" / "".join(letter if letter.isalnum() else "_" for letter in recipe.name)


def train_teacher(run: Path) -> None:
    """The images of the whole of Fashion-MNIST, a teacher, its logits of them and its answers to those held out."""
    title, fall = f"{run.parent.name} {run.name}", [ALL.teacher // 2, ALL.teacher * 3 // 4]
    trajectories.write_images(run.parent, ALL.task, None)
    words = [*trajectories.TEACHER, "--epochs", ALL.teacher, "--optim.milestones", fall, "--seed", run.name]
    words += ["--save_every", ALL.teacher, "--val_every", ALL.teacher, "--data.train", run.parent / "train.beton"]
    words += ["--data.val", run.parent / "holdout.beton", "--run_dir", run / "teacher"]
    run_module(f"{title}: teacher", "ckd_dist.train_teacher", *words)
    cache(f"{title}: its logits", ALL, run, run / "store")
    teacher = ["--teacher.run", run / "teacher", "--teacher.checkpoints", [ALL.teacher]]
    run_module(f"{title}: its own answers", "ckd_dist.cache_logits", *teacher, *trajectories.held_out(run.parent, run))


def cache(title: str, setting: Setting, run: Path, store: Path, *views: object) -> None:
    """The logits of the teacher's last checkpoint."""
    words = ["--data.train", run.parent / "train.beton", "--teacher.run", run / "teacher", "--store", store]
    words += ["--teacher.checkpoints", [setting.teacher], "--views", setting.epochs, "--data.batch_size", 500]
    run_module(title, "ckd_dist.cache_logits", *words, *trajectories.CROPS, *views)


def train(recipe: Recipe, setting: Setting, run: Path) -> None:
    """The student of a recipe, and the store that it needs."""
    title, student, store = f"{run.parent.name} {run.name}: {recipe.name}", folder(recipe, run), run / "store"
    if read_summary(student) or (recipe.together and setting.half is None):
        return
    if recipe.views:
        store = student.with_name(f"{student.name}_store")
        cache(f"{title}, the teacher's logits", setting, run, store, *recipe.views)
    own = recipe.student(setting.epochs) if callable(recipe.student) else recipe.student
    words = ["--data.train", run.parent / "train.beton", "--data.val", run.parent / "holdout.beton"]
    words += ["--model.name", STUDENT, "--seed", run.name, "--epochs", setting.epochs, "--data.batch_size", 64]
    words += ["--kd.alpha", 0.1, "--kd.temperature", 4]
    words += ["--teacher.checkpoints", [*([setting.half] if recipe.together else []), setting.teacher]]
    teacher = ["--teacher.run", run / "teacher", "--data.views", setting.epochs, *trajectories.CROPS]
    words += [*(teacher if recipe.online else ["--teacher.store", store]), "--val_every", 1000, "--log_every", 1000]
    words += ["--teacher.calibration", run / "held_out"] if recipe.calibrated else []
    run_module(title, "ckd_dist.distill", *words, *own, "--run_dir", student)


def read(run_dir: Path) -> Recipes:
    """What is known of every recipe, in the trainings of which the plain student is known."""
    runs = [path for task in SETTINGS for path in sorted((run_dir / task).glob("[0-9]*"))]
    top1 = {
        recipe.name: {
            run: summary.top1
            for run in runs
            if (summary := read_summary(folder(recipe, run))) and summary.top1 is not None
        }
        for recipe in RECIPES
    }

    def series(name: str, values: dict[Path, float]) -> Series:
        return Series(name, [Case(run.parent.name, int(run.name), STUDENT, value) for run, value in values.items()])

    plain = top1.pop(PLAIN)
    changes = {
        name: {run: value - plain[run] for run, value in values.items() if run in plain}
        for name, values in top1.items()
    }
    return Recipes(1, series(PLAIN, plain), [series(name, values) for name, values in changes.items() if values])


if __name__ == "__main__":
    run_process(main)

"""The students that the study of races is made of: those of every checkpoint of several teachers, of several lengths.

  python -m ckd_dist.studies.trajectories RUN_DIR [--photographs FOLDER] [--teachers 1,2,3]

Three tasks of images of 16 px: a part of Fashion-MNIST, stacked Fashion-MNIST of a thousand classes, and tiles of the
photographs in FOLDER, any pictures, whose classes are the pictures. Of each of several trainings of a resnet20 teacher
ten checkpoints are kept. Two kinds of students, resnet8 and a plain network, learn from every checkpoint, an ensemble
and none: five seeds of 20 epochs, which tell what is true, and of 2. Of one teacher there are students of other lengths
and of a trapezoidal schedule too, and what the long ones are after every epoch, with their moving averages. Every
teacher has controls: the last checkpoint at other temperatures, and the like.

All of them are asked about the same 8,000 held-out images; answers.npz of a teacher has what they say. A teacher takes
25 to 35 minutes of a CPU core; run again, what is complete is not repeated.
"""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ckd_dist.core.files import write_bytes_atomically
from ckd_dist.core.options import Parser, load_config
from ckd_dist.core.process import run_process
from ckd_dist.search import prior, racing
from ckd_dist.search.options import SearchConfig
from ckd_dist.studies.commands import console, run_module

EPOCHS, SHORT = 20, {1: 3, 2: 5, 4: 3, 8: 5}
"""Epochs of the students; of the shorter ones, and how many seeds these have."""
RUNGS = [rung.epochs for rung in racing.rungs_of(EPOCHS)]
"""Lengths that a race needs."""
TUNED_ON = ("fashion", 1)
"""The task and the teacher that have students of all lengths and kinds, which the race was chosen by."""
SEEDS = 5
KEPT = (6, 12, 18, 24, 30, 36, 42, 48, 54, 60)
"""Epochs of the teacher's checkpoints."""
HALF, LAST = 30, 60
CANDIDATES = [[], *([epoch] for epoch in KEPT), [HALF, LAST]]
MODELS = ("resnet8", "ckd_dist.studies.plain:PlainNet")
SIDE, TILES = 16, 120
"""Pixels of a tile's side, and tiles of a picture."""


@dataclass(frozen=True)
class Task:
    """Images: what data_prep reads, and how many of them teachers and students learn from."""

    name: str
    dataset: str
    holdout: float
    train: int
    held_out: int = 8000


TASKS = (
    Task("fashion", "fashion_mnist", 0.2, 2000),
    Task("stacked", "stacked_fashion_mnist", 0.5, 3000),
    Task("tiles", "imagefolder", 0.7, 2000),
)


def main() -> None:
    """Train what is missing."""
    parser = Parser(prog="python -m ckd_dist.studies.trajectories", description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--photographs", type=Path, metavar="FOLDER", help="pictures; without it: no tiles")
    parser.add_argument("--teachers", default="1,2,3", help="their seeds (default: 1,2,3)")
    options = parser.parse_args(sys.argv[1:])
    tasks = [task for task in TASKS if task.dataset != "imagefolder" or options.photographs]
    for task in tasks:
        write_images(options.run_dir / task.name, task, options.photographs)
    for seed in options.teachers.split(","):
        for task in tasks:
            train(options.run_dir / task.name, task, int(seed))


# ------------------------------------------------------------------------------------------- images


def write_images(folder: Path, task: Task, photographs: Path | None) -> None:
    """Write the .beton files of a task, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    root: list[object] = []
    if task.dataset == "imagefolder" and photographs:
        root = ["--root", folder / "tiles"]
        if not (folder / "tiles").exists():
            write_tiles(photographs, folder / "tiles")
    for split, count in (("train", task.train), ("holdout", task.held_out)):
        path = folder / f"{split}.beton"
        if not path.exists():
            words = ["--dataset", task.dataset, *root, "--split", split, "--holdout", task.holdout, "--subset", count]
            words += ["--max-resolution", SIDE, "--out", path]
            run_module(f"{task.name}: {count} images for {split}", "data_prep.write_beton", *words)


def write_tiles(photographs: Path, out: Path) -> None:
    """Cut every picture, scaled to hold about `TILES`, into tiles: a class of an image folder."""
    from PIL import Image

    partial = out.with_name(f"{out.name}.partial")
    for path in sorted(photographs.iterdir()):
        with Image.open(path) as file:
            picture = file.convert("RGB")
        scale = (TILES * SIDE**2 / (picture.width * picture.height)) ** 0.5
        columns, rows = (max(1, round(each * scale / SIDE)) for each in picture.size)
        picture = picture.resize((columns * SIDE, rows * SIDE), Image.Resampling.BOX)
        (partial / path.stem).mkdir(parents=True, exist_ok=True)
        for tile in range(columns * rows):
            x, y = tile % columns * SIDE, tile // columns * SIDE
            picture.crop((x, y, x + SIDE, y + SIDE)).save(partial / path.stem / f"{tile:03}.png")
    partial.rename(out)


# ------------------------------------------------------------------------------------------- teachers and students


def train(folder: Path, task: Task, seed: int) -> None:
    """A teacher and those that it is compared with, their students, and what all of them answer."""
    run = folder / str(seed)
    if (run / "answers.npz").exists():
        return
    train_teachers(folder, f"{task.name} {seed}", seed)
    searches = list(all_searches(folder, seed))
    for name, words in searches:
        run_module(f"{task.name} {seed}: {name}", "ckd_dist.search", *words)
    for model in MODELS:
        plain = [*plain_student(run, model), *held_out(folder, run)]
        run_module(f"{task.name} {seed}: a plain student's answers", *plain)
    console.rule(f"{task.name} {seed}: answers")
    found = own_answers(run / "held_out", folder / "holdout.beton")
    for name, words in searches:
        found |= {f"{name}/{key}": value for key, value in answers(words).items()}
        if (folder.name, seed) == TUNED_ON and name.startswith("whole"):
            found |= {f"{name}/{key}": value for key, value in agreements(words, run / "held_out").items()}
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **found)
    write_bytes_atomically(run / "answers.npz", file.getvalue())


def train_teachers(folder: Path, title: str, seed: int) -> None:
    """Teachers, their logits of the training images, and of one its answers to held-out images and its scores."""
    run = folder / str(seed)
    images: list[object] = ["--data.train", folder / "train.beton", "--data.val", folder / "holdout.beton"]
    for name, (teacher_seed, more) in teachers(seed).items():
        own, kept = run / f"teacher{name and '_'}{name}", LAST if name else KEPT[0]
        words = [*images, *TEACHER, "--save_every", kept, "--val_every", kept, "--seed", teacher_seed, *more]
        run_module(f"{title}: teacher {name}", "ckd_dist.train_teacher", *words, "--run_dir", own)
        words = ["--teacher.run", own, *(["--teacher.name", name] if name else []), "--views", EPOCHS]
        words += ["--store", run / "store", "--data.batch_size", 500, *CROPS]
        run_module(f"{title}: its logits", "ckd_dist.cache_logits", *images[:2], *words)
    teacher = ["--teacher.run", run / "teacher"]
    run_module(f"{title}: its own answers", "ckd_dist.cache_logits", *teacher, *held_out(folder, run))
    probe = ["--data.batch_size", 50, "--probe.steps", 50, "--probe.lr", 0.01, "--probe.repeats", 2]
    select = [*images, *teacher, *probe, "--student", "resnet8", "--student_epochs", EPOCHS]
    run_module(f"{title}: scores", "ckd_dist.select_teacher", *select, "--run_dir", run / "selection")


def held_out(folder: Path, run: Path) -> list[object]:
    """Options of a store of answers to the held-out images, as they are evaluated."""
    images = ["--data.train", folder / "holdout.beton", "--data.augment", "center_crop", "--data.image_size", SIDE]
    return [*images, "--views", 1, "--store", run / "held_out", "--data.batch_size", 500]


CROPS: list[object] = ["--data.augment", "random_resized_crop", "--data.crop_scale_min", 0.8, "--data.image_size", SIDE]
TEACHER: list[object] = [
    *("--model.name", "resnet20", "--epochs", LAST, "--data.batch_size", 64, *CROPS),
    *("--optim.schedule", "multistep", "--optim.milestones", "[30,45]", "--log_every", 1000),
]
"""With little augmentation and many epochs at a small rate, so that it has the time to learn by heart."""


def teachers(seed: int) -> dict[str, tuple[int, list[object]]]:
    """Name -> (seed, options) of the teacher, which has none, and of those that it is compared with."""
    return {
        "": (seed, []),
        "smooth": (seed, ["--label_smoothing", 0.1]),
        "average": (seed, ["--ema_decay", 0.998]),
        "other": (seed + 100, []),
    }


def all_searches(folder: Path, seed: int) -> Iterator[tuple[str, list[object]]]:
    """(Name, options) of the searches that a teacher's students are trained by."""

    def words(name: str, candidates: Sequence[object], seeds: int, *more: object) -> tuple[str, list[object]]:
        run = folder / str(seed)
        grid = ["--grid.teachers", json.dumps(candidates), "--grid.seeds", json.dumps([*range(seeds)])]
        images = ["--data.train", folder / "train.beton", "--data.val", folder / "holdout.beton"]
        options = [*images, *STUDENTS, "--teacher.store", run / "store", *grid, *more]
        return name, [*options, "--run_dir", run / "students" / name]

    tuned_on = (folder.name, seed) == TUNED_ON
    for epochs, seeds in {**SHORT, EPOCHS: SEEDS}.items():
        if tuned_on or epochs in RUNGS:
            yield words(f"whole_{epochs}", CANDIDATES, seeds, "--epochs", epochs)
    for temperature in (1, 2, 8):
        yield words(f"last_T_{temperature}", [[LAST]], SEEDS, "--epochs", EPOCHS, "--kd.temperature", temperature)
    controls = [[f"smooth/{LAST}"], [f"average/{LAST}"], [LAST, f"other/{LAST}"]]
    yield words("controls", controls, SEEDS, "--epochs", EPOCHS)
    yield words("sequence", [[HALF, LAST]], SEEDS, "--epochs", EPOCHS, "--teacher.combine", "sequence")
    if tuned_on:
        for epochs in SHORT:
            more = ["--epochs", epochs, "--optim.schedule", "trapezoid"]
            yield words(f"trapezoid_{epochs}", CANDIDATES, 3, *more)
        yield words("running", CANDIDATES, 2, "--epochs", EPOCHS, "--ema_decay", 0.99, "--val_every", 1)


STUDENTS: list[object] = [
    *("--model.name", MODELS[0], "--grid.models", json.dumps(MODELS), "--kd.alpha", 0.1, "--kd.temperature", 4),
    *("--data.batch_size", 64, "--data.views", EPOCHS, "--val_every", EPOCHS, "--log_every", 1000),
    *("--students_at_once", 24, "--processes", 2),
]


def answers(words: list[object]) -> dict[str, np.ndarray]:
    """Of the students of a search, by model and figure: whether an image is answered right, as bits uint8 [candidates,
    seeds, images / 8], and the mean loss at the best temperature, float32 [candidates, seeds]. The order of candidates
    and seeds is that of the search."""
    from ckd_dist.core import dist
    from ckd_dist.search.held_out import read_answers, write_answers
    from ckd_dist.search.trials import prepare

    search = prepare(load_config(SearchConfig, [str(word) for word in words]))
    with dist.process_group() as device:
        write_answers(search, search.trials, device)
    found: dict[str, np.ndarray] = {}
    seeds = len(search.config.grid.seeds)
    for model in search.config.grid.models:
        known = [read_answers(trial) for trial in search.trials if trial.model == model]
        assert all(each is not None for each in known)
        correct = np.stack([each.correct for each in known if each]).reshape(-1, seeds, search.images["data.val"].count)
        losses = np.array([each.loss.mean() for each in known if each], dtype=np.float32).reshape(-1, seeds)
        found |= {f"{short(model)}/correct": np.packbits(correct, axis=2), f"{short(model)}/loss": losses}
    return found


PLAIN = EPOCHS // 10
"""Epochs of the students without a teacher that the teachers are compared with."""


def plain_student(run: Path, model: str) -> list[object]:
    """The command that has the first of these answer the held-out images."""
    student = run / "students" / f"whole_{PLAIN}" / "students" / f"{model.replace(':', '.')}_teacher_none_seed_0"
    words: list[object] = ["ckd_dist.cache_logits", "--teacher.run", student, "--teacher.name", short(model)]
    return words + (["--teacher.model", model] if ":" in model else [])


def own_answers(store: Path, images: Path) -> dict[str, np.ndarray]:
    """Of the teachers among the candidates whether they answer an image right, as bits uint8 [candidates, images / 8];
    of every checkpoint the mean KL in nats from the one before to it, and from it to a student of each kind that had
    no teacher, float64 [checkpoints]."""
    from ckd_dist.data.beton import open_beton
    from ckd_dist.nn.losses import soft_target_divergence
    from ckd_dist.store.reader import StoreReader

    info = open_beton(images, "images")
    right = prior.correct(StoreReader(str(store), list(KEPT), info), info, CANDIDATES[1:])
    plain = [f"{short(model)}/{PLAIN}" for model in MODELS]
    reader, ids = StoreReader(str(store), [*KEPT, *plain], info), np.arange(info.count)
    logits = [reader.logits(ids, 0, member) for member in range(len(KEPT) + len(plain))]

    def divergence(teacher: int, other: int) -> float:
        return float(soft_target_divergence(logits[other], logits[teacher], 1.0).double().mean())

    found = {"own/correct": np.packbits(right, axis=1)}
    found["own/step"] = np.array([math.inf, *(divergence(n - 1, n) for n in range(1, len(KEPT)))])
    for n, model in enumerate(MODELS, start=len(KEPT)):
        found[f"own/{short(model)}"] = np.array([divergence(teacher, n) for teacher in range(len(KEPT))])
    return found


def agreements(words: list[object], store: Path) -> dict[str, np.ndarray]:
    """Of the students of a search, by model: the share of the held-out images to which a student answers as its teacher
    does, float64 [candidates, seeds]; nan without a teacher."""
    import torch

    from ckd_dist.nn.losses import ensemble_logits
    from ckd_dist.search.held_out import held_out_logits
    from ckd_dist.search.trials import prepare
    from ckd_dist.store.reader import StoreReader

    search = prepare(load_config(SearchConfig, [str(word) for word in words]))
    info, seeds = search.images["data.val"], len(search.config.grid.seeds)
    reader, ids = StoreReader(str(store), list(KEPT), info), np.arange(info.count)
    own = {epoch: reader.logits(ids, 0, member) for member, epoch in enumerate(KEPT)}
    found = {}
    for model in search.config.grid.models:
        taught = [trial for trial in search.trials if trial.model == model and trial.setting]
        batches = [
            torch.stack([logits.argmax(dim=1) for logits in answered])
            for _, answered in held_out_logits(search, taught, torch.device("cpu"))
        ]
        teachers = [[own[int(epoch)] for epoch in trial.config.teacher.checkpoints or ()] for trial in taught]
        theirs = torch.stack([ensemble_logits(members).argmax(dim=1) for members in teachers])
        same = (torch.cat(batches, dim=1) == theirs).double().mean(dim=1).reshape(-1, seeds)
        found[f"{short(model)}/agreement"] = np.pad(same.numpy(), ((1, 0), (0, 0)), constant_values=math.nan)
    return found


def short(model: str) -> str:
    """Its name without that of its module."""
    return model.rpartition(":")[2]


if __name__ == "__main__":
    run_process(main)

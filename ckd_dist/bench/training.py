"""Training: whole epochs with and without teachers, students side by side, and ranks."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from ckd_dist.bench.measure import Row, in_turn, spread
from ckd_dist.bench.step import Models, learner, memory_batch, models_of, plain_loss, train
from ckd_dist.core import checkpoint, precision
from ckd_dist.core.options import load_config
from ckd_dist.core.results import Spread
from ckd_dist.data import dataset
from ckd_dist.data.dataset import DatasetInfo
from ckd_dist.data.loader import BetonLoader
from ckd_dist.data.order import shuffled_ids, train_ids
from ckd_dist.nn import models
from ckd_dist.nn.forward import forward_logits, to_device
from ckd_dist.studies.commands import run_module
from ckd_dist.train import students
from ckd_dist.train.options import DistillConfig
from ckd_dist.train.teachers import open_teacher, resolve_checkpoints

IMAGES, VIEWS = 4096, 2
CODECS = {"dense": [], "topk": ["--codec", "topk", "--k", 8]}


@dataclass(frozen=True)
class Setup:
    """What the measurements of training and storing share."""

    folder: Path
    device: torch.device

    @property
    def models(self) -> Models:
        """Those of the device."""
        return models_of(self.device)

    @property
    def images(self) -> Path:
        """Small images of 1000 classes."""
        return self.folder / "stacked.beton"

    @property
    def held_out(self) -> Path:
        """Others of the same kind."""
        return self.folder / "stacked_held_out.beton"

    @property
    def options(self) -> list[object]:
        """Of every command on these images."""
        sizes = ["--data.image_size", self.models.image_size, "--data.batch_size", self.models.batch_size]
        return ["--data.train", self.images, *sizes]

    @cached_property
    def info(self) -> DatasetInfo:
        """Of the images."""
        return dataset.read_info(self.images, "RUN_DIR")

    def teacher(self, name: str) -> Path:
        """The run of a teacher."""
        return self.folder / f"teacher_{name}"

    def store(self, codec: str) -> Path:
        """The logits of the small teacher."""
        return self.folder / f"store_{codec}"

    def write_images(self) -> None:
        """Unless they are there."""
        for path, split, count in ((self.images, "train", IMAGES), (self.held_out, "test", IMAGES // 4)):
            if not path.exists():
                images = ["--dataset", "stacked_fashion_mnist", "--split", split, "--subset", count]
                run_module(f"images, {split}", "data_prep.write_beton", *images, "--out", path)

    def prepare(self) -> None:
        """Write images, teachers of one epoch and logits, by the commands that a user would type."""
        self.write_images()
        for name in dict.fromkeys(self.models.teachers):
            model = ["--model.name", name, "--epochs", 1, "--run_dir", self.teacher(name)]
            run_module(f"a teacher, {name}", "ckd_dist.train_teacher", *self.options, *model)
        small = ["--teacher.run", self.teacher(self.models.teachers[0]), "--views", VIEWS]
        for codec, more in CODECS.items():
            store = ["--store", self.store(codec), *more]
            run_module(f"its logits, {codec}", "ckd_dist.cache_logits", *self.options, *small, *store)


# ------------------------------------------------------------------------------------------- epochs


def measure_epochs(setup: Setup) -> list[Row]:
    """Whole epochs of one student, loader included: without a teacher, from stores, and with online teachers; and what
    the student and the teachers reach on data in memory, which bounds what a store can gain."""
    student, teachers = setup.models.student, setup.models.teachers
    case = f"epoch, {student}, {setup.models.image_size} px, {setup.info.num_classes} classes"
    epochs = {"plain training": _Epochs(setup, "plain")}
    for codec in CODECS:
        epochs[f"from the store, {codec}"] = _Epochs(setup, codec, "--teacher.store", setup.store(codec))
    epochs["plain training, again"] = _Epochs(setup, "again")  # how far the same differs from itself
    rows = in_turn(case, "images/s", epochs, rounds=11)
    for row in rows:
        row.limit = f"arithmetic: the student's step; {100 * statistics.median(epochs[row.what].waited):.1f} % for data"

    works: dict[str, Callable[[], float]] = {"from the store, dense": epochs["from the store, dense"]}
    for name in teachers:
        options = ["--teacher.run", setup.teacher(name), "--data.views", VIEWS]
        works[f"online teacher, {name}"] = _Epochs(setup, f"online_{name}", *options)
    shape = (setup.models.batch_size, setup.models.image_size)
    batches = [memory_batch(*shape, setup.device)] * 8
    images = sum(len(batch.images) for batch in batches)
    scratch = setup.folder / "scratch"
    one = learner(scratch / "in_memory", student, plain_loss, setup.device, setup.models.batch_size)

    def forward(network: torch.nn.Module) -> float:
        for batch in batches:
            forward_logits(network, batch.images, one.config.amp)
        return images

    works["student's step, data in memory"] = partial(train, one, batches)
    for name in teachers:
        network, _ = models.load_model(setup.teacher(name) / "checkpoints" / "epoch_0001.pt", "RUN_DIR")
        works[f"forward of {name}, data in memory"] = partial(forward, to_device(network, setup.device))
    alone = {name: name for name in works if name.endswith("in memory")}
    from_store, *others = in_turn(case, "images/s", works, rounds=7, references=alone)
    found = {row.what: row.rates for row in others}
    for row in others:
        if row.what.startswith("online teacher"):
            ahead = found[f"forward of {row.what.rpartition(' ')[2]}, data in memory"]
            most = [1 + a / b for a, b in zip(found["student's step, data in memory"], ahead, strict=True)]
            gain = [a / b for a, b in zip(from_store.rates, row.rates, strict=True)]
            share = spread([a / b for a, b in zip(gain, most, strict=True)])
            row.limit = f"the store gains {Spread(**share).words}"
            row.limit += f" of student and teacher over student, {statistics.median(most):.2f}"
    return rows + others


class _Epochs:
    """Trains the student for an epoch at every call, as `distill` does with these options of the teacher."""

    def __init__(self, setup: Setup, name: str, *teacher: object):
        student, self._batch_size = setup.models.student, setup.models.batch_size
        options = [*setup.options, "--model.name", student, "--run_dir", "-", "--epochs", 1000, *teacher]
        config = load_config(DistillConfig, [str(word) for word in options])
        config = replace(config, amp=precision.automatic(), teacher=resolve_checkpoints(config.teacher))
        self._distillation = students.set_up([config], open_teacher([config], setup.device), setup.info)
        self._learner = learner(
            setup.folder / "scratch" / name,
            student,
            self._distillation.losses[0],
            setup.device,
            self._batch_size,
            steps_per_epoch=setup.info.count // self._batch_size,
        )
        self._loader = BetonLoader(
            setup.info,
            config.data,
            self._distillation.recipe,
            batch_size=self._batch_size,
            image_size=setup.models.image_size,
            device=setup.device,
        )
        self.waited: list[float] = []
        """Share of each epoch's time that the step waited for data."""

    def __call__(self) -> float:
        one, loader, started, waited = self._learner, self._loader, time.perf_counter(), self._loader.seconds_waited
        epoch = one.step // one.steps_per_epoch
        inputs, order = self._distillation.schedule.inputs(epoch), shuffled_ids(loader.info.count, 0, epoch)
        batches = loader.batches(train_ids(order, self._batch_size), inputs.views[0], inputs.rows)
        images = train(one, batches, inputs.teacher)
        self.waited.append((loader.seconds_waited - waited) / (time.perf_counter() - started))
        return images


# ------------------------------------------------------------------------------------------- commands


def measure_students(setup: Setup, count: int = 4, tries: int = 3) -> list[Row]:
    """`count` students trained side by side, and by as many separate commands, in turn, start-up included; each
    student's weights must be those of its separate run."""
    runs = setup.folder / "scratch" / "students"
    options = [*setup.options, "--data.val", setup.held_out, "--model.name", "resnet8", "--epochs", 2]
    options += ["--teacher.store", setup.store("dense")]
    alphas = [round((1 + number) / (count + 1), 2) for number in range(count)]

    def apart() -> float:
        for alpha in alphas:
            shutil.rmtree(runs / str(alpha), ignore_errors=True)
            output("ckd_dist.distill", *options, "--kd.alpha", alpha, "--run_dir", runs / str(alpha))
        return count

    def together() -> float:
        shutil.rmtree(runs / "search", ignore_errors=True)
        grid = ["--grid.alphas", alphas, "--grid.teachers", "[[1]]", "--run_dir", runs / "search"]
        output("ckd_dist.search", *options, *grid)
        for student, alpha in zip(sorted((runs / "search" / "students").iterdir()), alphas, strict=True):
            mine, theirs = _weights(student), _weights(runs / str(alpha))
            assert all(torch.equal(mine[name], theirs[name]) for name in mine), student
        return count

    rows = in_turn(
        f"{count} students, resnet8", "students/s", {"separate runs": apart, "side by side": together},
        rounds=tries, warm_up=0,
    )  # fmt: skip
    rows[1].limit = "start-up and decoding, which they share"
    return rows


def _weights(run: Path) -> dict:
    return checkpoint.load(checkpoint.checkpoint_path(run, 2), "RUN_DIR")["weights"]


def measure_scaling(setup: Setup, tries: int = 3) -> list[Row]:
    """A training in one process, and in more: on GPUs one process each, on CPUs with as many threads in all. Epochs
    after the first, as the run's own record has them."""
    gpus = torch.cuda.device_count()
    counts = [count for count in (1, 2, 4, 8) if count <= (gpus or 2)]
    run, student = setup.folder / "scratch" / "scaling", setup.models.student

    def rate(processes: int) -> float:
        shutil.rmtree(run, ignore_errors=True)
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
        options = [*setup.options, "--model.name", student, "--epochs", 4, "--run_dir", run]
        if gpus:  # as much for each
            options += ["--data.batch_size", processes * setup.models.batch_size]
        output(*(launcher if processes > 1 else []), "ckd_dist.train_teacher", *options)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        later = [line for line in lines if line["epoch"]]
        return sum(line["seconds"] * line["images_per_s"] for line in later) / sum(line["seconds"] for line in later)

    rates: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(tries):
        for count in counts:
            rates[count].append(rate(count))
    one, many = ("GPU", "GPUs") if gpus else ("process", "processes")
    case = f"scaling, {student}"
    rows = [Row(case, f"{count} {one if count == 1 else many}", "images/s", rates[count]) for count in counts]
    for row, count in zip(rows[1:], counts[1:], strict=True):
        row.reference = "1 GPU" if gpus else "1 process, 2 threads"
        row.ratios = [a / b / (count if gpus else 1) for a, b in zip(rates[count], rates[1], strict=True)]
        row.limit = "the exchange of gradients" if gpus else "arithmetic: the same cores"
    return rows


def output(*words: object) -> str:
    """What `python -m WORDS` prints."""
    command = [sys.executable, "-m", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if words[0] == "torch.distributed.run" else None
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, encoding="utf-8", errors="replace", env=environment
    ).stdout

"""The train step on data in memory: against a bare loop, and with teachers. Needs no file of images, nor FFCV."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from ckd_dist.bench.measure import Row, in_turn, synchronize
from ckd_dist.core import precision
from ckd_dist.core.identity import Origin
from ckd_dist.core.options import load_config, to_dict
from ckd_dist.core.run_folder import RunFolder
from ckd_dist.data.batch import Batch
from ckd_dist.nn import forward, losses, models, probe
from ckd_dist.store.codecs.base import Codec
from ckd_dist.store.codecs.dense import Dense
from ckd_dist.store.codecs.topk import TopK
from ckd_dist.store.codecs.transform import Transform
from ckd_dist.store.codecs.transform import fit as fit_basis
from ckd_dist.train import loop
from ckd_dist.train.learner import Learner, Loss
from ckd_dist.train.objective import DistillationLoss
from ckd_dist.train.options import DistillConfig
from ckd_dist.train.records import OnlineRecords

CLASSES = 1000


@dataclass(frozen=True)
class Models:
    """Models that keep a device busy."""

    student: str
    teachers: tuple[str, str]
    """A small and a large one."""
    image_size: int
    batch_size: int


ON_CPU = Models("resnet20", ("resnet20", "resnet56"), 28, 128)
ON_GPU = Models("resnet18", ("resnet18", "resnet50"), 160, 512)


def models_of(device: torch.device) -> Models:
    """Those that fit the device."""
    return ON_GPU if device.type == "cuda" else ON_CPU


def learner(
    folder: Path,
    model: str,
    loss: Loss,
    device: torch.device,
    batch_size: int,
    *options: str,
    steps_per_epoch: int = 32,
) -> Learner:
    """A model ready to train for a thousand epochs, as `distill` makes it, with its run in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    given = {"data.train": "memory", "model.name": model, "epochs": 1000, "run_dir": folder}
    words = [f"--{name}={value}" for name, value in {**given, "data.batch_size": batch_size}.items()]
    requested = load_config(DistillConfig, [*words, *options])
    config = precision.resolve(requested, folder)
    torch.manual_seed(0)
    network = probe.prepare(models.build_model(model, CLASSES), model, CLASSES, 64, "size")
    run = RunFolder(config.run_dir, Origin(requested=to_dict(requested), resolved=to_dict(config)))
    return Learner(network, config, loss, run, device, {}, steps_per_epoch)


def memory_batch(count: int, size: int, device: torch.device) -> Batch:
    """Random numbers in place of `count` images and labels, on the device."""
    images = torch.randn(count, 3, size, size, device=device).to(memory_format=torch.channels_last)
    return Batch(images, torch.randint(CLASSES, (count,), device=device), torch.arange(count))


def plain_loss(logits: torch.Tensor, batch: Batch, epoch: int) -> dict[str, torch.Tensor]:
    """The label's cross entropy."""
    return {"loss": losses.cross_entropy(logits, batch.labels)}


def train(one: Learner, batches: Iterable[Batch], teacher: OnlineRecords | None = None) -> float:
    """A step on each of the `batches`; gives the number of images."""
    before = one.step
    for _ in loop.train_steps([one], batches, teacher, before):
        pass
    one.log(1.0, 0.0)
    return (one.step - before) * one.config.data.batch_size


# ------------------------------------------------------------------------------------------- against a bare loop


def measure(folder: Path, device: torch.device, limits: dict[str, float]) -> list[Row]:
    """Train steps on a batch that is in memory, against a loop of the fewest lines that do the same arithmetic."""
    if device.type == "cuda":
        names = ("resnet18", "resnet50", "mobilenet_v2")
        cases = [(name, size, tuned_batch_size(name, size, device)) for name in names for size in (224, 160)]
    else:
        cases = [("resnet20", 32, 128), ("resnet18", 64, 64)]
    return [row for case in cases for row in _measure(folder, device, limits, *case)]


def _bare_loop(name: str, device: torch.device, batch: Batch) -> Callable[[], None]:
    """A function that takes one train step."""
    torch.manual_seed(0)
    model = probe.prepare(models.build_model(name, CLASSES), name, CLASSES, 64, "size")
    model = model.to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)

    amp = precision.automatic()

    def step() -> None:
        with forward.autocast(device, amp):
            logits = model(batch.images)
        F.cross_entropy(logits.float(), batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def tuned_batch_size(name: str, size: int, device: torch.device, most: int = 2048) -> int:
    """The batch size that the bare loop is fastest with; of two within 2 %, the smaller."""
    best, best_rate, batch_size = 64, 0.0, 64
    while batch_size <= most:
        try:
            step = _bare_loop(name, device, memory_batch(batch_size, size, device))
            for count in (3, 10):  # the first do not count
                synchronize()
                started = time.perf_counter()
                for _ in range(count):
                    step()
                synchronize()
            rate = count * batch_size / (time.perf_counter() - started)
        except torch.cuda.OutOfMemoryError:
            break
        if rate > 1.02 * best_rate:
            best, best_rate = batch_size, rate
        batch_size *= 2
    return best


def _measure(
    folder: Path, device: torch.device, limits: dict[str, float], name: str, size: int, batch_size: int, steps: int = 4
) -> list[Row]:
    batch = memory_batch(batch_size, size, device)
    bare_step = _bare_loop(name, device, batch)

    def bare() -> float:
        for _ in range(steps):
            bare_step()
        return steps * batch_size

    def ours(*options: str) -> Callable[[], float]:
        one = learner(folder / f"step_{name}_{size}", name, plain_loss, device, batch_size, *options)
        return partial(train, one, [batch] * steps)

    with FlopCounterMode(display=False) as counter:
        bare_step()
    case = f"step, {name}, {size} px, batch {batch_size}"
    works = {"bare loop": bare, "ckd_dist": ours()}
    if device.type == "cuda":
        works["ckd_dist --compile true"] = ours("--compile=true")
    rows = in_turn(case, "images/s", works, rounds=15, warm_up=3)
    for row in rows[1:]:
        share = counter.get_total_flops() * row.rate / batch_size / limits["flop_per_s"]
        row.limit = f"arithmetic: {100 * share:.0f} % of a large product's"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            works[row.what]()
            row.limit += f"; {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    return rows


# ------------------------------------------------------------------------------------------- with teachers


def measure_distillation(folder: Path, device: torch.device) -> list[Row]:
    """A student's train step with cached records and with online teachers, all in memory; and its losses alone, since
    what they add is less than two runs of the same step differ."""
    sizes = models_of(device)
    batch_size, size = sizes.batch_size, sizes.image_size
    batch = memory_batch(batch_size, size, device)
    logits = torch.randn(batch_size, CLASSES, device=device)
    losses_: dict[str, tuple[Loss, Batch]] = {"label": (plain_loss, batch)}
    draws = torch.rand(batch_size, dtype=torch.float64, device=device)
    packed = Transform(CLASSES)
    fitted = packed.fitted(fit_basis(packed, torch.randn(2000, 64) @ torch.randn(64, CLASSES) / 4, 0))
    for codec in (Dense(CLASSES), fitted, TopK(CLASSES, 8)):
        records = codec.encode(3 * logits, batch.labels, draws)[:, None].clone()
        losses_[f"records, {codec.name}"] = (_distillation_loss(codec), replace(batch, teacher_records=records))

    def alone(loss: Loss, batch: Batch, repeat: int = 20) -> float:
        for _ in range(repeat):
            student = logits.clone().requires_grad_()
            values = loss(student, batch, 0)
            values["loss"].sum().backward()
            torch.stack(list(values.values())).detach().sum(dim=1)
        return repeat * batch_size

    works, steps = {}, {}
    for name, (loss, its_batch) in losses_.items():
        works[f"loss alone, {name}"] = partial(alone, loss, its_batch)
        one = learner(folder / name, sizes.student, loss, device, batch_size)
        steps[f"step, {name}"] = partial(train, one, [its_batch] * 8)
    again = learner(folder / "again", sizes.student, plain_loss, device, batch_size)
    steps["step, label, again"] = partial(train, again, [batch] * 8)  # how far the same differs from itself
    case = f"teaching in memory, {sizes.student}, {size} px, batch {batch_size}, {CLASSES} classes"
    references = dict.fromkeys(steps, "step, label")
    rows = in_turn(case, "images/s", {**works, **steps}, rounds=15, references=references)
    found = {row.what: row for row in rows}
    seconds = [1 / rate for rate in found["loss alone, label"].rates]
    for row in rows[1 : len(works)]:
        times = zip(row.rates, seconds, found["step, label"].rates, strict=True)
        added = statistics.median((1 / rate - label) * step for rate, label, step in times)
        row.limit = f"adds {100 * added:.1f} % to the step"

    online: dict[str, Callable[[], float]] = {"step, records, dense": steps["step, records, dense"]}
    dense = Dense(CLASSES)
    for name in sizes.teachers:
        network = probe.prepare(models.build_model(name, CLASSES), name, CLASSES, 64, "size")
        network = forward.to_device(network, device)
        one = learner(folder / f"online_{name}", sizes.student, _distillation_loss(dense), device, batch_size)
        teacher = OnlineRecords([network], dense, precision.automatic())
        online[f"step, online {name}"] = partial(train, one, [replace(batch) for _ in range(8)], teacher)
    return [*rows, *in_turn(case, "images/s", online, rounds=9)[1:]]


def _distillation_loss(codec: Codec) -> Loss:
    """The loss of a student that is distilled from one checkpoint."""
    words = ["--data.train=memory", "--model.name=resnet20", "--run_dir=-", "--epochs=1000"]
    config = load_config(DistillConfig, [*words, "--teacher.store=memory", "--teacher.checkpoints=[1]"])
    return DistillationLoss(config, [[codec]] * config.epochs, columns=[[0]] * config.epochs, weights=[1.0])

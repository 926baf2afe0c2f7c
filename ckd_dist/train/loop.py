"""THE train loop: teachers and students both run in it.

An epoch is a view of all images in a random order; a step is a batch for every learner; after an epoch all learners
are evaluated and saved. A run is a pure function of its configuration: step s trains on images that depend on
(seed, s) alone, so a run that was killed goes on from its last saved step and ends with the weights of one that never
was, bitwise on CPUs. Two runs on a GPU see the same images and draws, and differ by the rounding of its arithmetic.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NoReturn

import torch

from ckd_dist.core import dist
from ckd_dist.core.console import ProgressDisplay, format_seconds, say
from ckd_dist.core.process import StopRequest
from ckd_dist.data.batch import Batch
from ckd_dist.data.order import train_ids
from ckd_dist.data.pairs import PairMixing
from ckd_dist.nn.optim import image_size
from ckd_dist.train.evaluation import evaluate
from ckd_dist.train.learner import Learner
from ckd_dist.train.options import TrainConfig
from ckd_dist.train.records import OnlineRecords
from ckd_dist.train.schedule import EpochSchedule

if TYPE_CHECKING:
    from ckd_dist.data.loader import BetonLoader


def train_steps(
    learners: list[Learner],
    batches: Iterable[Batch],
    teacher: OnlineRecords | None = None,
    done: int = 0,
    mixing: PairMixing | None = None,
) -> Iterator[tuple[int, list[Learner]]]:
    """Each of the `batches`, after `done` steps, is a step of every learner that has not taken it yet; yields the
    number of steps done and who took the last one."""
    for batch in batches:
        if mixing is not None:
            batch = mixing(batch, done)
        if teacher is not None:
            batch.teacher_records, batch.teacher_maps = teacher(batch.images)
        done += 1
        active = [learner for learner in learners if learner.step < done]
        for learner in active:
            learner.train_step(batch)
        yield done, active


def fit(
    learners: list[Learner],
    loader: BetonLoader,
    val_loader: BetonLoader | None,
    config: TrainConfig,
    *,
    save_every: int,
    schedule: EpochSchedule,
) -> None:
    """Train `learners` side by side on what the `schedule` has for every epoch: each takes a step on every batch.
    Usually there is one.

    Learners that were saved at different steps by a kill meet again: one that is ahead waits for the batch it needs.
    SIGUSR2 or Ctrl-C makes rank 0 save after the step that it is at and end the process, see `StopRequest`. Only rank 0
    heeds it, alone: other ranks may be a step behind or ahead, and end when it is gone.
    """
    batch_size, steps_per_epoch = config.data.batch_size, learners[0].steps_per_epoch
    start = min(learner.step for learner in learners)
    clock = _Clock(loader)
    note, mixing = "", PairMixing.of(config.data, config.seed)
    images = config.epochs * steps_per_epoch * batch_size
    with StopRequest() as stop, ProgressDisplay(images, done=start * batch_size) as progress:
        for epoch in range(start // steps_per_epoch, config.epochs):
            first = max(start, epoch * steps_per_epoch)
            order = loader.epoch_ids(config.data, config.seed, epoch)
            ids = train_ids(order, batch_size // config.data.repeats, first - epoch * steps_per_epoch)
            inputs = schedule.inputs(epoch)
            size = image_size(epoch, start=config.data.start_image_size, final=loader.image_size, epochs=config.epochs)
            clock.restart()
            views = [loader.batches(ids, view, inputs.rows, size) for view in inputs.views]
            batches = map(Batch.joined, zip(*views, strict=True))
            for done, active in train_steps(learners, batches, inputs.teacher, first, mixing):
                epoch_ends = done % steps_per_epoch == 0
                save = done % config.save_last_every == 0 and not epoch_ends
                if done % config.log_every == 0 or epoch_ends or save:
                    seconds, waited = clock.lap()
                    for learner in active:
                        values = learner.log(seconds, waited)
                        note = f"loss {values['loss']:.3f}"
                        if "top1" in values:
                            note += f"  top1 {values['top1']:.1f}"
                if save:
                    for learner in active:
                        learner.check_weights()
                        learner.save_last()
                    clock.restart()
                if stop.signal and dist.rank() == 0 and not epoch_ends:
                    _save_and_stop(active, stop)
                progress.update(done * batch_size, f"epoch {epoch + 1}/{config.epochs}", note)
            evaluated = (epoch + 1) % config.val_every == 0 or epoch + 1 == config.epochs
            _end_epoch(active, epoch + 1, config, val_loader if evaluated else None, (epoch + 1) % save_every == 0)
            if stop.signal and dist.rank() == 0 and epoch + 1 < config.epochs:
                _save_and_stop([], stop)  # all is saved
        for learner in learners:
            learner.write_summary(side_by_side=len(learners))


def _end_epoch(
    learners: list[Learner], epoch: int, config: TrainConfig, val_loader: BetonLoader | None, keep: bool
) -> None:
    """Evaluate if there is a loader, keep the weights if it is their turn, and save what resume needs, in this order: a
    kill in between repeats all of it."""
    for learner in learners:
        learner.check_weights()
    if val_loader is not None:
        figures = evaluate(
            {name: m for learner in learners for name, m in learner.models.items()}, val_loader, config.amp
        )
        for learner in learners:
            kept, *raw = (figures[name] for name in learner.models)
            learner.evaluation = {**kept, **{f"raw_{key}": value for each in raw for key, value in each.items()}}
            learner.run.log("val", learner.step, epoch - 1, **learner.evaluation)
        shown = [
            f"{key} {_span([learner.evaluation[key] for learner in learners])}"
            for key in ("top1", "top5", "loss", "raw_top1")
            if key in learners[0].evaluation
        ]
        trained = format_seconds(learners[0].seconds)
        say(f"epoch {epoch}/{config.epochs}  val {'  '.join(shown)}  ({trained} of training)")
    for learner in learners:
        if val_loader is None:
            learner.evaluation = {}  # what there is is of other weights
        if keep or epoch == config.epochs:
            learner.save_checkpoint(epoch)
        learner.save_last()


def _save_and_stop(learners: list[Learner], stop: StopRequest) -> NoReturn:
    for learner in learners:
        learner.check_weights()
        learner.save_last()
    say(f"stopped by {stop.name} and saved: the same command goes on (exit status {stop.status})")
    raise SystemExit(stop.status)


def _span(values: list[float]) -> str:
    """Least and most of what learners reached, or the one's value."""
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low} to {high}"


class _Clock:
    """Seconds of training, evaluation and saving left out, and of waiting for data among them."""

    def __init__(self, loader: BetonLoader):
        self._loader = loader
        self.restart()

    def restart(self) -> None:
        """Forget what has passed."""
        self._time, self._waited = time.perf_counter(), self._loader.seconds_waited

    def lap(self) -> tuple[float, float]:
        """(seconds, seconds waited) since the last lap or restart."""
        if self._loader.device.type == "cuda":
            torch.cuda.synchronize()
        time_, waited = self._time, self._waited
        self.restart()
        return self._time - time_, self._waited - waited

"""THE train loop and THE evaluation loop: teacher and student both run in them.

A run is a pure function of its configuration: step s trains on images that depend on (seed, s) alone, so a run that
was killed goes on from its last saved step and ends with the weights of one that never was, bitwise on CPUs. Two runs
on a GPU see the same images and draws, and differ by the rounding of its arithmetic.
"""

from __future__ import annotations

import inspect
import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ckd_dist import checkpoint, dist, losses
from ckd_dist.config import TrainConfig, TrainingError, require
from ckd_dist.data import Batch, Rows, train_ids
from ckd_dist.log import ProgressDisplay, format_seconds, say
from ckd_dist.models import load_fitting
from ckd_dist.optim import MovingAverage, build_optimizer, image_size, learning_rate
from ckd_dist.process import StopRequest
from ckd_dist.run_folder import RunFolder
from ckd_dist.store.codecs import Dense

if TYPE_CHECKING:
    from ckd_dist.loader import BetonLoader  # any source of batches will do: what is below needs no FFCV

Loss = Callable[[torch.Tensor, Batch, int], dict[str, torch.Tensor]]
"""(logits [n, classes], batch, epoch) -> values of [n]; `loss` is minimised, the others are logged."""

OnlineTeacher = Callable[[torch.Tensor], torch.Tensor]
"""images of a batch -> records of its members, uint8 [n, members, bytes]."""


@dataclass(frozen=True)
class Source:
    """What an epoch trains on: a view of the images, and where the teacher's records of it come from, if anywhere."""

    view: int
    rows: Rows | None = None
    """Fetches records from a store."""
    teacher: OnlineTeacher | None = None
    """Makes them at every step."""


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Mixed precision as `--amp` asks: bfloat16, float16 or off."""
    return torch.autocast(device.type, getattr(torch, amp, None), enabled=amp != "off")


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on the device in channels_last order, ready for inference."""
    return model.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)


@torch.inference_mode()
def forward_logits(model: nn.Module, images: torch.Tensor, amp: str) -> torch.Tensor:
    """Logits of a model in eval mode, float32 [n, classes], without gradients."""
    with autocast(images.device, amp):
        return model(images).float()


@torch.inference_mode()
def forward_features(model: nn.Module, layer: str, images: torch.Tensor, amp: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(output of the module `layer` in the type of `amp`, logits in float32) of a model in eval mode."""
    found: list[torch.Tensor] = []
    hook = model.get_submodule(layer).register_forward_hook(lambda module, inputs, output: found.append(output))
    try:
        logits = forward_logits(model, images, amp)
    finally:
        hook.remove()
    return found[0], logits


def online_records(members: list[nn.Module], codec: Dense, amp: str, images: torch.Tensor) -> torch.Tensor:
    """Records of an online teacher's members, uint8 [n, members, bytes]: their logits, rounded as the dense store
    rounds them, so that cached and online teachers give the same numbers."""
    records = [codec.encode(forward_logits(member, images, amp)) for member in members]
    return torch.stack(records, dim=1).clone()  # made outside inference mode: autograd may save it


# ------------------------------------------------------------------------------------------- evaluation


def evaluate(models: Mapping[str, nn.Module], loader: BetonLoader, amp: str) -> dict[str, dict[str, float]]:
    """`top1` and `top5` in percent and the mean `loss` of each of the named models over every image of the file, each
    image decoded and counted once.

    Collective: each rank takes a contiguous share; rank 0's batch-norm statistics count for all. Raises
    `TrainingError`, on every rank, that names a model whose logits are not finite: they have no largest.
    """
    were_training = [model.training for model in models.values()]
    for model in models.values():
        dist.broadcast_tensors(model.buffers())
        model.eval()
    count = loader.info.count
    sums = torch.zeros(len(models), 4, dtype=torch.float64, device=loader.device)
    for batch in loader.batches(np.array_split(np.arange(count), dist.world_size())[dist.rank()]):
        for m, model in enumerate(models.values()):
            logits = forward_logits(model, batch.images, amp)
            hits = logits.topk(min(5, logits.shape[1])).indices.eq(batch.labels[:, None])
            loss = losses.cross_entropy(logits, batch.labels).sum()
            sums[m, :3] += torch.stack([hits[:, 0].sum(), hits.sum(), loss])
        sums[:, 3] += len(batch.labels)
    for model, was_training in zip(models.values(), were_training, strict=True):
        model.train(was_training)
    results = {}
    for name, (top1, top5, loss_sum, seen) in zip(models, dist.all_reduce_sum(sums).tolist(), strict=True):
        assert seen == count
        if not math.isfinite(loss_sum):
            raise TrainingError(f"{name}: its logits of {loader.info.path} are not finite{_FLOAT16[amp == 'float16']}")
        results[name] = {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss_sum / count}
    return results


_FLOAT16 = ("", ", perhaps since float16 cannot hold them: try --amp off")


# ------------------------------------------------------------------------------------------- training


class Learner:
    """A model in training: its optimiser, loss and run folder. Holds all that exact resume needs."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        loss: Loss,
        run: RunFolder,
        device: torch.device,
        metadata: dict,
        steps_per_epoch: int,
    ):
        self.config, self.loss, self.run, self.device = config, loss, run, device
        self.metadata, self.steps_per_epoch = metadata, steps_per_epoch
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "float16")
        self.step = 0
        self.seconds = self.seconds_waited = 0.0
        self.evaluation: dict[str, float] = {}
        self._sums: list[torch.Tensor] = []
        self._names: list[str] = []
        self.averaged = MovingAverage(self.model, config.ema_decay) if config.ema_decay is not None else None
        self._load_last()
        self.model.train()
        self._forward: Callable[[torch.Tensor], torch.Tensor] = self.model
        if dist.world_size() > 1:
            # Batch-norm statistics need no broadcast at every step: a forward pass in train mode does not read them.
            known = inspect.signature(DistributedDataParallel).parameters
            sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            self._forward = DistributedDataParallel(
                self.model,
                device_ids=[device.index] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **{sync_buffers: False},  # type: ignore[arg-type]
            )
        if config.compile:
            self._forward = torch.compile(self._forward, dynamic=False)

    @property
    def models(self) -> dict[str, nn.Module]:
        """What there is to evaluate, each by a name: first the model to keep, the average of the weights if one
        is asked for, then the weights themselves."""
        if self.averaged is None:
            return {str(self.run.path): self.model}
        return {f"{self.run.path}, averaged": self.averaged.module, f"{self.run.path}, not averaged": self.model}

    def train_step(self, batch: Batch) -> None:
        """One optimiser step on this rank's part of the global batch."""
        config, step = self.config, self.step
        rate = learning_rate(step, config.optim, steps_per_epoch=self.steps_per_epoch, epochs=config.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(hash((config.seed, step, dist.rank())) % 2**63)  # dropout, the same after a resume
        with autocast(self.device, config.amp):
            logits = self._forward(batch.images)
        logits = logits.float()
        values = self.loss(logits, batch, step // self.steps_per_epoch)
        # DDP averages over ranks, so this is the gradient of the mean over the global batch, however it is shared out.
        loss = values["loss"].sum() * (dist.world_size() / config.data.batch_size)
        self.scaler.scale(loss).backward()
        if config.optim.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), config.optim.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.averaged is not None:
            self.averaged.update(step + 1)
        with torch.no_grad():
            values["top1"] = batch.top1(logits.argmax(dim=1))
            self._names = list(values)
            # It stays on the device: the host waits for it only when a log line is due.
            self._sums.append(torch.stack(list(values.values())).sum(dim=1))
        self.step += 1

    def log(self, seconds: float, waited: float) -> dict[str, float]:
        """Write the mean of every value over the steps since the last line, which took `seconds`, `waited` of them for
        data; collective. Raises `TrainingError` on every rank when the loss was not finite on any."""
        sums = torch.stack(self._sums).double()  # [steps, values]
        count = len(sums) * self.config.data.batch_size
        totals = dist.all_reduce_sum(sums.sum(dim=0)).tolist()
        self._sums = []
        values = {name: total / count for name, total in zip(self._names, totals, strict=True)}
        if not np.isfinite(values["loss"]):
            bad = (~sums[:, self._names.index("loss")].isfinite()).nonzero().flatten().tolist()
            first = min(dist.gather_objects(min(bad, default=len(sums))))
            self._stop(f"the loss is not finite at step {self.step - len(sums) + first}")
        self.seconds += seconds
        self.seconds_waited += waited
        self.run.log(
            "train",
            self.step,
            (self.step - 1) // self.steps_per_epoch,
            **values,
            lr=self.optimizer.param_groups[0]["lr"],
            seconds=seconds,
            images_per_s=count / seconds,
            data_wait_fraction=waited / seconds,
        )
        return values

    def _stop(self, reason: str) -> NoReturn:
        kept = sorted((self.run.path / "checkpoints").glob("*.pt"), key=lambda path: path.stat().st_mtime)
        last = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was saved yet"
        raise TrainingError(f"{reason}: lower --optim.lr or set --optim.clip_grad_norm; {last}")

    # -------------------------------------------------------------------------------------- saving

    def check_weights(self) -> None:
        """Raise `TrainingError`, on every rank, unless every weight is finite: nothing else is ever saved."""
        norms = torch.stack(torch._foreach_norm([p.detach() for p in self.model.parameters()]))
        if not torch.isfinite(norms).all():
            self._stop(f"the weights are not finite after step {self.step}")

    def save_last(self) -> None:
        """Save all that exact resume needs."""
        if dist.rank() == 0:
            state = {
                "weights": self.model.state_dict(),
                "averaged": self.averaged.module.state_dict() if self.averaged is not None else None,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "step": self.step,
                "seconds": self.seconds,
                "seconds_waited": self.seconds_waited,
                "evaluation": self.evaluation,
            }
            checkpoint.save(self.run.path / "checkpoints" / "last.pt", state)

    def _load_last(self) -> None:
        path = self.run.path / "checkpoints" / "last.pt"
        if not dist.on_main(path.exists):
            self.run.rewind(0)
            return
        mend = "remove it, and the run starts anew"
        state = checkpoint.load(path, "run_dir", checkpoint.TrainingState, mend)
        last, why = self.config.epochs * self.steps_per_epoch, ""
        try:
            load_fitting(self.model, state["weights"], "it", self.config.model.name)
            if self.averaged is not None:
                self.averaged.module.load_state_dict(state["averaged"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
        except Exception as error:  # torch raises many kinds here
            why = " ".join(str(error).split())[:200]
        require(not why, f"run_dir: {path} is not of this run ({why}): {mend}")
        require(state["step"] <= last, f"run_dir: {path} is of step {state['step']}, this run has {last}: {mend}")
        self.step, self.evaluation = state["step"], state["evaluation"]
        self.seconds, self.seconds_waited = state["seconds"], state["seconds_waited"]
        self.run.rewind(self.step)
        say(f"{self.run.path}: going on after step {self.step} (epoch {self.step / self.steps_per_epoch:.2f})")

    def save_checkpoint(self, epoch: int) -> None:
        """Keep the weights after `epoch` epochs, with the metadata to use them alone."""
        if dist.rank() == 0:
            metadata = {**self.metadata, "epoch": epoch, "evaluation": self.evaluation}
            kept = next(iter(self.models.values()))
            state = {"weights": kept.state_dict(), "metadata": metadata}
            checkpoint.save(checkpoint.checkpoint_path(self.run.path, epoch), state)

    def write_summary(self, side_by_side: int) -> None:
        """Write summary.json: the last evaluation, never a best one, and what the training took; its seconds are those
        of all the learners that were trained `side_by_side`."""
        images = self.step * self.config.data.batch_size
        on_gpu = self.device.type == "cuda"
        memory = (
            torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        self.run.write_summary(
            {
                **self.evaluation,
                "train_seconds": self.seconds,
                "side_by_side": side_by_side,
                "images_per_s": images / self.seconds,
                "data_wait_fraction": self.seconds_waited / self.seconds,
                "peak_memory_bytes": memory,
                "epochs": self.config.epochs,
                "steps": self.step,
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "world_size": dist.world_size(),
            }
        )


def train_steps(
    learners: list[Learner], batches: Iterable[Batch], teacher: OnlineTeacher | None = None, done: int = 0
) -> Iterator[tuple[int, list[Learner]]]:
    """Each of the `batches`, after `done` steps, is a step of every learner that has not taken it yet; yields the
    number of steps done and who took the last one."""
    for batch in batches:
        if teacher is not None:
            batch.teacher_records = teacher(batch.images)
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
    source: Callable[[int], Source],
) -> None:
    """Train `learners` side by side on the `source` of every epoch: each takes a step on every batch. Usually there is
    one.

    Learners that were saved at different steps by a kill meet again: one that is ahead waits for the batch it needs.
    SIGUSR2 or Ctrl-C makes rank 0 save after the step that it is at and end the process, see `StopRequest`. Only rank 0
    heeds it, alone: other ranks may be a step behind or ahead, and end when it is gone.
    """
    batch_size, steps_per_epoch = config.data.batch_size, learners[0].steps_per_epoch
    start = min(learner.step for learner in learners)
    clock = _Clock(loader)
    note = ""
    images = config.epochs * steps_per_epoch * batch_size
    with StopRequest() as stop, ProgressDisplay(images, done=start * batch_size) as progress:
        for epoch in range(start // steps_per_epoch, config.epochs):
            first = max(start, epoch * steps_per_epoch)
            order = loader.epoch_ids(config.data, config.seed, epoch)
            ids = train_ids(order, batch_size, first - epoch * steps_per_epoch)
            now = source(epoch)
            size = image_size(epoch, start=config.data.start_image_size, final=loader.image_size, epochs=config.epochs)
            clock.restart()
            for done, active in train_steps(
                learners, loader.batches(ids, now.view, now.rows, size), now.teacher, first
            ):
                epoch_ends = done % steps_per_epoch == 0
                save = done % config.save_last_every == 0 and not epoch_ends
                if done % config.log_every == 0 or epoch_ends or save:
                    seconds, waited = clock.lap()
                    for learner in active:
                        values = learner.log(seconds, waited)
                        note = f"loss {values['loss']:.3f}  top1 {values['top1']:.1f}"
                if save:
                    for learner in active:
                        learner.check_weights()
                        learner.save_last()
                    clock.restart()
                if stop.signal and dist.rank() == 0 and not epoch_ends:
                    _save_and_stop(active, stop)
                progress.update(done * batch_size, f"epoch {epoch + 1}/{config.epochs}", note)
            _end_epoch(active, epoch + 1, config, val_loader, keep=(epoch + 1) % save_every == 0)
            if stop.signal and dist.rank() == 0 and epoch + 1 < config.epochs:
                _save_and_stop([], stop)  # all is saved
        for learner in learners:
            learner.write_summary(side_by_side=len(learners))


def _end_epoch(
    learners: list[Learner], epoch: int, config: TrainConfig, val_loader: BetonLoader | None, keep: bool
) -> None:
    """Evaluate, keep the weights if it is their turn, and save what resume needs, in this order: a kill in between
    repeats all of it."""
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

"""A model in training: one optimiser step, and all that exact resume needs."""

from __future__ import annotations

import inspect
import resource
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ckd_dist.core import checkpoint, dist
from ckd_dist.core.console import say
from ckd_dist.core.errors import TrainingError, require
from ckd_dist.core.run_folder import RunFolder
from ckd_dist.data.batch import Batch
from ckd_dist.nn.forward import autocast, auxiliary_logits, logits_of
from ckd_dist.nn.optim import MovingAverage, build_optimizer, learning_rate, parameter_groups
from ckd_dist.nn.review import ReviewingStudent, review_loss, warm_up
from ckd_dist.nn.weights import load_fitting
from ckd_dist.train.options import TrainConfig

Loss = Callable[[torch.Tensor, Batch, int], dict[str, torch.Tensor]]
"""(logits [n, classes], batch, epoch) -> values of [n]; `loss` is minimised, the others are logged."""


# ------------------------------------------------------------------------------------------- training


class Learner:
    """A model in training: its optimiser, loss and run folder. Holds all that exact resume needs.

    `trained` is what goes through a step: the model, or a student with its connectors, of which `model` is kept alone.
    """

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
        self.trained = model.to(device).to(memory_format=torch.channels_last)
        self.reviewing = self.trained if isinstance(self.trained, ReviewingStudent) else None
        self.model = self.reviewing.student if self.reviewing else self.trained
        self.optimizer = build_optimizer(self.model, config.optim)
        if self.reviewing:
            for group in parameter_groups(self.reviewing.connectors, config.optim):
                self.optimizer.add_param_group(group)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "float16")
        self.step = 0
        self.seconds = self.seconds_waited = 0.0
        self.evaluation: dict[str, float] = {}
        self._sums: list[torch.Tensor] = []
        self._names: list[str] = []
        self.averaged = MovingAverage(self.model, config.ema_decay) if config.ema_decay is not None else None
        self._load_last()
        self.trained.train()
        self._forward: Callable[[torch.Tensor], Any] = self.trained
        self._gradients_stay: Callable[[], AbstractContextManager] = nullcontext
        if dist.world_size() > 1:
            # Batch-norm statistics need no broadcast at every step: a forward pass in train mode does not read them.
            known = inspect.signature(DistributedDataParallel).parameters
            sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            self._forward = parallel = DistributedDataParallel(
                self.trained,
                device_ids=[device.index] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **{sync_buffers: False},  # type: ignore[arg-type]
            )
            self._gradients_stay = parallel.no_sync
        if config.compile:
            mode = config.compile if isinstance(config.compile, str) else None
            self._forward = torch.compile(self._forward, dynamic=False, mode=mode)

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
            group["lr"] = rate * group.get("lr_scale", 1.0)
        torch.manual_seed(hash((config.seed, step, dist.rank())) % 2**63)  # dropout, the same after a resume
        *parts, last = batch.parts(config.accumulate)
        with self._gradients_stay():
            sums = [self._add_gradient(part) for part in parts]
        sums.append(self._add_gradient(last))
        if config.optim.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.trained.parameters(), config.optim.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.averaged is not None:
            self.averaged.update(step + 1)
        # It stays on the device: the host waits for it only when a log line is due.
        self._sums.append(torch.stack(sums).sum(dim=0))
        self.step += 1

    def _add_gradient(self, batch: Batch) -> torch.Tensor:
        """Add the gradient of the loss of a part of the global batch; the sums of what is logged, float32 [values]."""
        config, epoch = self.config, self.step // self.steps_per_epoch
        with autocast(self.device, config.amp):
            output = self._forward(batch.images)
        output, maps = output if self.reviewing else (output, [])
        logits = logits_of(output).float()
        values = self.loss(logits, batch, epoch)
        if config.model.auxiliary_weight:
            for other in auxiliary_logits(output):
                auxiliary = self.loss(other.float(), batch, epoch)["loss"]
                values["loss"] = values["loss"] + config.model.auxiliary_weight * auxiliary
        if self.reviewing:
            values["feature"] = review_loss(maps, batch.teacher_maps)
            weight = self.reviewing.weight * warm_up(epoch, config.epochs)
            values["loss"] = values["loss"] + weight * values["feature"]
        # DDP averages over ranks, so this is the gradient of the mean over the global batch, however it is shared out.
        loss = values["loss"].sum() * (dist.world_size() / config.data.batch_size)
        self.scaler.scale(loss).backward()
        with torch.no_grad():
            if batch.labelled:
                values["top1"] = batch.top1(logits.argmax(dim=1))
            self._names = list(values)
            return torch.stack(list(values.values())).sum(dim=1)

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
        norms = torch.stack(torch._foreach_norm([p.detach() for p in self.trained.parameters()]))
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
            if self.reviewing:
                state["connectors"] = self.reviewing.connectors.state_dict()
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
            if self.reviewing:
                self.reviewing.connectors.load_state_dict(state["connectors"])
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

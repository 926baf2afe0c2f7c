"""Probes of the features of a teacher's checkpoints, and their training."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ckd_dist.core import checkpoint, dist
from ckd_dist.core.console import ProgressDisplay, say
from ckd_dist.core.errors import require
from ckd_dist.data import dataset, order
from ckd_dist.data.batch import Batch
from ckd_dist.data.dataset import DatasetInfo
from ckd_dist.data.loader import BetonLoader
from ckd_dist.nn import forward, models, probe
from ckd_dist.nn.features import FeatureLayer, feature_layer
from ckd_dist.selection import mi
from ckd_dist.selection.options import SelectConfig

FIRST_VIEW = 1 << 21
"""Probes see views that neither the teacher nor a student is trained on."""
SAVE_EVERY = 100
"""Steps between saves of the probes."""


@dataclass
class Trajectory:
    """A teacher's checkpoints, frozen, on the device."""

    models: dict[int, nn.Module]
    weights_sha256: dict[int, str]
    metadata: dict
    """Of the last of them."""
    layer: FeatureLayer
    """Whose output is F."""
    image_size: int
    mean: torch.Tensor
    """With which the teacher's images are normalised, float [3, 1, 1] on the device."""
    std: torch.Tensor

    def pixels(self, batch: Batch) -> torch.Tensor:
        """The images in [0, 1], float [n, 3, size, size]."""
        return (batch.images * self.std + self.mean).clamp(0, 1)

    def features(self, epoch: int, images: torch.Tensor, amp: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(F, a map in the type of `amp`; logits in float32) of a checkpoint."""
        output, logits = forward.forward_features(self.models[epoch], self.layer.name, images, amp)
        return self.layer.to_map(output), logits


def load_trajectory(config: SelectConfig, device: torch.device) -> Trajectory:
    """The checkpoints that the options name; raises `UserError` for an unknown layer."""
    files = checkpoint.trajectory(config.teacher.run, "teacher.run")
    epochs = checkpoint.choose(files, sorted(config.teacher.checkpoints) or list(files), "teacher.checkpoints")
    teachers, weights = {}, {}
    for epoch in epochs:
        model, metadata = models.load_model(files[epoch], "teacher.run", config.teacher.model)
        weights[epoch] = checkpoint.weights_sha256(model.state_dict())
        teachers[epoch] = forward.to_device(model, device)
    image_size, num_classes = config.data.image_size or metadata["image_size"], metadata["num_classes"]
    first = teachers[epochs[0]]
    student = models.build_model(config.student, num_classes).to(device)  # whose cost is measured in the end
    for model, name, train_images in ((first, metadata["model"], 0), (student, config.student, 2)):
        probe.require_fits(model, name, num_classes, image_size, "data.image_size", train_images=train_images)
    layer = feature_layer(first, image_size, config.layer)
    mean, std = (torch.tensor(metadata[key], device=device).view(3, 1, 1) for key in ("mean", "std"))
    return Trajectory(teachers, weights, metadata, layer, image_size, mean, std)


def probe_loader(
    config: SelectConfig, trajectory: Trajectory, info: DatasetInfo, recipe, batch_size: int
) -> BetonLoader:
    """Images as the teacher sees them, in batches of `batch_size` on this process, by the view `recipe`."""
    mean, std = (tuple(values.flatten().tolist()) for values in (trajectory.mean, trajectory.std))
    return BetonLoader(
        info,
        config.data,
        recipe,
        batch_size=batch_size,
        image_size=trajectory.image_size,
        device=trajectory.mean.device,
        view_seed=config.seed,
        mean=mean,
        std=std,
    )


# ------------------------------------------------------------------------------------------- probes


class ProbeTraining:
    """The probes of all checkpoints, trained together, each image decoded once; goes on where a kill stopped it."""

    def __init__(self, config: SelectConfig, trajectory: Trajectory, info: DatasetInfo):
        self._config, self._trajectory, self._info = config, trajectory, info
        self._path = Path(config.run_dir) / "probes.pt"
        device = trajectory.mean.device
        self.probes: dict[int, mi.Probes] = {}
        for epoch in trajectory.models:
            torch.manual_seed(config.seed)  # the same for all checkpoints: a fair start
            probes = mi.Probes(trajectory.layer.channels, info.num_classes, config.probe.repeats).to(device)
            self.probes[epoch] = probes.to(memory_format=torch.channels_last).train()
        self._parameters = [p for probes in self.probes.values() for p in probes.parameters()]
        self._optimizer = torch.optim.Adam(self._parameters, lr=config.probe.lr)
        self._colour_sum = torch.zeros(3, dtype=torch.float64, device=device)
        self.step = 0
        self.seconds = 0.0
        if dist.on_main(self._path.exists):
            self._load()

    @property
    def mean_colour(self) -> torch.Tensor:
        """Of the images seen, float64 [3]; collective."""
        return dist.all_reduce_sum(self._colour_sum.clone()) / (self.step * self._config.data.batch_size)

    def run(self) -> None:
        """Train to the last step. Collective: ranks share every batch and add up their gradients."""
        config, started = self._config, time.perf_counter() - self.seconds
        batches = self._batches()
        with ProgressDisplay(config.probe.steps, unit="steps", done=self.step) as progress:
            while self.step < config.probe.steps:
                self._train_step(next(batches))
                progress.update(self.step, "probes")
                if self.step % SAVE_EVERY == 0 or self.step == config.probe.steps:
                    self._merge_statistics()
                    self.seconds = time.perf_counter() - started
                    if self.step < config.probe.steps:
                        self._save()
        batches.close()

    def _batches(self) -> Generator[Batch, None, None]:
        config, info = self._config, self._info
        batch_size = config.data.batch_size
        require(batch_size <= info.count, f"data.batch_size {batch_size} is larger than the {info.count} images")
        share, recipe = order.rank_share(batch_size), dataset.train_recipe(config.data, info)
        require(not recipe.mixes, "data.mixup and data.cutmix are not for select_teacher: its images have one label")
        loader = probe_loader(config, self._trajectory, info, recipe, share.stop - share.start)
        epoch, first = divmod(self.step, info.count // batch_size)
        while True:
            ids = order.train_ids(order.shuffled_ids(info.count, config.seed, epoch), batch_size, first)
            yield from loader.batches(ids, FIRST_VIEW + epoch)
            epoch, first = epoch + 1, 0

    def _train_step(self, batch: Batch) -> None:
        config, trajectory = self._config, self._trajectory
        pixels = trajectory.pixels(batch)
        self._colour_sum += pixels.mean((2, 3)).sum(0)
        for group in self._optimizer.param_groups:
            group["lr"] = config.probe.lr * 0.5 * (1 + math.cos(math.pi * self.step / config.probe.steps))
        for epoch in trajectory.models:
            features, _ = trajectory.features(epoch, batch.images, config.amp)
            with forward.autocast(pixels.device, config.amp):
                # Made outside inference mode: autograd may save the copy.
                reconstruction, cross_entropy = self.probes[epoch](features.clone(), pixels, batch.labels)
            ((reconstruction + cross_entropy).sum() / config.data.batch_size).backward()
        _sum_gradients(self._parameters)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def _merge_statistics(self) -> None:
        """Give all ranks the batch-norm statistics of all ranks' images."""
        for probes in self.probes.values():
            for buffer in probes.buffers():
                if buffer.is_floating_point():
                    dist.all_reduce_sum(buffer).div_(dist.world_size())

    def _save(self) -> None:
        colour_sum = dist.all_reduce_sum(self._colour_sum.clone())
        if dist.rank() == 0:
            state = {
                "probes": {epoch: probes.state_dict() for epoch, probes in self.probes.items()},
                "optimizer": self._optimizer.state_dict(),
                "colour_sum": colour_sum,
                "step": self.step,
                "seconds": self.seconds,
            }
            checkpoint.save(self._path, state)

    def _load(self) -> None:
        state = checkpoint.load(self._path, "run_dir")
        for epoch, probes in self.probes.items():
            probes.load_state_dict(state["probes"][epoch])
        self._optimizer.load_state_dict(state["optimizer"])
        self._colour_sum += state["colour_sum"].to(self._colour_sum.device) if dist.rank() == 0 else 0
        self.step, self.seconds = state["step"], state["seconds"]
        say(f"{self._config.run_dir}: going on after step {self.step} of the probes")

    def discard(self) -> None:
        """Delete what resume needs; on rank 0."""
        self._path.unlink(missing_ok=True)


def _sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Add up the gradients of all ranks, in one message."""
    if dist.world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = dist.all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))

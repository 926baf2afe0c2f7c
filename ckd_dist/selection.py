"""Probe the features of a teacher's checkpoints, and choose the one that teaches: the work of `select_teacher`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ckd_dist import checkpoint, data, dist, engine, mi, models
from ckd_dist.config import LoaderConfig, SelectConfig, TrainingError, require
from ckd_dist.data import Batch, DatasetInfo
from ckd_dist.loader import BetonLoader
from ckd_dist.log import ProgressDisplay, say
from ckd_dist.results import Candidate, FixedChoices, Selection, read_selection

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
    layer: str
    """Module whose output is F."""
    channels: int
    """Of F."""
    image_size: int
    mean: torch.Tensor
    """With which the teacher's images are normalised, float [3, 1, 1] on the device."""
    std: torch.Tensor

    def pixels(self, batch: Batch) -> torch.Tensor:
        """The images in [0, 1], float [n, 3, size, size]."""
        return (batch.images * self.std + self.mean).clamp(0, 1)


def load_trajectory(config: SelectConfig, device: torch.device) -> Trajectory:
    """The checkpoints that the options name; raises `UserError` for an unknown layer."""
    files = checkpoint.trajectory(config.teacher.run, "teacher.run")
    epochs = checkpoint.choose(files, sorted(config.teacher.checkpoints) or list(files), "teacher.checkpoints")
    teachers, weights = {}, {}
    for epoch in epochs:
        model, metadata = models.load_model(files[epoch], "teacher.run")
        weights[epoch] = checkpoint.weights_sha256(model.state_dict())
        teachers[epoch] = engine.to_device(model, device)
    image_size, num_classes = config.data.image_size or metadata["image_size"], metadata["num_classes"]
    first = teachers[epochs[0]]
    student = models.build_model(config.student, num_classes).to(device)  # whose cost is measured in the end
    for model, name, train_images in ((first, metadata["model"], 0), (student, config.student, 2)):
        models.require_fits(model, name, num_classes, image_size, "data.image_size", train_images=train_images)
    layer = config.layer or models.feature_layer(first, image_size)
    names = [name for name, _ in first.named_modules() if name]
    require(layer in names, f"layer: the teacher has no module {layer}; it has {', '.join(names[:40])}")
    features, _ = engine.forward_features(first, layer, torch.zeros(1, 3, image_size, image_size, device=device), "off")
    require(features.ndim == 4, f"layer: {layer} gives {tuple(features.shape[1:])} an image, not channels x h x w")
    mean, std = (torch.tensor(metadata[key], device=device).view(3, 1, 1) for key in ("mean", "std"))
    return Trajectory(teachers, weights, metadata, layer, features.shape[1], image_size, mean, std)


def _loader(config: SelectConfig, trajectory: Trajectory, info: DatasetInfo, recipe, batch_size: int) -> BetonLoader:
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
            probes = mi.Probes(trajectory.channels, info.num_classes, config.probe.repeats).to(device)
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
        share, recipe = data.rank_share(batch_size), data.train_recipe(config.data, info)
        require(not recipe.mixes, "data.mixup and data.cutmix are not for select_teacher: its images have one label")
        loader = _loader(config, self._trajectory, info, recipe, share.stop - share.start)
        epoch, first = divmod(self.step, info.count // batch_size)
        while True:
            ids = data.train_ids(data.shuffled_ids(info.count, config.seed, epoch), batch_size, first)
            yield from loader.batches(ids, FIRST_VIEW + epoch)
            epoch, first = epoch + 1, 0

    def _train_step(self, batch: Batch) -> None:
        config, trajectory = self._config, self._trajectory
        pixels = trajectory.pixels(batch)
        self._colour_sum += pixels.mean((2, 3)).sum(0)
        for group in self._optimizer.param_groups:
            group["lr"] = config.probe.lr * 0.5 * (1 + math.cos(math.pi * self.step / config.probe.steps))
        for epoch, model in trajectory.models.items():
            features, _ = engine.forward_features(model, trajectory.layer, batch.images, config.amp)
            with engine.autocast(pixels.device, config.amp):
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


@dataclass
class Estimates:
    """What held-out images tell of one checkpoint."""

    image: list[float]
    """I(X;F) in nats a pixel value, one value a probe."""
    label: list[float]
    """I(Y;F) in nats, one value a probe."""
    logits: dict[str, float]
    """Scores of the logits alone: top1, entropy, calibration_error, conditional_mutual_information."""


@torch.no_grad()
def estimate(
    config: SelectConfig,
    trajectory: Trajectory,
    probes: dict[int, mi.Probes],
    mean_colour: torch.Tensor,
    held_out: DatasetInfo,
) -> tuple[dict[int, Estimates], dict[str, float]]:
    """Score the probes on held-out images: (epoch -> estimates, the constants `label_entropy` and `mean_colour_loss`).
    Collective: each rank takes a contiguous share."""
    loader = _loader(
        config, trajectory, held_out, data.eval_recipe(held_out, config.data.augment), config.data.batch_size
    )
    epochs = list(trajectory.models)
    device = trajectory.mean.device
    losses = torch.zeros(len(epochs), config.probe.repeats, 2, dtype=torch.float64, device=device)
    colour_sum = torch.zeros_like(mean_colour)
    logits: dict[int, list[torch.Tensor]] = {epoch: [] for epoch in epochs}
    labels: list[torch.Tensor] = []
    for each in probes.values():
        each.eval()
    for batch in loader.batches(np.array_split(np.arange(held_out.count), dist.world_size())[dist.rank()]):
        pixels = trajectory.pixels(batch)
        colour_sum += pixels.mean((2, 3)).sum(0)
        labels.append(batch.labels.cpu())
        for e, epoch in enumerate(epochs):
            features, answers = engine.forward_features(
                trajectory.models[epoch], trajectory.layer, batch.images, config.amp
            )
            logits[epoch].append(answers.cpu())
            with engine.autocast(device, config.amp):
                both = probes[epoch](features, pixels, batch.labels)
            losses[e] += torch.stack(both, dim=1).sum(2)
    losses = dist.all_reduce_sum(losses).cpu() / held_out.count
    held_out_mean = dist.all_reduce_sum(colour_sum) / held_out.count
    everyones_labels = _gather(labels)
    constants = {
        "label_entropy": mi.label_entropy(np.bincount(everyones_labels.numpy(), minlength=held_out.num_classes)),
        "mean_colour_loss": mi.mean_colour_loss(mean_colour, held_out_mean),
    }
    last = _gather(logits[epochs[-1]])
    found = {}
    for e, epoch in enumerate(epochs):
        everyones = _gather(logits.pop(epoch))
        found[epoch] = Estimates(
            image=(constants["mean_colour_loss"] - losses[e, :, 0]).tolist(),
            label=(constants["label_entropy"] - losses[e, :, 1]).tolist(),
            logits={
                "top1": 100 * (everyones.argmax(1) == everyones_labels).double().mean().item(),
                "entropy": mi.mean_entropy(everyones),
                "calibration_error": mi.calibration_error(everyones, everyones_labels),
                "conditional_mutual_information": mi.conditional_mutual_information(everyones, everyones_labels),
                "agreement_with_last": 100 * (everyones.argmax(1) == last.argmax(1)).double().mean().item(),
            },
        )
    return found, constants


def _gather(parts: list[torch.Tensor]) -> torch.Tensor:
    """All ranks' rows, in rank order, on every rank."""
    return torch.cat(dist.gather_objects(torch.cat(parts)))


# ------------------------------------------------------------------------------------------- choice


def decide(
    config: SelectConfig, trajectory: Trajectory, found: dict[int, Estimates], constants: dict[str, float]
) -> Selection:
    """The estimates, and which checkpoint they and simpler rules choose.

    Raises `TrainingError` that names a checkpoint whose estimates are not finite: no score could be told from it.
    """
    for epoch, each in found.items():
        if not np.isfinite([*each.image, *each.label, *each.logits.values()]).all():
            raise TrainingError(
                f"epoch {epoch} of {config.teacher.run}: what its features or logits tell is not a finite number: "
                "lower --probe.lr, or name the other checkpoints in --teacher.checkpoints"
            )
    epochs = list(found)
    image, label = (
        np.array([statistics.mean(getattr(found[epoch], key)) for epoch in epochs]) for key in ("image", "label")
    )
    scores = {scaling: mi.scores(image, label, scaling, config.weight) for scaling in mi.SCALINGS}
    choices = {scaling: epochs[int(values.argmax())] for scaling, values in scores.items()}
    choice = choices[config.scaling]
    half = min(epochs, key=lambda epoch: (abs(epoch - epochs[-1] / 2), epoch))
    return Selection(
        format=1,
        choice=choice,
        weights_sha256=trajectory.weights_sha256[choice],
        scaling=config.scaling,
        weight=config.weight,
        choices=choices,
        fixed=FixedChoices(half=half, full=epochs[-1]),
        layer=trajectory.layer,
        seed=config.seed,
        probe={"steps": config.probe.steps, "lr": config.probe.lr, "repeats": config.probe.repeats},
        constants=constants,
        checkpoints=[
            Candidate(
                epoch=epoch,
                weights_sha256=trajectory.weights_sha256[epoch],
                image_information=image[e],
                image_information_deviation=_deviation(found[epoch].image),
                label_information=label[e],
                label_information_deviation=_deviation(found[epoch].label),
                scores={scaling: values[e] for scaling, values in scores.items()},
                **found[epoch].logits,
            )
            for e, epoch in enumerate(epochs)
        ],
    )


def _deviation(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def read_choice(path: str, option: str) -> tuple[int, str]:
    """(epoch, sha256 of its weights) that a selection.json, or the folder with one, chooses."""
    file = Path(path) / "selection.json" if Path(path).is_dir() else Path(path)
    require(file.exists(), f"{option}: no such file: {file} (write it with ckd_dist.select_teacher)")
    found = read_selection(file, option)
    return found.choice, found.weights_sha256


def student_seconds(config: SelectConfig, trajectory: Trajectory, info: DatasetInfo, steps: int = 15) -> float:
    """Seconds to train one student on as many processes as these, from a short timing of its step on images in memory:
    the median of `steps`. Its batch is the default of distill, whatever that of the probes is."""
    device, world = trajectory.mean.device, dist.world_size()
    count = max(2, LoaderConfig().batch_size // world)
    model = models.build_model(config.student, info.num_classes).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.randn(count, 3, trajectory.image_size, trajectory.image_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(count, dtype=torch.int64, device=device)
    seconds = []
    for step in range(steps + 2):  # the first two warm up
        started = time.perf_counter()
        with engine.autocast(device, config.amp):
            logits = model(images)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        logits.detach().sum().item()  # waits for a GPU
        if step >= 2:
            seconds.append(time.perf_counter() - started)
    slowest = max(dist.gather_objects(statistics.median(seconds)))
    return slowest / count * info.count * config.student_epochs / world

"""Probe the features of a teacher's checkpoints, and choose the one to distill from: the work of
`select_teacher`."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ckd_dist.core import dist
from ckd_dist.core.errors import TrainingError
from ckd_dist.core.results import Candidate, FixedChoices, Selection
from ckd_dist.data import dataset
from ckd_dist.data.dataset import DatasetInfo
from ckd_dist.data.options import LoaderConfig
from ckd_dist.nn import forward, models, probe
from ckd_dist.nn.losses import scaled_cross_entropies
from ckd_dist.selection import mi
from ckd_dist.selection.options import SelectConfig
from ckd_dist.selection.probes import Trajectory, probe_loader


@dataclass
class Estimates:
    """What held-out images tell of one checkpoint."""

    image: list[float]
    """I(X;F) in nats a pixel value, one value a probe."""
    label: list[float]
    """I(Y;F) in nats, one value a probe."""
    logits: dict[str, float]
    """Scores of the logits alone: top1, calibrated_loss, entropy, and so on."""


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
    loader = probe_loader(
        config, trajectory, held_out, dataset.eval_recipe(held_out, config.data.augment), config.data.batch_size
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
            features, batch_logits = trajectory.features(epoch, batch.images, config.amp)
            logits[epoch].append(batch_logits.cpu())
            with forward.autocast(device, config.amp):
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
                "calibrated_loss": scaled_cross_entropies(everyones, everyones_labels).double().mean(0).min().item(),
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
        layer=trajectory.layer.name,
        layer_form=trajectory.layer.words,
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


def student_seconds(config: SelectConfig, trajectory: Trajectory, info: DatasetInfo, steps: int = 15) -> float:
    """Seconds to train one student on as many processes as these, from a short timing of its step on images in memory:
    the median of `steps`. Its batch is the default of distill, whatever that of the probes is."""
    device, world = trajectory.mean.device, dist.world_size()
    count = max(2, LoaderConfig().batch_size // world)
    model = models.build_model(config.student, info.num_classes)
    probe.prepare(model, config.student, info.num_classes, trajectory.image_size, "student")
    model = model.to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.randn(count, 3, trajectory.image_size, trajectory.image_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(count, dtype=torch.int64, device=device)
    seconds = []
    for step in range(steps + 2):  # the first two warm up
        started = time.perf_counter()
        with forward.autocast(device, config.amp):
            logits = forward.logits_of(model(images))
        nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        logits.detach().sum().item()  # waits for a GPU
        if step >= 2:
            seconds.append(time.perf_counter() - started)
    slowest = max(dist.gather_objects(statistics.median(seconds)))
    return slowest / count * info.count * config.student_epochs / world

"""What students answer to every held-out image: what a race compares them by."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ckd_dist.core import dist
from ckd_dist.core.files import write_bytes_atomically
from ckd_dist.search.trials import Search, Trial

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Answers:
    """Of one student, image by image."""

    correct: np.ndarray
    """Whether the most probable class is the label's, bool [images]."""
    loss: np.ndarray
    """Cross entropy in nats of the logits times `scale`, float32 [images]."""
    scale: float
    """Of `losses.SCALES`, that with the least mean cross entropy."""


def read_answers(trial: Trial) -> Answers | None:
    """Of a trained student; None where they are not there, or not whole."""
    try:
        with np.load(_path(trial), allow_pickle=False) as file:
            if int(file["epochs"]) != trial.config.epochs:
                return None
            return Answers(file["correct"], file["loss"], float(file["scale"]))
    except (OSError, ValueError, KeyError, EOFError):
        return None


def write_answers(search: Search, trials: Sequence[Trial], device: torch.device) -> None:
    """Ask those of the trained students that were not asked yet; collective: ranks share them out."""
    missing = dist.on_main(lambda: [trial.name for trial in trials if read_answers(trial) is None])
    mine = [trial for trial in trials if trial.name in missing][dist.rank() :: dist.world_size()]
    at_once = search.config.students_at_once
    with dist.uneven_work():
        for start in range(0, len(mine), at_once):
            _ask(search, mine[start : start + at_once], device)


def _path(trial: Trial) -> Path:
    return Path(trial.config.run_dir) / "held_out.npz"


def _ask(search: Search, trials: Sequence[Trial], device: torch.device) -> None:
    import torch

    from ckd_dist.nn.losses import SCALES, scaled_cross_entropies

    found: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in trials]
    for labels, answered in held_out_logits(search, trials, device):
        for own, logits in zip(found, answered, strict=True):
            own.append((logits.argmax(dim=1) == labels, scaled_cross_entropies(logits, labels)))
    for trial, own in zip(trials, found, strict=True):
        correct, losses = (torch.cat(each).cpu() for each in zip(*own, strict=True))
        best = int(losses.double().mean(dim=0).argmin())
        file = io.BytesIO()
        loss = losses[:, best].numpy()
        np.savez(file, epochs=trial.config.epochs, correct=correct.numpy(), loss=loss, scale=SCALES[best])
        write_bytes_atomically(_path(trial), file.getvalue())


def held_out_logits(
    search: Search, trials: Sequence[Trial], device: torch.device
) -> Iterator[tuple[torch.Tensor, Iterator[torch.Tensor]]]:
    """Of the images of data.val, a batch at a time and in their order: the labels int64 [n], and what each of these
    trained students says, float32 [n, classes]."""
    from ckd_dist.data.loader import BetonLoader
    from ckd_dist.nn.forward import forward_logits

    networks, metadata = load_students(trials, device)
    info = search.images["data.val"]
    as_evaluated = replace(search.config.data, image_size=None)
    loader = BetonLoader.for_evaluation(info, as_evaluated, metadata, device)
    for batch in loader.batches(np.arange(info.count)):
        yield batch.labels, (forward_logits(network, batch.images, search.config.amp) for network in networks)


def load_students(trials: Sequence[Trial], device: torch.device) -> tuple[list[nn.Module], dict]:
    """Networks of trained students on the device, and the metadata that they share."""
    from ckd_dist.core import checkpoint
    from ckd_dist.nn import forward, models

    networks: list[nn.Module] = []
    metadata: dict = {}
    for trial in trials:
        path = checkpoint.checkpoint_path(trial.config.run_dir, trial.config.epochs)
        name = trial.config.model.name
        model, metadata = models.load_model(path, "run_dir", name if models.is_code(name) else None)
        networks.append(forward.to_device(model, device))
    return networks, metadata

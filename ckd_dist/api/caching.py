"""Filling a logit store from any models, on any images, without FFCV."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from ckd_dist.api.store import Store, open_store
from ckd_dist.api.views import Views
from ckd_dist.core import checkpoint, dist, precision
from ckd_dist.core.errors import UserError, require
from ckd_dist.core.options import Amp
from ckd_dist.data.batch import Batch, Mixed, normalized
from ckd_dist.data.beton_images import BetonImages
from ckd_dist.nn.forward import forward_logits, to_device
from ckd_dist.store import recording
from ckd_dist.store.codecs import factory
from ckd_dist.store.creation import create_or_extend, held_amp
from ckd_dist.store.manifest import Manifest, member_name
from ckd_dist.store.options import CodecConfig


def cache(
    models: Mapping[int | str, nn.Module],
    views: Views,
    store: str | os.PathLike[str],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    num_views: int = 1,
    codec: CodecConfig | None = None,
    amp: Amp = "auto",
    batch_size: int = 128,
    workers: int = 0,
    shard_size: int = 65536,
    device: torch.device | str = "cpu",
) -> Store:
    """Write what a store lacks of the logits of `models` on `views`, and open it: the same call goes on with the first
    missing shard, and one with more models or views adds them. Collective: ranks of torch.distributed share the work.

    Where the images are `BetonImages`, the store is one of cache_logits, and every command takes it.

    Args:
        models: epoch, or NAME/EPOCH for one of several runs -> a network: float32 [n, 3, size, size], normalised,
            channels_last -> logits [n, classes]. Copies run in eval mode.
        views: of the images, at the size that the models take. Their transform's name goes into the store's identity.
        store: its folder.
        mean: of pixels in [0, 1], for normalisation: three numbers.
        std: as mean.
        num_views: views of every image, 0 to num_views - 1.
        codec: what is kept of the logits; default: all of them, in float16.
        amp: precision of the forward pass: auto (the device's best, or the store's), bfloat16, float16 or off.
        batch_size: images a forward pass.
        workers: processes of the DataLoader.
        shard_size: records in a shard file.
        device: where the models run.

    Returns:
        The store with all of these models.

    Raises:
        UserError: a model's name or output is not as said, the store is of other images, views, models or options, or
            does not fit on the disk; nothing is written then.
        TrainingError: a model gives logits that float16 cannot hold.
    """
    folder, device = Path(store), torch.device(device)
    require(num_views >= 1 and shard_size >= 1, "num_views, shard_size: give 1 at least")
    names = _by_member_name(models)
    forward = _forward(views, mean, std, amp, folder)
    manifest = _describe(names, views, forward, num_views, codec or CodecConfig(), shard_size, device)

    def create_and_list() -> tuple[Manifest, recording.Work]:
        held = create_or_extend(folder, manifest)
        return held, recording.missing_work(folder, held, list(names), num_views, None)

    recorder = _ViewsRecorder(manifest, views, names, batch_size, workers, device)
    recorder.manifest, work = dist.on_main(create_and_list)
    if work:
        recording.write_work(folder, recorder, work)
    return open_store(folder, list(models))


def _by_member_name(models: Mapping[int | str, nn.Module]) -> dict[str, nn.Module]:
    """Name of a checkpoint in the store -> model."""
    found = {}
    for key, model in models.items():
        match = re.fullmatch(r"(?:(?!epoch_\d+/)([A-Za-z][\w-]*)/)?(\d+)", str(key))
        if match is None:
            raise UserError(f"models: {key} is no name of a checkpoint: give an epoch, or NAME/EPOCH")
        found[member_name(int(match[2]), match[1])] = model
    require(bool(found), "models: none is given")
    return found


def _forward(views: Views, mean: Sequence[float], std: Sequence[float], amp: Amp, store: Path) -> dict:
    """How the models see the images, as a manifest has it; collective."""
    require(len(mean) == len(std) == 3 and min(std) > 0, "mean, std: give three numbers each, those of std above 0")
    return {
        "image_size": views.size,
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
        "amp": precision.resolve_amp(amp, dist.on_main(lambda: held_amp(store))),
        **({"transform": views.transform_name} if views.transform_name else {}),
    }


def _describe(
    models: Mapping[str, nn.Module],
    views: Views,
    forward: dict,
    num_views: int,
    codec: CodecConfig,
    shard_size: int,
    device: torch.device,
) -> Manifest:
    """What a store of the models, by member name, holds; see `cache`."""
    num_classes = _num_classes(models, views, forward, device)
    images = views.fingerprint()
    info = views.images.info if isinstance(views.images, BetonImages) else None
    require(
        info is None or not info.labelled or info.num_classes == num_classes,
        f"models: they give logits of {num_classes} classes, {info and info.path} has {info and info.num_classes}",
    )
    # Images of a .beton file are known by all of its content, others by a few views.
    digest = hashlib.sha256(json.dumps(images, sort_keys=True).encode()).hexdigest()
    return Manifest(
        dataset={
            "name": info.dataset if info else "views",
            "content_hash": info.content_hash if info else f"views:{digest}",
            "count": len(views),
            "num_classes": num_classes,
        },
        recipe=views.recipe.to_dict(),
        view_seed=views.seed,
        forward=forward,
        codec=factory.from_config(codec, num_classes).to_dict(),
        shard_size=shard_size,
        checkpoints={
            name: {
                "epoch": int(name.rpartition("_")[2]),
                "model": type(model).__name__,
                "weights_sha256": checkpoint.weights_sha256(model.state_dict()),
                "views": num_views,
            }
            for name, model in sorted(models.items())
        },
        images=images,
        classes=list(info.classes) if info else [],
        paths={"data.train": os.path.abspath(info.path)} if info else {},
    )


def _num_classes(models: Mapping[str, nn.Module], views: Views, forward: dict, device: torch.device) -> int:
    """What all of the models give for an image; raises `UserError` where they do not agree."""
    image = normalized(views[0, 0]["image"][None].to(device), forward["mean"], forward["std"])
    counts = set()
    for name, model in models.items():
        logits = forward_logits(to_device(copy.deepcopy(model), device), image, "off")
        require(logits.ndim == 2, f"models: {name} gives {list(logits.shape)} for one image, not [1, classes]")
        counts.add(logits.shape[1])
    require(len(counts) == 1, f"models: they give logits of {sorted(counts)} classes: give models of the same ones")
    return counts.pop()


class _ViewsRecorder(recording.Recorder):
    """Gives the logits of models in memory on the batches of a DataLoader."""

    def __init__(
        self,
        manifest: Manifest,
        views: Views,
        models: Mapping[str, nn.Module],
        batch_size: int,
        workers: int,
        device: torch.device,
    ):
        self.manifest, self.device, self.batch_size = manifest, device, batch_size
        self._models = models
        self.loader = _ViewsLoader(manifest, views, batch_size, workers, device)  # type: ignore[assignment]

    def load(self, names: list[str]) -> dict[str, nn.Module]:
        """Copies on the device, in eval mode: the user's models stay as they are."""
        return {name: to_device(copy.deepcopy(self._models[name]), self.device) for name in names}


class _ViewsLoader:
    """Batches of views, as `BetonLoader` gives them."""

    def __init__(self, manifest: Manifest, views: Views, batch_size: int, workers: int, device: torch.device):
        self._forward, self._views, self._device = manifest.forward, views, device
        self._batch_size, self._workers = batch_size, workers
        self._labelled = not isinstance(views.images, BetonImages) or views.images.info.labelled

    def batches(self, ids: np.ndarray, view: int) -> Iterator[Batch]:
        """The samples `ids`, int64 [n], in order under `view`."""
        indices = [(view, sample) for sample in ids.tolist()]
        loader = DataLoader(self._views, batch_size=self._batch_size, sampler=indices, num_workers=self._workers)
        for item in loader:
            on_device = {name: value.to(self._device) for name, value in item.items()}
            yield Batch(
                images=normalized(on_device["image"], self._forward["mean"], self._forward["std"]),
                labels=on_device["label"],
                ids=item["id"],
                labelled=self._labelled,
                mixed=Mixed(on_device["other_label"], on_device["weight"]) if "weight" in item else None,
            )

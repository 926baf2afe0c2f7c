"""The store that the options of cache_logits describe."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ckd_dist.core import checkpoint, dist, precision
from ckd_dist.data import classes
from ckd_dist.data.beton import open_beton
from ckd_dist.data.dataset import train_recipe
from ckd_dist.nn import models
from ckd_dist.store.codecs import factory
from ckd_dist.store.creation import held_amp
from ckd_dist.store.manifest import Manifest, member_name
from ckd_dist.store.options import CacheConfig
from ckd_dist.store.recording import Recorder, image_digests


def describe(config: CacheConfig, device: torch.device) -> tuple[Manifest, Recorder]:
    """(manifest, recorder): what a store of the options `config` holds, and what computes its records; collective.
    Raises `UserError` where options, images and the teacher's run do not go together."""
    info = open_beton(config.data.train, "data.train", verify=config.data.verify)
    recipe = train_recipe(config.data, info)
    trajectory = checkpoint.trajectory(config.teacher.run, "teacher.run")
    epochs = checkpoint.choose(trajectory, config.teacher.checkpoints or list(trajectory), "teacher.checkpoints")
    members = {}
    for epoch in sorted(epochs):
        model, metadata = models.load_model(trajectory[epoch], "teacher.run")
        members[member_name(epoch, config.teacher.name)] = {
            "epoch": epoch,
            "model": metadata["model"],
            "weights_sha256": checkpoint.weights_sha256(model.state_dict()),
            "views": config.views,
        }
    info = classes.match_model(info, "data.train", metadata, config.teacher.run, config.data.map_classes)
    codec = factory.from_config(config, info.num_classes)
    image_size = config.data.image_size or metadata["image_size"]
    models.require_fits(model, metadata["model"], info.num_classes, image_size, "data.image_size")
    manifest = Manifest(
        dataset={
            "name": info.dataset,
            "content_hash": info.content_hash,
            "count": info.count,
            "num_classes": info.num_classes,
            **({} if info.label_map is None else {"label_map": list(info.label_map)}),
        },
        recipe=recipe.to_dict(),
        view_seed=config.seed,
        forward={
            "image_size": image_size,
            "mean": metadata["mean"],
            "std": metadata["std"],
            "amp": precision.resolve_amp(config.amp, dist.on_main(lambda: held_amp(Path(config.store)))),
        },
        codec=codec.to_dict(),
        shard_size=config.shard_size,
        checkpoints=members,
        images={},
        classes=metadata.get("classes", []),
        paths={
            "data.train": os.path.abspath(info.path),
            " ".join(filter(None, ["teacher.run", config.teacher.name])): os.path.abspath(config.teacher.run),
        },
    )
    recorder = Recorder(manifest, info, config.teacher.run, config.data, device)
    manifest.images = image_digests(manifest, info)
    return manifest, recorder

"""The store that the options of cache_logits describe."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ckd_dist.core import checkpoint, dist, precision
from ckd_dist.core.errors import require
from ckd_dist.core.files import require_regular
from ckd_dist.data import classes
from ckd_dist.data.beton import open_beton
from ckd_dist.data.dataset import train_recipe
from ckd_dist.nn import models, probe
from ckd_dist.store.codecs import factory
from ckd_dist.store.creation import held_amp
from ckd_dist.store.manifest import Manifest, member_name
from ckd_dist.store.options import CacheConfig
from ckd_dist.store.recording import Recorder, image_digests


def describe(config: CacheConfig, device: torch.device) -> tuple[Manifest, Recorder]:
    """(manifest, recorder): what a store of the options `config` holds, and what computes its records; collective.
    Raises `UserError` where options, images and the teacher's run do not go together."""
    info = open_beton(config.data.train, "data.train", verify=config.data.verify)
    trajectory = checkpoint.trajectory(config.teacher.run, "teacher.run")
    epochs = checkpoint.choose(trajectory, config.teacher.checkpoints or list(trajectory), "teacher.checkpoints")
    members = {}
    for epoch in sorted(epochs):
        model, metadata = models.load_model(trajectory[epoch], "teacher.run", config.teacher.model)
        members[member_name(epoch, config.teacher.name)] = {
            "epoch": epoch,
            "model": metadata["model"],
            "weights_sha256": checkpoint.weights_sha256(model.state_dict()),
            "views": config.views,
        }
    num_classes = metadata["num_classes"]
    columns = chosen_classes(config.teacher.classes, metadata)
    if columns is not None:
        names = metadata.get("classes", [])
        kept = {"num_classes": len(columns), "classes": [names[column] for column in columns] if names else []}
        metadata = {**metadata, **kept}
    info = classes.match_model(info, "data.train", metadata, config.teacher.run, config.data.map_classes)
    codec = factory.from_config(config, info.num_classes)
    recipe = train_recipe(config.data, info, crop_share=metadata.get("crop_share"))
    image_size = config.data.image_size or metadata["image_size"]
    if recipe.kind == "center_crop" and config.data.image_size is None:
        image_size = metadata.get("val_image_size") or image_size
    probe.require_fits(model, metadata["model"], num_classes, image_size, "data.image_size")
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
            **({} if columns is None else {"columns": columns}),
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
    recorder = Recorder(manifest, info, config.teacher.run, config.data, device, config.teacher.model)
    manifest.images = image_digests(manifest, info)
    return manifest, recorder


def chosen_classes(wanted: list[int | str] | str | None, metadata: Mapping[str, Any]) -> list[int] | None:
    """The columns of the logits that the option teacher.classes keeps, None for all; raises `UserError` where it names
    a class that the checkpoint of this `metadata` has not, or one twice."""
    if wanted is None:
        return None
    if isinstance(wanted, str):
        require_regular(Path(wanted), "teacher.classes")
        wanted = [line.strip() for line in Path(wanted).read_text(encoding="utf-8").splitlines() if line.strip()]
    names, count = list(metadata.get("classes", [])), metadata["num_classes"]
    columns = []
    for each in wanted:
        is_index = str(each).isdecimal() and each not in names
        require(
            int(each) < count if is_index else each in names,
            f"teacher.classes: the teacher has no class {each}; it has {count}, {', '.join(names[:3])} ...",
        )
        columns.append(int(each) if is_index else names.index(each))
    require(len(set(columns)) == len(columns) > 1, "teacher.classes: give two classes or more, each once")
    return columns

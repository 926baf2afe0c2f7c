"""Teach students from cached logits, online teachers, or labels alone: one, or many side by side on one loader and one
read of the store. What `distill` and `search` do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ckd_dist import caching, checkpoint, data, dist, engine, models, selection, training
from ckd_dist.beton import open_beton
from ckd_dist.config import DistillConfig, TeacherConfig, require
from ckd_dist.data import DatasetInfo
from ckd_dist.lessons import Lessons
from ckd_dist.log import say
from ckd_dist.recipe import ViewRecipe
from ckd_dist.store import codecs
from ckd_dist.store.manifest import Manifest
from ckd_dist.store.reader import StoreReader


def train(configs: Sequence[DistillConfig], device: torch.device) -> None:
    """Train the students that `configs` describe, side by side; collective. They agree in all but model, optimiser,
    loss, run folder and which of one teacher's checkpoints they hear, if any."""
    info = open_beton(configs[0].data.train, "data.train", verify=configs[0].data.verify)
    configs = [replace(each, teacher=resolved(each.teacher)) for each in configs]
    taught = teaching(configs, info, device)
    training.train(
        configs,
        taught.losses,
        device=device,
        info=info,
        recipe=taught.recipe,
        view_seed=taught.view_seed,
        source=taught.source,
        save_every=configs[0].save_every or configs[0].epochs,
    )


@dataclass(frozen=True)
class Teaching:
    """What students on one loader are taught."""

    losses: list[engine.Loss]
    """Of each student."""
    source: Callable[[int], engine.Source]
    """The view of an epoch, and who teaches it."""
    recipe: ViewRecipe
    view_seed: int


def teaching(configs: Sequence[DistillConfig], info: DatasetInfo, device: torch.device) -> Teaching:
    """For configurations whose teachers are `resolved`; raises `UserError` where teachers, images and losses do not go
    together."""
    config = next((each for each in configs if each.teacher.checkpoints), configs[0])
    dense = codecs.Dense(info.num_classes)
    reader = cached_teacher(configs, config.teacher.store, info) if config.teacher.store else None
    online = online_teacher(configs, config.teacher.run, info, dense, device) if config.teacher.run else {}
    available = reader.checkpoints if reader else list(online)
    lessons = [Lessons(each, available, reader.codec if reader else dense) for each in configs]
    # Together they hear these: an epoch's records have a column for each.
    union = [sorted({m for each in lessons for m in each.members[epoch]}) for epoch in range(config.epochs)]

    seed, views = config.data.view_seed, config.data.views
    if reader:
        seed, views = reader.manifest.view_seed, views or reader.views
    if views and views < config.epochs:
        say(f"{views} views for {config.epochs} epochs: epoch {views + 1} sees the first view again, and so on")

    def source(epoch: int) -> engine.Source:
        members = [online[available[m]] for m in union[epoch]] if online else []
        return engine.Source(
            view=epoch % (views or config.epochs),
            rows=partial(reader.rows, members=union[epoch]) if reader and union[epoch] else None,
            teacher=partial(engine.online_records, members, dense, config.amp) if members else None,
        )

    def columns(each: Lessons, epoch: int) -> list[int]:
        return [union[epoch].index(m) for m in each.members[epoch]]

    return Teaching(
        losses=[partial(each.loss, partial(columns, each)) for each in lessons],
        source=source,
        recipe=data.train_recipe(config.data, info, reader.recipe if reader else None),
        view_seed=seed or 0,
    )


# ------------------------------------------------------------------------------------------- teachers


def resolved(asked: TeacherConfig) -> TeacherConfig:
    """With the checkpoints that a selection, or nothing at all, stands for; raises `UserError` for one that is not
    there or, for a selection, has other weights."""
    if not asked.store and not asked.run:
        return asked
    manifest = Manifest.load(Path(asked.store), "teacher.store") if asked.store else None
    files = checkpoint.trajectory(asked.run, "teacher.run") if asked.run else {}
    available = manifest.members if manifest else files
    if not asked.selection:
        return replace(asked, checkpoints=checkpoint.choose(available, asked.checkpoints, "teacher.checkpoints"))
    epoch, chosen = selection.read_choice(asked.selection, "teacher.selection")
    hashes: dict[int | str, str] = {}
    if manifest:
        hashes = {name: manifest.checkpoints[member]["weights_sha256"] for name, member in manifest.members.items()}
    else:
        checkpoint.choose(files, [epoch], "teacher.selection")
        model, _ = models.load_model(files[epoch], "teacher.run")
        hashes[epoch] = checkpoint.weights_sha256(model.state_dict())
    found = [name for name, weights in hashes.items() if weights == chosen]
    require(
        bool(found),
        f"teacher.selection: it chose epoch {epoch} with weights {chosen[:12]}, {asked.store or asked.run} has "
        f"{hashes.get(epoch, 'none')[:12]}: they are of different runs",
    )
    return replace(asked, selection=None, checkpoints=found[:1])


def _require_served(configs: Sequence[DistillConfig], codec: codecs.Codec) -> None:
    for each in configs:
        if each.teacher.checkpoints:
            codecs.require_served(codec, each.kd, each.teacher.at_once)


def _union(configs: Sequence[DistillConfig]) -> list[int | str]:
    """All checkpoints that students hear, in the order in which they are first named."""
    return list(dict.fromkeys(name for each in configs for name in each.teacher.checkpoints))


def _say_teachers(configs: Sequence[DistillConfig], how: str) -> None:
    say(f"teacher: {how} of {', '.join(f'epoch {name}' for name in _union(configs))}")


def cached_teacher(configs: Sequence[DistillConfig], store: str, info: DatasetInfo) -> StoreReader:
    """The store, open for all checkpoints that the students hear; raises `UserError` where it does not fit the images,
    a loss or the views."""
    seed, views = configs[0].data.view_seed, configs[0].data.views
    reader = StoreReader(store, _union(configs), info)
    manifest, codec = reader.manifest, reader.codec
    _require_served(configs, codec)
    require(
        not (isinstance(codec, codecs.TopK) and reader.recipe.mixes and any(each.kd.loss == "dkd" for each in configs)),
        "kd.loss dkd needs the teacher's logits of both labels of a mixed image, and topk keeps the first one's: "
        "use a store of codec dense",
    )
    require(
        seed in (None, manifest.view_seed),
        f"data.view_seed is {seed}, the store holds views of seed {manifest.view_seed}: leave it out",
    )
    fewest = min(reader.checkpoints, key=lambda name: manifest.views([name]))
    require(
        (views or 1) <= reader.views,
        f"data.views is {views}, {store} holds {reader.views} views of epoch {fewest}: cache more or ask for less",
    )
    reader.check_shards(views or reader.views)
    _say_teachers(configs, "cached logits")
    temperatures = [each.kd.temperature for each in configs if each.teacher.store and each.kd.loss != "standardized"]
    if isinstance(codec, codecs.TopK) and temperatures:
        some = torch.from_numpy(reader.rows(np.arange(min(1000, info.count)), 0)[:, 0])
        share = codec.kept(some, max(temperatures)).mean().item()
        if share < 0.5:
            say(
                f"warning: at kd.temperature {max(temperatures):g} the {codec.k} classes kept hold {100 * share:.0f} % "
                "of the teacher's softmax: a student learns little from so few; lower it, or use a dense store"
            )
    if note := dist.on_main(lambda: manifest.decoding_note(caching.image_digests(manifest, info))):
        say(note)
    return reader


def online_teacher(
    configs: Sequence[DistillConfig], run: str, info: DatasetInfo, codec: codecs.Codec, device: torch.device
) -> dict[int | str, nn.Module]:
    """The checkpoints on the device; raises `UserError` where the students' images are not the teacher's."""
    _require_served(configs, codec)
    require(
        configs[0].data.start_image_size is None,
        "data.start_image_size is not for an online teacher, who would see the small images too: cache its logits",
    )
    trajectory = checkpoint.trajectory(run, "teacher.run")
    members: dict[int | str, nn.Module] = {}
    for epoch in _union(configs):
        model, metadata = models.load_model(trajectory[int(epoch)], "teacher.run")
        models.require_classes(metadata, info.num_classes, "teacher.run")
        for key, ours in (
            ("image_size", info.image_size(configs[0].data.image_size)),
            ("mean", list(info.mean)),
            ("std", list(info.std)),
        ):
            require(
                metadata[key] == ours,
                f"teacher.run: the online teacher was trained with {key} {metadata[key]}, the student gets "
                f"{ours}: cache its logits instead",
            )
        members[epoch] = engine.to_device(model, device)
    _say_teachers(configs, "online, the logits")
    return members

"""Teach students from cached logits, online teachers, or labels alone: one, or many side by side on one loader and one
read of the store. What `distill` and `search` do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ckd_dist.core import dist, precision
from ckd_dist.core.console import say
from ckd_dist.core.identity import saved_options
from ckd_dist.data import dataset
from ckd_dist.data.dataset import DatasetInfo
from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.store.codecs.dense import Dense
from ckd_dist.store.manifest import Manifest
from ckd_dist.train import learner, loop, setup
from ckd_dist.train.options import DistillConfig
from ckd_dist.train.schedule import Lessons
from ckd_dist.train.teachers import Teacher, cached_teacher, online_teacher, open_teacher, resolved


def train(asked: Sequence[DistillConfig], images: Mapping[str, DatasetInfo], device: torch.device) -> None:
    """Train the students that `asked` describes, side by side, on the `images` of data.train and data.val; collective.
    They agree in all but model, optimiser, loss, run folder and which of one teacher's checkpoints they hear, if
    any."""
    configs = [settled(each) for each in asked]
    teacher = open_teacher(configs, device)
    images = {option: teacher.match(info, option, asked[0].data.map_classes) for option, info in images.items()}
    taught = teaching(configs, teacher, images["data.train"])
    trainees = [
        setup.Trainee(config, setup.origin(each, config, images, teacher.inputs(each, config)), loss)
        for each, config, loss in zip(asked, configs, taught.losses, strict=True)
    ]
    setup.train(
        trainees,
        images,
        device=device,
        recipe=taught.recipe,
        view_seed=taught.view_seed,
        source=taught.source,
        save_every=configs[0].save_every or configs[0].epochs,
    )


def settled(asked: DistillConfig) -> DistillConfig:
    """The options of a student as they are resolved: precision, the teacher's checkpoints and, if they are cached, the
    number of views; as the run in its folder began, if there is one. Collective."""
    config = precision.settle(asked, asked.run_dir)
    config = replace(config, teacher=resolved(config.teacher))
    if config.teacher.store and config.data.views is None:
        began = dist.on_main(lambda: saved_options(Path(asked.run_dir)).get("data.views"))
        held = Manifest.load(Path(config.teacher.store), "teacher.store").views(config.teacher.checkpoints)
        config = replace(config, data=replace(config.data, views=began or held))
    return config


@dataclass(frozen=True)
class Teaching:
    """What students on one loader are taught."""

    losses: list[learner.Loss]
    """Of each student."""
    source: Callable[[int], loop.Source]
    """The view of an epoch, and who teaches it."""
    recipe: ViewRecipe
    view_seed: int


def teaching(configs: Sequence[DistillConfig], teacher: Teacher, info: DatasetInfo) -> Teaching:
    """For configurations that are `settled`, and images that match the teacher; raises `UserError` where teachers,
    images and losses do not go together."""
    config = configs[0]
    dense = Dense(info.num_classes)
    reader = cached_teacher(configs, teacher.manifest, info) if teacher.manifest else None
    online = online_teacher(configs, teacher, info, dense)
    available = reader.checkpoints if reader else list(online)
    lessons = [Lessons(each, available, reader.codec if reader else dense) for each in configs]
    # Together they hear these: an epoch's records have a column for each.
    union = [sorted({m for each in lessons for m in each.members[epoch]}) for epoch in range(config.epochs)]

    seed, views = config.data.view_seed, config.data.views
    if reader:
        seed, views = reader.manifest.view_seed, views or reader.views
    if views and views < config.epochs:
        say(f"{views} views for {config.epochs} epochs: epoch {views + 1} sees the first view again, and so on")

    def source(epoch: int) -> loop.Source:
        members = [online[available[m]] for m in union[epoch]] if online else []
        return loop.Source(
            view=epoch % (views or config.epochs),
            rows=partial(reader.rows, members=union[epoch]) if reader and union[epoch] else None,
            teacher=partial(loop.online_records, members, dense, config.amp) if members else None,
        )

    def columns(each: Lessons, epoch: int) -> list[int]:
        return [union[epoch].index(m) for m in each.members[epoch]]

    return Teaching(
        losses=[partial(each.loss, partial(columns, each)) for each in lessons],
        source=source,
        recipe=dataset.train_recipe(config.data, info, reader.recipe if reader else None),
        view_seed=seed or 0,
    )

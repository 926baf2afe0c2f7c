"""Distil students from a teacher's cached logits or its networks, or train them plainly: one, or many side by side on
one loader and one read of the store. What `distill` and `search` do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ckd_dist.core import dist, identity, precision
from ckd_dist.core.console import say
from ckd_dist.core.errors import require
from ckd_dist.core.identity import Input, saved_options
from ckd_dist.data.classes import require_labels
from ckd_dist.data.dataset import DatasetInfo, train_recipe
from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.nn.features import FeatureLayer
from ckd_dist.store.manifest import Manifest
from ckd_dist.store.reader import StoreReader
from ckd_dist.train import calibration, setup
from ckd_dist.train.learner import Loss
from ckd_dist.train.objective import DistillationLoss, LabelLoss
from ckd_dist.train.options import DistillConfig
from ckd_dist.train.schedule import EpochSchedule, TeacherSchedule
from ckd_dist.train.teachers import CachedTeacher, OnlineTeacher, open_teacher, resolve_checkpoints


def train(requested: Sequence[DistillConfig], images: Mapping[str, DatasetInfo], device: torch.device) -> None:
    """Train students side by side on the `images` of data.train and data.val; collective.

    `requested` are their options as the user gave them. They agree in all but model, optimiser, loss, run folder and
    which of one teacher's checkpoints they learn from, if any.
    """
    configs = [resolve(each) for each in requested]
    teacher = open_teacher(configs, device)
    if teacher:
        how = configs[0].data.map_classes
        images = {option: teacher.match(info, option, how) for option, info in images.items()}
    factors = calibration.factors(configs, teacher, images)
    distillation = set_up(configs, teacher, images["data.train"], factors)
    runs = [
        setup.Run(
            config, setup.origin(each, config, images, teacher_inputs(teacher, each, config)), loss, distillation.stages
        )
        for each, config, loss in zip(requested, configs, distillation.losses, strict=True)
    ]
    setup.train(
        runs,
        images,
        device=device,
        recipe=distillation.recipe,
        view_seed=distillation.view_seed,
        schedule=distillation.schedule,
        save_every=configs[0].save_every or configs[0].epochs,
    )


def resolve(requested: DistillConfig) -> DistillConfig:
    """The options of a student as they are resolved: precision, the teacher's checkpoints and, if they are cached, the
    number of views; as the run in its folder began, if there is one. Collective."""
    config = precision.resolve(requested, requested.run_dir)
    config = replace(config, teacher=resolve_checkpoints(config.teacher))
    if config.teacher.store and config.data.views is None:
        began = dist.on_main(lambda: saved_options(Path(config.run_dir)).get("data.views"))
        held = Manifest.load(Path(config.teacher.store), "teacher.store").views(config.teacher.checkpoints)
        config = replace(config, data=replace(config.data, views=began or held))
    return config


def teacher_inputs(
    teacher: CachedTeacher | OnlineTeacher | None, requested: DistillConfig, config: DistillConfig
) -> dict[str, Input]:
    """What a student takes of its teacher, by option."""
    checkpoints = config.teacher.checkpoints
    if teacher is None or not checkpoints:
        return {}
    inputs = teacher.inputs(checkpoints)
    if requested.teacher.selection:
        chosen = "+".join(map(teacher.weights_sha256, checkpoints))
        inputs["teacher.selection"] = identity.selection(requested.teacher.selection, chosen)
    if config.teacher.calibration:
        inputs |= calibration.inputs(config.teacher.calibration, checkpoints)
    return inputs


def require_labels_unused(configs: Sequence[DistillConfig], info: DatasetInfo) -> None:
    """Raise `UserError` where the images to train on have no labels, and a student, of options that are resolved, would
    learn from them."""
    if info.labelled:
        return
    for each in configs:
        if not each.teacher.checkpoints:
            require_labels(info, "data.train", "a student without a teacher learns from nothing else")
        require(
            each.kd.alpha == 0,
            f"kd.alpha is {each.kd.alpha:g}, and the images of {info.path} have no labels to weigh: give --kd.alpha 0",
        )
        require(
            each.kd.loss != "dkd",
            f"kd.loss dkd tells the label's class from the others, and the images of {info.path} have no labels: give "
            "another, such as --kd.loss kd",
        )


@dataclass(frozen=True)
class Distillation:
    """What students that share a loader are trained with."""

    losses: list[Loss]
    """Of each student."""
    stages: Sequence[FeatureLayer]
    """Of the teacher, whose maps the students compare with theirs, if they do."""
    schedule: EpochSchedule
    recipe: ViewRecipe
    view_seed: int


def set_up(
    configs: Sequence[DistillConfig],
    teacher: CachedTeacher | OnlineTeacher | None,
    info: DatasetInfo,
    factors: Sequence[Sequence[float] | None] | None = None,
) -> Distillation:
    """For configurations that are resolved, and images that have the teacher's classes; `factors` of the checkpoints'
    logits as `calibration.factors` finds them. Raises `UserError` where teacher, images and losses do not go
    together."""
    config = configs[0]
    require_labels_unused(configs, info)
    records = teacher.open(configs, info) if teacher else None
    available = records.checkpoints if records else []
    plans = [
        TeacherSchedule.of(each.teacher, available, each.epochs, own)
        for each, own in zip(configs, factors or [None] * len(configs), strict=True)
    ]
    # The columns of an epoch's records: what any of the students needs.
    columns = [sorted({c for plan in plans for c in plan.checkpoints[epoch]}) for epoch in range(config.epochs)]
    losses: list[Loss] = []
    for each, plan in zip(configs, plans, strict=True):
        if records is None or not each.teacher.checkpoints:
            losses.append(LabelLoss(each))
            continue
        own = [[shared.index(c) for c in wanted] for shared, wanted in zip(columns, plan.checkpoints, strict=True)]
        codecs = [[records.codecs[c] for c in wanted] for wanted in plan.checkpoints]
        losses.append(DistillationLoss(each, codecs, own, plan.weights, plan.scales))
    views, seed, recipe = config.data.views, config.data.view_seed, None
    if isinstance(records, StoreReader):
        views, seed, recipe = views or records.views, records.manifest.view_seed, records.recipe
    if views and views < config.epochs:
        say(f"{views} views for {config.epochs} epochs: epoch {views + 1} sees the first view again, and so on")
    budget = config.teacher.read_ahead
    schedule = EpochSchedule(
        views or config.epochs,
        teacher=records,
        checkpoints=columns,
        read_ahead=None if budget is None else int(1e9 * budget),
        repeats=config.data.repeats,
    )
    stages = records.stages if isinstance(records, OnlineTeacher) else ()
    return Distillation(losses, stages, schedule, train_recipe(config.data, info, recipe), seed or 0)

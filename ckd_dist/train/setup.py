"""A training set up from its configuration: images, loaders, models and run folders, handed to the train loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ckd_dist.core import dist, identity, precision
from ckd_dist.core.console import say
from ckd_dist.core.errors import require
from ckd_dist.core.identity import Input, Origin
from ckd_dist.core.options import to_dict
from ckd_dist.core.run_folder import RunFolder, read_summary
from ckd_dist.data.dataset import DatasetInfo, eval_recipe
from ckd_dist.data.loader import BetonLoader, read_labels
from ckd_dist.data.order import rank_share
from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.nn.models import build_model, initial_weights, load_weights, require_fits
from ckd_dist.train.learner import Learner, Loss
from ckd_dist.train.loop import Source, fit
from ckd_dist.train.options import TrainConfig


@dataclass(frozen=True)
class Trainee:
    """A model that is to be trained."""

    config: TrainConfig
    """Its options, as they were resolved."""
    origin: Origin
    """What it is made of."""
    loss: Loss


def origin(
    asked: TrainConfig, config: TrainConfig, images: Mapping[str, DatasetInfo], teacher: Mapping[str, Input]
) -> Origin:
    """What a training is made of: options as they were `asked` and as they were resolved to `config`, the `images` and
    the `teacher` that options name, and initial weights."""
    inputs = {**{option: info.as_input() for option, info in images.items()}, **teacher}
    if path := config.model.weights:
        inputs["model.weights"] = identity.weights(path, initial_weights(path)[1])
    return Origin(asked=to_dict(asked), settled=to_dict(config), inputs=inputs)


def train(
    trainees: Sequence[Trainee],
    images: Mapping[str, DatasetInfo],
    *,
    device: torch.device,
    recipe: ViewRecipe,
    view_seed: int,
    source: Callable[[int], Source],
    save_every: int,
) -> None:
    """Train models, each with its loss and in its run folder, side by side on views of the `images` of data.train, and
    evaluate them on those of data.val; collective. Their configurations agree in all that concerns data, seed, epochs
    and saving."""
    config, configs = trainees[0].config, [trainee.config for trainee in trainees]
    info, val_info = images["data.train"], images.get("data.val")
    batch_size, size = config.data.batch_size, info.image_size(config.data.image_size)
    val_size = config.data.val_image_size or size
    require(
        batch_size <= info.count,
        f"data.batch_size {batch_size} is larger than the {info.count} images of {info.path}",
    )
    share = rank_share(batch_size)
    metadata = {
        "num_classes": info.num_classes,
        "image_size": size,
        "val_image_size": val_size,
        "augment": recipe.kind,
        "mean": list(info.mean),
        "std": list(info.std),
        "dataset": {"name": info.dataset, "content_hash": info.content_hash, "count": info.count},
        "classes": list(info.classes),
    }
    models, least = [], batch_size // dist.world_size()
    sides = {"data.image_size": (size, least), "data.val_image_size": (val_size, 0)}
    if config.data.start_image_size:
        sides["data.start_image_size"] = (config.data.start_image_size, least)
    for each in configs:  # before any run folder is made
        torch.manual_seed(config.seed)
        model = build_model(each.model.name, info.num_classes).to(device)
        if each.model.weights:
            load_weights(model, each.model.weights)
        models.append(model)
    for name, model in {each.model.name: model for each, model in zip(configs, models, strict=True)}.items():
        for option, (side, train_images) in sides.items():
            require_fits(model, name, info.num_classes, side, option, train_images=train_images)
    learners = []
    for trainee, model in zip(trainees, models, strict=True):
        each = trainee.config
        run = RunFolder(each.run_dir, trainee.origin, tensorboard=each.tensorboard)
        if run.complete:
            summary = read_summary(run.path)
            found = f", top1 {summary.top1:.2f}" if summary and summary.top1 is not None else ""
            say(f"{run.path}: complete already{found}")
            continue
        its_metadata = {"model": each.model.name, **metadata}
        learners.append(Learner(model, each, trainee.loss, run, device, its_metadata, info.count // batch_size))
    if not learners:
        return
    make_loader = partial(
        BetonLoader,
        config=config.data,
        batch_size=share.stop - share.start,
        device=device,
        mean=info.mean,
        std=info.std,
    )
    ahead = 0
    if config.data.order == "quasi_random":
        ahead, labels = config.data.window_pages, read_labels(info)
        if (labels[1:] == labels[:-1]).mean() > 0.5 and info.num_classes > 2:
            say(f"warning: images of a class lie together in {info.path}, so batches have few: write it with --shuffle")
    loader = make_loader(info, recipe=recipe, view_seed=view_seed, image_size=size, pages_ahead=ahead)
    val_loader = (
        make_loader(val_info, recipe=eval_recipe(val_info, recipe.kind), image_size=val_size) if val_info else None
    )
    names = ", ".join(dict.fromkeys(learner.config.model.name for learner in learners))
    what = f"{learners[0].run.path}: {names}"
    if len(learners) > 1:
        what = f"{len(learners)} students side by side, {names}"
    say(
        f"{what} at {size} px on {info.count} images of {info.dataset}, {config.epochs} epochs of "
        f"{learners[0].steps_per_epoch} steps, {dist.world_size()} processes on {device.type}, in "
        f"{precision.words(config.amp)}"
    )
    fit(learners, loader, val_loader, config, save_every=save_every, source=source)

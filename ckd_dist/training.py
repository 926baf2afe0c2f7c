"""A training set up from its configuration: images, loaders, models and run folders, handed to the train loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from ckd_dist import dist, precision
from ckd_dist.beton import open_beton
from ckd_dist.config import TrainConfig, require, to_dict
from ckd_dist.data import DatasetInfo, eval_recipe, rank_share
from ckd_dist.engine import Learner, Loss, Source, fit
from ckd_dist.loader import BetonLoader, read_labels
from ckd_dist.log import RunFolder, read_summary, say
from ckd_dist.models import build_model, load_weights, require_fits
from ckd_dist.recipe import ViewRecipe


def train(
    configs: Sequence[TrainConfig],
    loss: Sequence[Loss],
    *,
    device: torch.device,
    info: DatasetInfo,
    recipe: ViewRecipe,
    view_seed: int,
    source: Callable[[int], Source],
    save_every: int,
) -> None:
    """Train the models that `configs` describe, each with its loss and in its run folder, side by side on views of
    `info`'s images; collective. The configurations agree in all that concerns data, seed, epochs and saving."""
    config = configs[0]
    batch_size, size = config.data.batch_size, info.image_size(config.data.image_size)
    val_size = config.data.val_image_size or size
    require(
        batch_size <= info.count,
        f"data.batch_size {batch_size} is larger than the {info.count} images of {info.path}",
    )
    share = rank_share(batch_size)
    val_info = open_beton(config.data.val, "data.val", verify=config.data.verify) if config.data.val else None
    require(
        val_info is None or val_info.num_classes == info.num_classes,
        f"data.val has {val_info and val_info.num_classes} classes, data.train {info.num_classes}",
    )
    metadata = {
        "num_classes": info.num_classes,
        "image_size": size,
        "val_image_size": val_size,
        "augment": recipe.kind,
        "mean": list(info.mean),
        "std": list(info.std),
        "dataset": {"name": info.dataset, "content_hash": info.content_hash, "count": info.count},
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
    for each, model, its_loss in zip(configs, models, loss, strict=True):
        run = RunFolder(each.run_dir, to_dict(each), tensorboard=each.tensorboard)
        if run.complete:
            summary = read_summary(run.path)
            found = f", top1 {summary.top1:.2f}" if summary and summary.top1 is not None else ""
            say(f"{run.path}: complete already{found}")
            continue
        its_metadata = {"model": each.model.name, **metadata}
        learners.append(Learner(model, each, its_loss, run, device, its_metadata, info.count // batch_size))
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

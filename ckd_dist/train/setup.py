"""A training set up from its configuration: models, run folders and loaders, handed to the train loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn

from ckd_dist.core import dist, identity, precision
from ckd_dist.core.console import say
from ckd_dist.core.errors import require
from ckd_dist.core.identity import Input, Origin
from ckd_dist.core.options import to_dict
from ckd_dist.core.run_folder import RunFolder, read_summary
from ckd_dist.data.dataset import DatasetInfo, eval_recipe
from ckd_dist.data.loader import BetonLoader, read_labels
from ckd_dist.data.order import rank_share
from ckd_dist.data.pairs import PairMixing
from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.nn import features, models, probe, weights
from ckd_dist.nn.features import FeatureLayer
from ckd_dist.nn.optim import build_optimizer
from ckd_dist.nn.recompute import recompute_blocks
from ckd_dist.nn.review import ReviewingStudent
from ckd_dist.train.learner import Learner, Loss
from ckd_dist.train.loop import fit
from ckd_dist.train.options import DistillConfig, TrainConfig
from ckd_dist.train.schedule import EpochSchedule


@dataclass(frozen=True)
class Run:
    """A model that is to be trained."""

    config: TrainConfig
    """Its options, as they were resolved."""
    origin: Origin
    """What it is made of."""
    loss: Loss
    stages: Sequence[FeatureLayer] = ()
    """Of its teacher, whose maps it compares with its own."""


def origin(
    requested: TrainConfig, config: TrainConfig, images: Mapping[str, DatasetInfo], teacher: Mapping[str, Input]
) -> Origin:
    """What a run is made of: options as they were `requested` and as they were resolved to `config`, the `images` and
    the `teacher` that options name, and initial weights."""
    inputs = {**{option: info.as_input() for option, info in images.items()}, **teacher}
    if config.model.weights and (found := weights.initial_input(config.model)):
        inputs["model.weights"] = found
    if file := models.defining_file(config.model.name):
        inputs["model.source"] = identity.file(*file)
    return Origin(requested=to_dict(requested), resolved=to_dict(config), inputs=inputs)


def train(
    runs: Sequence[Run],
    images: Mapping[str, DatasetInfo],
    *,
    device: torch.device,
    recipe: ViewRecipe,
    view_seed: int,
    schedule: EpochSchedule,
    save_every: int,
) -> None:
    """Train models, each with its loss and in its run folder, side by side on views of the `images` of data.train, and
    evaluate them on those of data.val; collective. Their configurations agree in all that concerns data, seed, epochs
    and saving."""
    config, info = runs[0].config, images["data.train"]
    require(
        config.data.batch_size <= info.count,
        f"data.batch_size {config.data.batch_size} is larger than the {info.count} images of {info.path}",
    )
    require(
        PairMixing.of(config.data, config.seed) is None or not recipe.mixes,
        "data.pair_mixup, data.pair_cutmix: the views are mixed already, by data.mixup or cutmix: leave them out",
    )
    networks = build_models(runs, info, device)  # before any run folder is made
    learners = open_run_folders(runs, networks, info, recipe, device)
    if not learners:
        return
    loader, val_loader = make_loaders(config, images, recipe, view_seed, device)
    _announce(learners, loader)
    fit(learners, loader, val_loader, config, save_every=save_every, schedule=schedule)


T = TypeVar("T", bound=TrainConfig)


def as_pretrained(config: T, images: dict[str, DatasetInfo]) -> tuple[T, dict[str, DatasetInfo]]:
    """Options and images of a model that begins with weights of a library that says what they were made to see:
    normalised and, unless the options say otherwise, of the size that it says."""
    found = models.preprocessing(config.model.name) if config.model.weights else None
    if found is None:
        return config, images
    if config.data.image_size is None:
        config = replace(config, data=replace(config.data, image_size=found.image_size))
    say(
        f"{config.model.name}: images of {config.data.image_size} px, normalised by mean {found.mean} and deviation "
        f"{found.std} as its weights were trained; reduced by area, where those were by {found.interpolation}"
    )
    return config, {option: replace(info, mean=found.mean, std=found.std) for option, info in images.items()}


def image_sizes(config: TrainConfig, info: DatasetInfo) -> tuple[int, int]:
    """Sides of the images that models are trained and evaluated on, in pixels."""
    size = info.image_size(config.data.image_size)
    return size, config.data.val_image_size or size


def least_share(config: TrainConfig) -> int:
    """How many images go through a model at once, at least; raises `UserError` where it would be none."""
    rank_share(config.data.batch_size)  # refuses fewer images than ranks
    require(
        config.data.batch_size // config.data.repeats >= dist.world_size(),
        f"data.repeats {config.data.repeats}: of {config.data.batch_size} images a step each of {dist.world_size()} "
        "processes is to have some: make it less",
    )
    least = config.data.batch_size // dist.world_size() // config.accumulate
    require(
        least > 0,
        f"accumulate {config.accumulate}: data.batch_size {config.data.batch_size} leaves a process fewer images than "
        "that: make it less",
    )
    return least


def build_models(runs: Sequence[Run], info: DatasetInfo, device: torch.device) -> list[nn.Module]:
    """A model for each run, initialised from its seed or its weights; raises `UserError` for one that does not take
    the images."""
    config, networks = runs[0].config, []
    least = least_share(config)
    size, val_size = image_sizes(config, info)
    for run in runs:
        torch.manual_seed(config.seed)
        options = run.config.model
        model = models.build_model(options.name, info.num_classes, options.options).to(device)
        probe.prepare(model, options.name, info.num_classes, size, "data.image_size")
        if options.weights:
            for note in weights.load_initial(model, options, list(probe.float32_modules(model))):
                say(f"{options.weights}: {note}")
        networks.append(model)
    sides = {"data.image_size": (size, least), "data.val_image_size": (val_size, 0)}
    if config.data.start_image_size:
        sides["data.start_image_size"] = (config.data.start_image_size, least)
    unused: dict[str, list[str]] = {}
    for run, model in zip(runs, networks, strict=True):
        name, auxiliary = run.config.model.name, run.config.model.auxiliary_weight > 0
        if name not in unused:
            for option, (side, train_images) in sides.items():
                probe.require_fits(model, name, info.num_classes, side, option, train_images=train_images)
            unused[name] = probe.unused_parameters(model, name, size, auxiliary=auxiliary)
            if unused[name]:
                say(f"{name}: {', '.join(unused[name])} have no part in the logits, and stay as they are")
        for key in unused[name]:
            model.get_parameter(key).requires_grad_(False)
        if run.config.recompute:
            recompute_blocks(model, name)
        build_optimizer(model, run.config.optim)  # refuses what the network does not have
    return [_reviewing(run, model, size, device) for run, model in zip(runs, networks, strict=True)]


def _reviewing(run: Run, model: nn.Module, image_size: int, device: torch.device) -> nn.Module:
    """The model or, where it compares its maps with the teacher's, the model with connectors, of the same seed."""
    config = run.config
    if not (run.stages and isinstance(config, DistillConfig) and config.kd.feature_weight):
        return model
    require(
        least_share(config) > 1,
        "kd.feature_weight: its layers normalise over the images that go through the model at once, and some processes "
        "have one only: give more by --data.batch_size, or less of --accumulate",
    )
    stages = features.stages(model, image_size, config.model.name)
    torch.manual_seed(config.seed)
    reviewing = ReviewingStudent(model, stages, run.stages, config.kd.feature_weight).to(device)
    pairs = zip(stages[::-1], run.stages[::-1], strict=False)
    said = ", ".join(f"{ours.words} to {theirs.words}" for ours, theirs in [*pairs][::-1])
    say(f"feature maps of {config.model.name} are compared with the teacher's: {said}")
    return reviewing


def open_run_folders(
    runs: Sequence[Run], networks: Sequence[nn.Module], info: DatasetInfo, recipe: ViewRecipe, device: torch.device
) -> list[Learner]:
    """A learner for each run that is not complete, as far as it had come; says which are."""
    size, val_size = image_sizes(runs[0].config, info)
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
    learners = []
    for run, model in zip(runs, networks, strict=True):
        config = run.config
        folder = RunFolder(config.run_dir, run.origin, tensorboard=config.tensorboard, log_to=config.log_to)
        if folder.complete:
            summary = read_summary(folder.path)
            found = f", top1 {summary.top1:.2f}" if summary and summary.top1 is not None else ""
            say(f"{folder.path}: complete already{found}")
            continue
        own = {"model": config.model.name, "options": config.model.options, **metadata}
        if source := run.origin.inputs.get("model.source"):
            own["source_sha256"] = source.holds["sha256"]
        steps_per_epoch = info.count // config.data.batch_size
        learners.append(Learner(model, config, run.loss, folder, device, own, steps_per_epoch))
    return learners


def make_loaders(
    config: TrainConfig, images: Mapping[str, DatasetInfo], recipe: ViewRecipe, view_seed: int, device: torch.device
) -> tuple[BetonLoader, BetonLoader | None]:
    """Loaders of this rank's share of the batches, of training and of held-out images."""
    info, val_info = images["data.train"], images.get("data.val")
    size, val_size = image_sizes(config, info)
    share = rank_share(config.data.batch_size // config.data.repeats)
    ahead = 0
    if config.data.order == "quasi_random":
        ahead, labels = config.data.window_pages, read_labels(info)
        if info.labelled and (labels[1:] == labels[:-1]).mean() > 0.5 and info.num_classes > 2:
            say(f"warning: images of a class lie together in {info.path}, so batches have few: write it with --shuffle")

    def make(
        shown: DatasetInfo, recipe: ViewRecipe, image_size: int, view_seed: int = 0, pages_ahead: int = 0
    ) -> BetonLoader:
        return BetonLoader(
            shown,
            config.data,
            recipe,
            batch_size=share.stop - share.start,
            image_size=image_size,
            device=device,
            view_seed=view_seed,
            mean=info.mean,
            std=info.std,
            pages_ahead=pages_ahead,
        )

    loader = make(info, recipe, size, view_seed, ahead)
    return loader, make(val_info, eval_recipe(val_info, recipe.kind), val_size) if val_info else None


def _announce(learners: Sequence[Learner], loader: BetonLoader) -> None:
    """Say what is trained, and on what."""
    config, info = learners[0].config, loader.info
    names = ", ".join(dict.fromkeys(learner.config.model.name for learner in learners))
    what = f"{learners[0].run.path}: {names}"
    if len(learners) > 1:
        what = f"{len(learners)} students side by side, {names}"
    say(
        f"{what} at {loader.image_size} px on {info.count} images of {info.dataset}, {config.epochs} epochs of "
        f"{learners[0].steps_per_epoch} steps, {dist.world_size()} processes on {loader.device.type}, in "
        f"{precision.words(config.amp)}"
    )

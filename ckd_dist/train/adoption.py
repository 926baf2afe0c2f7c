"""Checkpoints of other programs as a run: what train_teacher would have left, measured on held-out images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ckd_dist.core import checkpoint, dist, identity, precision
from ckd_dist.core.console import say
from ckd_dist.core.errors import require
from ckd_dist.core.files import content_sha256, require_regular
from ckd_dist.core.identity import Origin
from ckd_dist.core.options import to_dict
from ckd_dist.core.run_folder import RunFolder, is_complete, read_summary
from ckd_dist.data import classes
from ckd_dist.data.beton import open_beton
from ckd_dist.data.dataset import DatasetInfo
from ckd_dist.data.loader import BetonLoader
from ckd_dist.nn import fitting, foreign, models, probe
from ckd_dist.nn.forward import to_device
from ckd_dist.train.evaluation import evaluate
from ckd_dist.train.options import AdoptConfig


@dataclass(frozen=True)
class Member:
    """A file that becomes a checkpoint of the run."""

    path: str
    epoch: int
    sha256: str


@dataclass(frozen=True)
class Setting:
    """What all the files have in common."""

    config: AdoptConfig
    """With the precision resolved."""
    info: DatasetInfo
    """The held-out images."""
    model: nn.Module
    """Takes the weights of one after another."""
    metadata: dict[str, Any]
    device: torch.device

    def load(self, path: str) -> tuple[fitting.Fit, int | None]:
        """Give the model the weights of a file; returns what they are, and the epoch that the file tells."""
        config = self.config
        content = foreign.read(path, "files", trust=config.trust)
        found = fitting.fit(content, self.model, config.model.name, f"files: {path}", config.key)
        self.model.load_state_dict(found.weights)
        return found, foreign.epoch_of(content)


def adopt(config: AdoptConfig, device: torch.device) -> None:
    """Make the run folder of the files that the options name, unless it is complete; collective.

    Raises `UserError` for a file that does not fit, and for one below min_top1: before anything is written.
    """
    setting = describe(config, device)
    members = survey(setting)
    origin = origin_of(setting, members)
    if dist.on_main(lambda: is_complete(Path(config.run_dir), origin)):
        summary = read_summary(Path(config.run_dir))
        assert summary is not None
        say(f"{config.run_dir}: complete already, top1 {summary.top1:.2f}")
        return
    figures = {member.epoch: measure(setting, member) for member in members}
    folder = RunFolder(config.run_dir, origin)
    folder.rewind(-1)  # what an adoption that was killed had written
    for member in members:
        keep(setting, folder, member, figures[member.epoch])
    parameters = sum(parameter.numel() for parameter in setting.model.parameters())
    last = members[-1].epoch
    # Nothing was trained here: what the training took, its own program knows.
    none = {"train_seconds": 0.0, "side_by_side": 1, "images_per_s": 0.0, "steps": 0}
    folder.write_summary(
        {**figures[last], **none, "epochs": last, "parameters": parameters, "world_size": dist.world_size()}
    )
    say(f"{folder.path}: {len(members)} checkpoints of {config.model.name}, as train_teacher leaves them")


def describe(config: AdoptConfig, device: torch.device) -> Setting:
    """The network and the held-out images; raises `UserError` where these do not go together."""
    info = open_beton(config.data.val, "data.val", verify=config.data.verify)
    classes.require_labels(info, "data.val")
    names = class_names(config.classes) if config.classes else list(info.classes)
    num_classes = len(names) or info.num_classes
    info = classes.match(info, "data.val", names, num_classes, config.classes or "it", config.data.map_classes)
    name, shown = config.model.name, models.preprocessing(config.model.name)
    told = {} if shown is None else asdict(shown)
    size = config.data.image_size or info.image_size(None if info.small else told.get("image_size"))
    model = models.build_model(name, num_classes, config.model.options)
    probe.prepare(model, name, num_classes, size, "data.image_size")
    metadata: dict[str, Any] = {
        "model": name,
        "options": config.model.options,
        "num_classes": num_classes,
        "image_size": size,
        "val_image_size": size,
        "mean": list(config.mean or told.get("mean") or info.mean),
        "std": list(config.std or told.get("std") or info.std),
        "classes": names,
    }
    if source := models.defining_file(name):
        metadata["source_sha256"] = source[1]
    if told and not info.small:
        metadata["crop_share"] = told["crop_share"]
    _announce(metadata, None if shown is None else shown.interpolation)
    config = precision.resolve(config, config.run_dir)
    return Setting(config, info, to_device(model, device), metadata, device)


def _announce(metadata: dict[str, Any], interpolation: str | None) -> None:
    """Say what the network is shown: what is wrong here costs accuracy, and nothing else tells."""
    mean, std = (" ".join(f"{value:.4g}" for value in metadata[name]) for name in ("mean", "std"))
    crop = f", the central {metadata['crop_share']:.3g} of it" if "crop_share" in metadata else ""
    library = f", as its library says, which resizes by {interpolation}; here it is by area" if interpolation else ""
    what = f"{metadata['model']} of {metadata['num_classes']} classes at {metadata['image_size']} px{crop}"
    say(f"{what}, normalised by mean {mean} and std {std}{library}")


def class_names(path: str) -> list[str]:
    """The lines of a file; raises `UserError` where it has none, or one twice."""
    require_regular(Path(path), "classes")
    try:
        names = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        names = []
    require(bool(names) and all(names), f"classes: {path} is no list of names: write one of UTF-8, a class a line")
    twice = next((name for name in names if names.count(name) > 1), None)
    require(twice is None, f"classes: {path} names {twice} twice: give each class a name of its own")
    return names


def survey(setting: Setting) -> list[Member]:
    """The files in the order of their epochs; says what of each is taken. Raises `UserError` for one that does not fit
    or has no epoch."""
    config = setting.config
    members: list[Member] = []
    for number, path in enumerate(config.files):
        found, told = setting.load(path)
        epoch = config.epochs[number] if config.epochs else told
        require(epoch is not None, f"files: {path} does not tell its epoch: give those of all files with --epochs")
        assert epoch is not None
        require(
            epoch >= 0 and all(epoch != each.epoch for each in members),
            f"files: {path} is of epoch {epoch}, as another one: tell them apart with --epochs",
        )
        members.append(Member(path, epoch, dist.on_main(partial(content_sha256, Path(path)))))
        notes = list(found.notes)
        if found.others:
            notes.append(f"{', '.join(found.others)} fits too: to take it, give --key {found.others[0]}")
        what = f"the weights at {found.key}" if found.key else "the weights that are all of it"
        say("; ".join([f"{path}: {what}, epoch {epoch}", *notes]))
    return sorted(members, key=lambda member: member.epoch)


def origin_of(setting: Setting, members: Sequence[Member]) -> Origin:
    """What the run is made of: options, held-out images, and the content of every file."""
    config, metadata = setting.config, setting.metadata
    epochs = [member.epoch for member in members]
    options = to_dict(replace(config, mean=metadata["mean"], std=metadata["std"]))
    named = hashlib.sha256("\n".join(metadata["classes"]).encode()).hexdigest()
    inputs = {"data.val": setting.info.as_input()}
    if source := models.defining_file(config.model.name):
        inputs["model.source"] = identity.file(*source)
    for member in members:
        inputs[f"files {member.epoch}"] = identity.foreign(member.path, member.sha256)
    return Origin(
        requested=to_dict(config),
        resolved={**options, "classes": named, "epochs": epochs[-1], "checkpoints": epochs},
        inputs=inputs,
    )


def measure(setting: Setting, member: Member) -> dict[str, float]:
    """What a file reaches on the held-out images; raises `UserError` where that is less than min_top1; collective."""
    config = setting.config
    setting.load(member.path)
    loader = BetonLoader.for_evaluation(setting.info, config.data, setting.metadata, setting.device)
    (figures,) = evaluate({member.path: setting.model}, loader, config.amp).values()
    shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
    say(f"epoch {member.epoch}  val {shown}  ({setting.info.count} images)")
    require(
        config.min_top1 is None or figures["top1"] >= config.min_top1,
        f"min_top1: {member.path} reaches {figures['top1']:.2f} % on {setting.info.path}, less than {config.min_top1}"
        " %: look whether --mean, --std, --data.image_size and the order of the classes are those of its training",
    )
    return figures


def keep(setting: Setting, folder: RunFolder, member: Member, figures: dict[str, float]) -> None:
    """Write a file's checkpoint, and its line of metrics.jsonl."""
    if dist.rank():
        return
    found, _ = setting.load(member.path)
    metadata = {**setting.metadata, "epoch": member.epoch, "evaluation": figures}
    state = {"weights": found.weights, "metadata": metadata}
    checkpoint.save(checkpoint.checkpoint_path(folder.path, member.epoch), state)
    folder.log("val", member.epoch, member.epoch - 1, **figures)  # of its steps, only its own program knows the number

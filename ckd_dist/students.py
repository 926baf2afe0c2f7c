"""Teach students from cached logits, online teachers, or labels alone: one, or many side by side on one loader and one
read of the store. What `distill` and `search` do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ckd_dist import (
    caching,
    checkpoint,
    classes,
    data,
    dist,
    engine,
    identity,
    models,
    precision,
    selection,
    training,
)
from ckd_dist.config import DistillConfig, MapClasses, TeacherConfig, require
from ckd_dist.data import DatasetInfo
from ckd_dist.identity import Input, saved_options
from ckd_dist.lessons import Lessons
from ckd_dist.log import say
from ckd_dist.recipe import ViewRecipe
from ckd_dist.store import codecs
from ckd_dist.store.manifest import Manifest
from ckd_dist.store.reader import StoreReader


def train(asked: Sequence[DistillConfig], images: Mapping[str, DatasetInfo], device: torch.device) -> None:
    """Train the students that `asked` describes, side by side, on the `images` of data.train and data.val; collective.
    They agree in all but model, optimiser, loss, run folder and which of one teacher's checkpoints they hear, if
    any."""
    configs = [settled(each) for each in asked]
    teacher = open_teacher(configs, device)
    images = {option: teacher.match(info, option, asked[0].data.map_classes) for option, info in images.items()}
    taught = teaching(configs, teacher, images["data.train"])
    trainees = [
        training.Trainee(config, training.origin(each, config, images, teacher.inputs(each, config)), loss)
        for each, config, loss in zip(asked, configs, taught.losses, strict=True)
    ]
    training.train(
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

    losses: list[engine.Loss]
    """Of each student."""
    source: Callable[[int], engine.Source]
    """The view of an epoch, and who teaches it."""
    recipe: ViewRecipe
    view_seed: int


def teaching(configs: Sequence[DistillConfig], teacher: Teacher, info: DatasetInfo) -> Teaching:
    """For configurations that are `settled`, and images that match the teacher; raises `UserError` where teachers,
    images and losses do not go together."""
    config = configs[0]
    dense = codecs.Dense(info.num_classes)
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


@dataclass(frozen=True)
class Teacher:
    """A store or a run of which students hear some checkpoints; neither, for plain students."""

    path: str = ""
    manifest: Manifest | None = None
    """Of a store."""
    online: dict[int | str, nn.Module] = field(default_factory=dict)
    """Of a run: checkpoints on the device."""
    metadata: dict = field(default_factory=dict)
    """Of a run's checkpoints."""
    weights: dict[int, str] = field(default_factory=dict)
    """Of a run: epoch -> sha256."""

    def match(self, info: DatasetInfo, option: str, how: MapClasses | None) -> DatasetInfo:
        """The images, their classes as the teacher's; see `classes.match`."""
        if self.manifest:
            count = self.manifest.dataset["num_classes"]
            return classes.match(info, option, self.manifest.classes, count, self.path, how)
        return classes.match_model(info, option, self.metadata, self.path, how) if self.online else info

    def inputs(self, asked: DistillConfig, config: DistillConfig) -> dict[str, Input]:
        """What a student takes of it, by option."""
        heard = config.teacher.checkpoints
        if not heard:
            return {}
        if self.manifest:
            found = {"teacher.store": identity.store(self.path, self.manifest, heard)}
            chosen = self.manifest.checkpoints[self.manifest.members[heard[0]]]["weights_sha256"]
        else:
            found = {"teacher.run": identity.run(self.path, {int(name): self.weights[int(name)] for name in heard})}
            chosen = self.weights[int(heard[0])]
        if asked.teacher.selection:
            found["teacher.selection"] = identity.selection(asked.teacher.selection, chosen)
        return found


def open_teacher(configs: Sequence[DistillConfig], device: torch.device) -> Teacher:
    """The teacher of students whose configurations are `settled`; raises `UserError` where its files are damaged."""
    teacher = next((each for each in configs if each.teacher.checkpoints), configs[0]).teacher
    if teacher.store:
        return Teacher(teacher.store, manifest=Manifest.load(Path(teacher.store), "teacher.store"))
    if not teacher.run:
        return Teacher()
    files = checkpoint.trajectory(teacher.run, "teacher.run")
    online, weights = {}, {}
    for name in _union(configs):
        model, metadata = models.load_model(files[int(name)], "teacher.run")
        weights[int(name)] = checkpoint.weights_sha256(model.state_dict())
        online[name] = engine.to_device(model, device)
    return Teacher(teacher.run, online=online, metadata=metadata, weights=weights)


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


def cached_teacher(configs: Sequence[DistillConfig], manifest: Manifest, info: DatasetInfo) -> StoreReader:
    """The store, open for all checkpoints that the students hear; raises `UserError` where it does not fit the images,
    a loss or the views."""
    seed, views = configs[0].data.view_seed, configs[0].data.views
    store = next(each.teacher.store for each in configs if each.teacher.store)
    reader = StoreReader(store, _union(configs), info)
    codec = reader.codec
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
    configs: Sequence[DistillConfig], teacher: Teacher, info: DatasetInfo, codec: codecs.Codec
) -> dict[int | str, nn.Module]:
    """The checkpoints of a run, none of a store; raises `UserError` where students' images are not the teacher's."""
    if not teacher.online:
        return {}
    _require_served(configs, codec)
    require(
        configs[0].data.start_image_size is None,
        "data.start_image_size is not for an online teacher, who would see the small images too: cache its logits",
    )
    for key, ours in (
        ("image_size", info.image_size(configs[0].data.image_size)),
        ("mean", list(info.mean)),
        ("std", list(info.std)),
    ):
        require(
            teacher.metadata[key] == ours,
            f"teacher.run: the online teacher was trained with {key} {teacher.metadata[key]}, the student gets "
            f"{ours}: cache its logits instead",
        )
    _say_teachers(configs, "online, the logits")
    return teacher.online

"""The teacher of students: a store or a run, and the checkpoints that each student hears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ckd_dist.core import checkpoint, dist, identity, results
from ckd_dist.core.console import say
from ckd_dist.core.errors import require
from ckd_dist.core.identity import Input
from ckd_dist.data import classes
from ckd_dist.data.dataset import DatasetInfo
from ckd_dist.data.options import MapClasses
from ckd_dist.nn import forward, models
from ckd_dist.store import recording
from ckd_dist.store.codecs.base import Codec
from ckd_dist.store.codecs.targets import require_supported
from ckd_dist.store.codecs.topk import TopK
from ckd_dist.store.manifest import Manifest
from ckd_dist.store.reader import StoreReader
from ckd_dist.train.options import DistillConfig, TeacherConfig

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
            found = {"teacher.store": self.manifest.as_input(self.path, heard)}
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
        online[name] = forward.to_device(model, device)
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
    epoch, chosen = results.read_choice(asked.selection, "teacher.selection")
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


def _require_served(configs: Sequence[DistillConfig], codec: Codec) -> None:
    for each in configs:
        if each.teacher.checkpoints:
            require_supported(codec, each.kd, each.teacher.at_once)


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
        not (isinstance(codec, TopK) and reader.recipe.mixes and any(each.kd.loss == "dkd" for each in configs)),
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
    if isinstance(codec, TopK) and temperatures:
        some = torch.from_numpy(reader.rows(np.arange(min(1000, info.count)), 0)[:, 0])
        share = codec.kept(some, max(temperatures)).mean().item()
        if share < 0.5:
            say(
                f"warning: at kd.temperature {max(temperatures):g} the {codec.k} classes kept hold {100 * share:.0f} % "
                "of the teacher's softmax: a student learns little from so few; lower it, or use a dense store"
            )
    if note := dist.on_main(lambda: manifest.decoding_note(recording.image_digests(manifest, info))):
        say(note)
    return reader


def online_teacher(
    configs: Sequence[DistillConfig], teacher: Teacher, info: DatasetInfo, codec: Codec
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

"""Where a student's teacher comes from: the cached logits of a store, or the networks of a run, run at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from ckd_dist.nn import features, models
from ckd_dist.nn.forward import to_device
from ckd_dist.store import recording
from ckd_dist.store.codecs.base import Codec
from ckd_dist.store.codecs.dense import Dense
from ckd_dist.store.codecs.targets import require_supported
from ckd_dist.store.codecs.topk import TopK
from ckd_dist.store.manifest import Manifest
from ckd_dist.store.reader import StoreReader
from ckd_dist.train.options import DistillConfig, TeacherConfig
from ckd_dist.train.records import OnlineRecords

# ------------------------------------------------------------------------------------------- which checkpoints


def resolve_checkpoints(teacher: TeacherConfig) -> TeacherConfig:
    """The options with the checkpoints that a selection, or nothing at all, stands for: of a race there may be several.

    Raises `UserError` for one that is not there or, for a selection, has other weights.
    """
    if not teacher.store and not teacher.run:
        return teacher
    manifest = Manifest.load(Path(teacher.store), "teacher.store") if teacher.store else None
    files = checkpoint.trajectory(teacher.run, "teacher.run") if teacher.run else {}
    available = manifest.members if manifest else files
    if not teacher.selection:
        return replace(teacher, checkpoints=checkpoint.choose(available, teacher.checkpoints, "teacher.checkpoints"))
    chosen = results.read_choice(teacher.selection, "teacher.selection")
    weights: dict[str, str] = {}
    if manifest:
        members = manifest.members.items()
        weights = {str(name): manifest.checkpoints[member]["weights_sha256"] for name, member in members}
    else:
        for epoch in checkpoint.choose(files, [int(name.rpartition("/")[2]) for name in chosen], "teacher.selection"):
            model, _ = models.load_model(files[epoch], "teacher.run", teacher.model)
            weights[str(epoch)] = checkpoint.weights_sha256(model.state_dict())
    found: list[int | str] = []
    for name, wanted in chosen.items():
        same = [each for each, weights_sha256 in weights.items() if weights_sha256 == wanted]
        require(
            bool(same),
            f"teacher.selection: it chose epoch {name} with weights {wanted[:12]}, {teacher.store or teacher.run} has "
            f"{weights.get(name, 'none')[:12]}: they are of different runs",
        )
        first = name if name in same else same[0]
        found.append(int(first) if first.isdecimal() else first)
    return replace(teacher, selection=None, checkpoints=found)


def all_checkpoints(configs: Sequence[DistillConfig]) -> list[int | str]:
    """The checkpoints of all students, in the order in which they are first named."""
    return list(dict.fromkeys(name for each in configs for name in each.teacher.checkpoints))


# ------------------------------------------------------------------------------------------- cached logits


@dataclass(frozen=True)
class CachedTeacher:
    """A logit store."""

    path: str
    manifest: Manifest

    def match(self, info: DatasetInfo, option: str, how: MapClasses | None) -> DatasetInfo:
        """The images with the teacher's classes, see `classes.match`."""
        count = self.manifest.dataset["num_classes"]
        return classes.match(info, option, self.manifest.classes, count, self.path, how)

    def inputs(self, checkpoints: Sequence[int | str]) -> dict[str, Input]:
        """What a student of these checkpoints is made of, by option."""
        return {"teacher.store": self.manifest.as_input(self.path, checkpoints)}

    def weights_sha256(self, name: int | str) -> str:
        """Of a checkpoint."""
        return self.manifest.checkpoints[self.manifest.members[name]]["weights_sha256"]

    def open(self, configs: Sequence[DistillConfig], info: DatasetInfo) -> StoreReader:
        """The records of all checkpoints that the students learn from; collective.

        Raises `UserError` where the store does not fit the images, a loss or the views, or a shard is damaged.
        """
        seed, views = configs[0].data.view_seed, configs[0].data.views
        reader = StoreReader(self.path, all_checkpoints(configs), info)
        codec, manifest = reader.codec, self.manifest
        manifest.require_plain_views("teacher.store", Path(self.path))
        _require_supported(configs, codec)
        is_topk = isinstance(codec, TopK)
        require(
            not (is_topk and reader.recipe.mixes and any(each.kd.loss == "dkd" for each in configs)),
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
            f"data.views is {views}, {self.path} holds {reader.views} views of epoch {fewest}: cache more or ask for "
            "less",
        )
        reader.check_shards(views or reader.views, content=False)
        _say_teacher(configs, "cached logits")
        _warn_of_a_cut_softmax(configs, reader, info.count)
        if note := dist.on_main(lambda: manifest.decoding_note(recording.image_digests(manifest, info))):
            say(note)
        return reader


def _warn_of_a_cut_softmax(configs: Sequence[DistillConfig], reader: StoreReader, count: int) -> None:
    """Warn where the classes that a top-k store keeps hold less than half of the teacher's softmax."""
    temperatures = [each.kd.temperature for each in configs if each.teacher.store and each.kd.loss != "standardized"]
    if not isinstance(reader.codec, TopK) or not temperatures:
        return
    some = torch.from_numpy(reader.rows(np.arange(min(1000, count)), 0)[:, 0])
    share = reader.codec.kept(some, max(temperatures)).mean().item()
    if share < 0.5:
        say(
            f"warning: at kd.temperature {max(temperatures):g} the {reader.codec.k} classes kept hold "
            f"{100 * share:.0f} % of the teacher's softmax: a student learns little from so few; lower it, or use a "
            "dense store"
        )


# ------------------------------------------------------------------------------------------- online


@dataclass(frozen=True)
class OnlineTeacher:
    """Some checkpoints of a run of train_teacher, on the device."""

    path: str
    networks: Mapping[int | str, nn.Module]
    metadata: Mapping
    """Of the last of them."""
    weights: Mapping[int, str]
    """Epoch -> sha256."""
    amp: str
    """Precision of the forward passes."""
    stages: Sequence[features.FeatureLayer] = ()
    """Of the only checkpoint, those whose maps students ask for."""

    @property
    def checkpoints(self) -> list[int | str]:
        """Their names."""
        return list(self.networks)

    @property
    def codec(self) -> Dense:
        """Of the records."""
        return Dense(self.metadata["num_classes"])

    @property
    def codecs(self) -> list[Dense]:
        """Of the records of each checkpoint."""
        return [self.codec] * len(self.networks)

    def match(self, info: DatasetInfo, option: str, how: MapClasses | None) -> DatasetInfo:
        """The images with the teacher's classes, see `classes.match`."""
        return classes.match_model(info, option, self.metadata, self.path, how)

    def inputs(self, checkpoints: Sequence[int | str]) -> dict[str, Input]:
        """What a student of these checkpoints is made of, by option."""
        weights = {int(name): self.weights_sha256(name) for name in checkpoints}
        return {"teacher.run": identity.run(self.path, weights)}

    def weights_sha256(self, name: int | str) -> str:
        """Of a checkpoint."""
        return self.weights[int(name)]

    def open(self, configs: Sequence[DistillConfig], info: DatasetInfo) -> OnlineTeacher:
        """Itself, with its stages where students compare maps; raises `UserError` where their images are not those that
        it was trained on, or it has no stages."""
        _require_supported(configs, self.codec)
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
                self.metadata[key] == ours,
                f"teacher.run: the online teacher was trained with {key} {self.metadata[key]}, the student gets "
                f"{ours}: cache its logits instead",
            )
        of_maps = any(each.kd.feature_weight for each in configs)
        _say_teacher(configs, "online, the logits and feature maps" if of_maps else "online, the logits")
        if not of_maps:
            return self
        (network,) = self.networks.values()
        name = self.metadata["model"]
        return replace(self, stages=features.stages(network, self.metadata["image_size"], f"the teacher, {name},"))

    def records(self, checkpoints: Sequence[int]) -> OnlineRecords:
        """Makes records of the checkpoints at these positions."""
        names = self.checkpoints
        networks = [self.networks[names[position]] for position in checkpoints]
        return OnlineRecords(networks, self.codec, self.amp, self.stages)


# ------------------------------------------------------------------------------------------- both


def open_teacher(configs: Sequence[DistillConfig], device: torch.device) -> CachedTeacher | OnlineTeacher | None:
    """The teacher of students whose checkpoints are resolved, None where they have none; raises `UserError` where its
    files are damaged."""
    config = next((each for each in configs if each.teacher.checkpoints), configs[0])
    if config.teacher.store:
        return CachedTeacher(config.teacher.store, Manifest.load(Path(config.teacher.store), "teacher.store"))
    if not config.teacher.run:
        return None
    files = checkpoint.trajectory(config.teacher.run, "teacher.run")
    networks, weights = {}, {}
    for name in all_checkpoints(configs):
        model, metadata = models.load_model(files[int(name)], "teacher.run", config.teacher.model)
        weights[int(name)] = checkpoint.weights_sha256(model.state_dict())
        networks[name] = to_device(model, device)
    return OnlineTeacher(config.teacher.run, networks, metadata, weights, config.amp)


def _require_supported(configs: Sequence[DistillConfig], codec: Codec) -> None:
    for each in configs:
        if each.teacher.checkpoints:
            require_supported(codec, each.kd, each.teacher.at_once)


def _say_teacher(configs: Sequence[DistillConfig], how: str) -> None:
    say(f"teacher: {how} of {', '.join(f'epoch {name}' for name in all_checkpoints(configs))}")

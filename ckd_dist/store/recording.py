"""Compute what a store's manifest describes: run checkpoints over views of the images, write missing shards."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ckd_dist.core import checkpoint, dist
from ckd_dist.core.console import ProgressDisplay, say
from ckd_dist.core.errors import require
from ckd_dist.data.batch import Batch
from ckd_dist.data.dataset import DatasetInfo
from ckd_dist.data.options import LoaderConfig
from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.data.views.draws import SAMPLED_CODEC, uniforms
from ckd_dist.nn import models
from ckd_dist.nn.forward import forward_logits, to_device
from ckd_dist.store import bases
from ckd_dist.store.background import BackgroundWriter
from ckd_dist.store.codecs.base import Codec
from ckd_dist.store.manifest import Manifest, Shard
from ckd_dist.store.size import format_bytes
from ckd_dist.store.writer import ShardWriter, is_written

Work = list[tuple[list[str], list[list[Shard]]]]
"""For each group of checkpoints that are in memory together, and for each view and range of samples, the shards to
write. The ranges are what ranks share out."""


def image_digests(manifest: Manifest, info: DatasetInfo) -> dict[str, str]:
    """`loader.image_digests` of the images as the teacher of a store saw them."""
    from ckd_dist.data import loader  # which needs FFCV

    recipe = ViewRecipe.from_dict(manifest.recipe)
    return loader.image_digests(info, recipe, manifest.view_seed, manifest.forward["image_size"])


def encode(
    codec: Codec, manifest: Manifest, shard: Shard, ids: np.ndarray, logits: torch.Tensor, labels: torch.Tensor | None
) -> torch.Tensor:
    """Records uint8 [n, bytes] by the `codec` of a shard's checkpoint, of samples `ids` [n] of the shard: logits
    float32 [n, classes], labels int64 [n], or None, where the teacher's own answers stand for them: so top-k spends no
    place on a class that means nothing."""
    if labels is None:
        labels = logits.argmax(dim=1)
    draws = None
    if codec.needs_draws:
        counter = SAMPLED_CODEC + manifest.checkpoints[shard.checkpoint]["epoch"]
        draws = torch.from_numpy(uniforms(manifest.view_seed, shard.view, ids, counter))
        draws = draws.to(logits.device, non_blocking=True)
    return codec.encode(logits, labels, draws)


class Recorder:
    """The images and the teacher's run that a manifest names: gives the checkpoints' logits of any view."""

    def __init__(
        self,
        manifest: Manifest,
        info: DatasetInfo,
        run: str,
        config: LoaderConfig,
        device: torch.device,
        code: str | None = None,
    ):
        """`code`: see `models.load_model`."""
        from ckd_dist.data.loader import BetonLoader  # which needs FFCV

        self.manifest, self.device, self.batch_size, self._code = manifest, device, config.batch_size, code
        self._trajectory = checkpoint.trajectory(run, "teacher.run")
        forward = manifest.forward
        self.loader = BetonLoader(
            info,
            config,
            ViewRecipe.from_dict(manifest.recipe),
            batch_size=config.batch_size,
            image_size=forward["image_size"],
            device=device,
            view_seed=manifest.view_seed,
            mean=forward["mean"],
            std=forward["std"],
        )

    def load(self, names: list[str]) -> dict[str, nn.Module]:
        """The checkpoints on the device; raises `UserError` where the run's are not those of the manifest."""
        teachers = {}
        for name in names:
            wanted = self.manifest.checkpoints[name]
            (epoch,) = checkpoint.choose(self._trajectory, [wanted["epoch"]], "teacher.run")
            model, _ = models.load_model(self._trajectory[epoch], "teacher.run", self._code)
            found = checkpoint.weights_sha256(model.state_dict())
            require(
                found == wanted["weights_sha256"],
                f"teacher.run: {self._trajectory[epoch]} has weights {found[:12]}, the store's {name} is of weights "
                f"{wanted['weights_sha256'][:12]}: name the run that the store was written from",
            )
            teachers[name] = to_device(model, self.device)
        return teachers

    def logits(
        self, teachers: dict[str, nn.Module], ids: np.ndarray, view: int
    ) -> Iterator[tuple[Batch, dict[str, torch.Tensor]]]:
        """Every batch, decoded once, with the logits of each checkpoint, float32 [n, classes], of the classes that
        the store keeps."""
        for batch in self.loader.batches(ids, view):
            logits = {}
            for name, model in teachers.items():
                every = forward_logits(model, batch.images, self.manifest.forward["amp"])
                columns = self.manifest.forward.get("columns")
                logits[name] = every if columns is None else every[:, columns]
            yield batch, logits

    def fit(self, store: Path, names: list[str]) -> None:
        """Fit the bases that are missing, if the codec has any; collective."""

        def logits_of(name: str) -> bases.Logits:
            return partial(self._sampled_logits, self.load([name]))

        bases.fit_missing(store, self.manifest, names, logits_of)

    def _sampled_logits(self, teachers: dict[str, nn.Module], ids: np.ndarray, view: int) -> Iterator[torch.Tensor]:
        """The logits of the one teacher for samples `ids`, sorted, of a view, from the same batches as when their
        records are written: in another batch they may differ in the last digit."""
        ((name, _),) = teachers.items()
        for shard in self.manifest.shards(name, view):
            wanted = ids[(ids >= shard.first) & (ids <= shard.last)]
            starts = shard.first + np.unique((wanted - shard.first) // self.batch_size) * self.batch_size
            batches = [np.arange(start, min(start + self.batch_size, shard.last + 1)) for start in starts]
            if batches:
                for batch, logits in self.logits(teachers, np.concatenate(batches), view):
                    yield logits[name][torch.from_numpy(np.isin(batch.ids.numpy(), wanted))].cpu()

    def write(
        self, store: Path, teachers: dict[str, nn.Module], ranges: list[list[Shard]]
    ) -> Generator[int, None, None]:
        """Write shards, those of a range in one pass over its images; yields the number of records after each batch."""
        encodings = bases.encodings(store, self.manifest, teachers)
        with ExitStack() as opened, BackgroundWriter(self.device) as disk:
            for shards in ranges:
                writers = {
                    shard.checkpoint: opened.enter_context(
                        ShardWriter(store, shard, self.manifest, encodings[shard.checkpoint].basis_sha256)
                    )
                    for shard in shards
                }
                view, first, last = shards[0].view, shards[0].first, shards[0].last
                needed = {name: teachers[name] for name in writers}
                for batch, batch_logits in self.logits(needed, np.arange(first, last + 1), view):
                    for name, logits in batch_logits.items():
                        shard, ids = writers[name].shard, batch.ids.numpy()
                        labels = batch.labels if batch.labelled else None
                        records = encode(encodings[name].codec, self.manifest, shard, ids, logits, labels)
                        disk.append(writers[name], records, logits)
                    yield len(batch.ids) * len(batch_logits)
                for writer in writers.values():
                    disk.commit(writer)
            disk.finish()


def missing_work(store: Path, manifest: Manifest, names: list[str], views: int, at_once: int | None) -> Work:
    """What is still to be written of the checkpoints `names` and the first `views` views."""
    size = at_once or len(names)
    work = []
    for group in (names[i : i + size] for i in range(0, len(names), size)):
        ranges = [
            [shard for shard in shards if not is_written(store, shard)]
            for view in range(views)
            for shards in zip(*(manifest.shards(name, view) for name in group), strict=True)
        ]
        work.append((group, [shards for shards in ranges if shards]))
    return [(group, ranges) for group, ranges in work if ranges]


def count_records(ranges: list[list[Shard]]) -> int:
    """Records in shards."""
    return sum(shard.count for shards in ranges for shard in shards)


def write_work(store: Path, recorder: Recorder, work: Work) -> None:
    """Write the shards of `work`, ranks sharing the ranges; collective."""
    rank, world = dist.rank(), dist.world_size()
    manifest = recorder.manifest
    size = manifest.recorded.record_bytes
    mine = [(group, ranges[rank::world]) for group, ranges in work]
    total = sum(count_records(ranges) for _, ranges in mine)
    started, done = time.perf_counter(), 0
    recorder.fit(store, [name for group, _ in work for name in group])
    with dist.uneven_work(), ProgressDisplay(total, unit="records") as progress:
        for number, (group, ranges) in enumerate(mine, start=1):
            teachers = recorder.load(group) if ranges else {}
            title = f"checkpoints {number}/{len(mine)}" if len(mine) > 1 else "caching"
            for count in recorder.write(store, teachers, ranges):
                done += count
                progress.update(done, title, f"{format_bytes(done * size)} of {format_bytes(total * size)}")
    seconds, records = time.perf_counter() - started, sum(count_records(ranges) for _, ranges in work)
    say(
        f"{store}: complete, {records:,} records ({format_bytes(records * size)}) written in {seconds:.1f} s "
        f"({records / seconds:,.0f} records/s)"
    )

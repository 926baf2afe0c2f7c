"""Compute what a store's manifest describes: run checkpoints over views of the images, write missing shards."""

from __future__ import annotations

import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ckd_dist.core import checkpoint, dist, precision
from ckd_dist.core.console import ProgressDisplay, say
from ckd_dist.core.errors import TrainingError, require
from ckd_dist.core.options import Amp
from ckd_dist.data import classes, loader
from ckd_dist.data.batch import Batch
from ckd_dist.data.beton import open_beton
from ckd_dist.data.dataset import DatasetInfo, train_recipe
from ckd_dist.data.loader import BetonLoader
from ckd_dist.data.options import LoaderConfig
from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.data.views.draws import SAMPLED_CODEC, uniforms
from ckd_dist.nn import models
from ckd_dist.nn.forward import forward_logits, to_device
from ckd_dist.store import codecs
from ckd_dist.store.manifest import Manifest, Shard, member_name
from ckd_dist.store.options import CacheConfig
from ckd_dist.store.writer import (
    ShardWriter,
    all_shards,
    clear_leftovers,
    is_written,
    locked,
    merged,
    open_store,
    size_of,
)

Work = list[tuple[list[str], list[list[Shard]]]]
"""For each group of checkpoints that are in memory together, and for each view and range of samples, the shards to
write. The ranges are what ranks share out."""


def image_digests(manifest: Manifest, info: DatasetInfo) -> dict[str, str]:
    """`loader.image_digests` of the images as the teacher of a store saw them."""
    recipe = ViewRecipe.from_dict(manifest.recipe)
    return loader.image_digests(info, recipe, manifest.view_seed, manifest.forward["image_size"])


def encode(
    manifest: Manifest, shard: Shard, ids: np.ndarray, logits: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Records uint8 [n, bytes] of samples `ids` [n] of a shard: logits float32 [n, classes], labels int64 [n]."""
    codec, draws = manifest.recorded, None
    if isinstance(codec, codecs.Sampled):
        counter = SAMPLED_CODEC + manifest.checkpoints[shard.checkpoint]["epoch"]
        draws = torch.from_numpy(uniforms(manifest.view_seed, shard.view, ids, counter))
        draws = draws.to(logits.device, non_blocking=True)
    return codec.encode(logits, labels, draws)  # type: ignore[arg-type]  # only sampled reads them


class Disk:
    """Brings records from the device to disk, in order.

    On a GPU by a thread, while the next batches are computed: the device is waited for there alone, and an error is
    raised by a later call. On a CPU at once: a thread would take from the computing more than it hides.
    """

    def __init__(self, device: torch.device) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1) if device.type == "cuda" else None
        self._pending: deque[Future] = deque()

    def append(self, writer: ShardWriter, records: torch.Tensor, logits: torch.Tensor) -> None:
        """Write the `records` of `logits`, uint8 [n, bytes] and float32 [n, classes]."""
        largest = logits.abs().amax()
        arrived = None
        if records.is_cuda:
            records, largest = (_pinned(tensor) for tensor in (records, largest))
            arrived = torch.cuda.Event()
            arrived.record()

        def write() -> None:
            if arrived is not None:
                arrived.synchronize()
            if not largest.item() <= 65504:  # also where it is not a number
                name = writer.shard.checkpoint
                raise TrainingError(f"{name} gives logits that float16 cannot hold: is it a good checkpoint?")
            writer.append(records.numpy())

        self._submit(write)

    def commit(self, writer: ShardWriter) -> None:
        """Make a shard stand, once all of it is written."""
        self._submit(writer.commit)

    def finish(self) -> None:
        """Wait until all is on disk."""
        self._submit(lambda: None, waiting=0)

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _submit(self, work: Callable[[], None], waiting: int = 16) -> None:
        if self._thread is None:
            work()
            return
        self._pending.append(self._thread.submit(work))
        while len(self._pending) > waiting:
            self._pending.popleft().result()


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in host memory, once the work that the current stream has by now is done."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class Recorder:
    """The images and the teacher's run that a manifest names: gives the checkpoints' logits of any view."""

    def __init__(self, manifest: Manifest, info: DatasetInfo, run: str, config: LoaderConfig, device: torch.device):
        self.manifest, self.device, self.batch_size = manifest, device, config.batch_size
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
            model, _ = models.load_model(self._trajectory[epoch], "teacher.run")
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
        """Every batch, decoded once, with the logits of each checkpoint, float32 [n, classes]."""
        for batch in self.loader.batches(ids, view):
            answers = {}
            for name, model in teachers.items():
                answers[name] = forward_logits(model, batch.images, self.manifest.forward["amp"])
            yield batch, answers

    def write(
        self, store: Path, teachers: dict[str, nn.Module], ranges: list[list[Shard]]
    ) -> Generator[int, None, None]:
        """Write shards, those of a range in one pass over its images; yields the number of records after each batch."""
        with ExitStack() as opened, Disk(self.device) as disk:
            for shards in ranges:
                writers = {
                    shard.checkpoint: opened.enter_context(ShardWriter(store, shard, self.manifest)) for shard in shards
                }
                view, first, last = shards[0].view, shards[0].first, shards[0].last
                needed = {name: teachers[name] for name in writers}
                for batch, answers in self.logits(needed, np.arange(first, last + 1), view):
                    for name, logits in answers.items():
                        shard = writers[name].shard
                        records = encode(self.manifest, shard, batch.ids.numpy(), logits, batch.labels)
                        disk.append(writers[name], records, logits)
                    yield len(batch.ids) * len(answers)
                for writer in writers.values():
                    disk.commit(writer)
            disk.finish()


def describe(config: CacheConfig, device: torch.device) -> tuple[Manifest, Recorder]:
    """What `config` asks for, and what computes it; raises `UserError` where the two do not go together."""
    info = open_beton(config.data.train, "data.train", verify=config.data.verify)
    recipe = train_recipe(config.data, info)
    trajectory = checkpoint.trajectory(config.teacher.run, "teacher.run")
    epochs = checkpoint.choose(trajectory, config.teacher.checkpoints or list(trajectory), "teacher.checkpoints")
    members = {}
    for epoch in sorted(epochs):
        model, metadata = models.load_model(trajectory[epoch], "teacher.run")
        members[member_name(epoch, config.teacher.name)] = {
            "epoch": epoch,
            "model": metadata["model"],
            "weights_sha256": checkpoint.weights_sha256(model.state_dict()),
            "views": config.views,
        }
    info = classes.match_model(info, "data.train", metadata, config.teacher.run, config.data.map_classes)
    codec = codecs.from_config(config, info.num_classes)
    image_size = config.data.image_size or metadata["image_size"]
    models.require_fits(model, metadata["model"], info.num_classes, image_size, "data.image_size")
    manifest = Manifest(
        dataset={
            "name": info.dataset,
            "content_hash": info.content_hash,
            "count": info.count,
            "num_classes": info.num_classes,
            **({} if info.label_map is None else {"label_map": list(info.label_map)}),
        },
        recipe=recipe.to_dict(),
        view_seed=config.seed,
        forward={
            "image_size": image_size,
            "mean": metadata["mean"],
            "std": metadata["std"],
            "amp": precision.resolved(config.amp, dist.on_main(lambda: held_amp(Path(config.store)))),
        },
        codec=codecs.to_dict(codec),
        shard_size=config.shard_size,
        checkpoints=members,
        images={},
        classes=metadata.get("classes", []),
        paths={
            "data.train": os.path.abspath(info.path),
            " ".join(filter(None, ["teacher.run", config.teacher.name])): os.path.abspath(config.teacher.run),
        },
    )
    recorder = Recorder(manifest, info, config.teacher.run, config.data, device)
    manifest.images = image_digests(manifest, info)
    return manifest, recorder


def held_amp(store: Path) -> Amp | None:
    """Precision of the logits that `store` holds, None where there is no store yet."""
    return Manifest.load(store, "store").forward["amp"] if (store / "manifest.json").exists() else None


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
    size = codecs.record_bytes(manifest.recorded)
    mine = [(group, ranges[rank::world]) for group, ranges in work]
    total = sum(count_records(ranges) for _, ranges in mine)
    started, done = time.perf_counter(), 0
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


def space(store: Path, manifest: Manifest) -> tuple[int, int]:
    """(bytes still to be written, bytes free on the disk)."""
    folder = next(path for path in (store, *store.absolute().parents) if path.exists())
    missing = [shard for shard in all_shards(manifest) if not is_written(store, shard)]
    return size_of(manifest, missing), shutil.disk_usage(folder).free


def require_space(store: Path, manifest: Manifest) -> None:
    """Raise `UserError` when what is still to be written does not fit on the disk."""
    needed, free = space(store, manifest)
    require(
        needed <= free,
        f"store: {store} needs {format_bytes(needed)} more, the disk has {format_bytes(free)} free: make room, choose "
        "another disk, fewer --views, or --codec topk",
    )


def begin(store: Path, wanted: Manifest) -> Manifest:
    """Make the store, or let it grow by what is `wanted`, and return what it is to hold then; raises `UserError`,
    before anything is made, where that is something else or does not fit on the disk."""
    manifest = merged(store, wanted)
    clear_leftovers(store)
    require_space(store, manifest)
    with locked(store) as has_locks:
        if not has_locks:
            say(f"warning: {store}: this file system has no locks: let no two commands write to a store at once")
        manifest = merged(store, wanted)
        open_store(store, manifest)
    return manifest


def format_bytes(count: float) -> str:
    """A number of bytes in kB, MB, GB or TB of powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"

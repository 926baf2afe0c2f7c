"""What a caching takes, on disk and in time, told beforehand."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ckd_dist.core import dist
from ckd_dist.nn.forward import forward_logits
from ckd_dist.store import compare
from ckd_dist.store.codecs import transform
from ckd_dist.store.compare import Comparison
from ckd_dist.store.creation import merged
from ckd_dist.store.describe import describe
from ckd_dist.store.manifest import Manifest
from ckd_dist.store.options import PlanConfig
from ckd_dist.store.recording import Recorder, count_records, missing_work
from ckd_dist.store.size import shard_size, space, store_size

DENSE_PAYS = 32
"""Classes up to which a dense record is about as small as any."""


@dataclass(frozen=True)
class Plan:
    """What a caching takes on disk."""

    bytes: int
    """Length of all files of the complete store, exact but for the bases of codec transform."""
    files: int
    largest_shard_bytes: int
    missing_bytes: int
    """Of them, still to be written."""
    free_bytes: int
    """On the disk of the store."""
    missing_records: int
    """An image's logits of one view and checkpoint, still to be written."""


@dataclass(frozen=True)
class Choice:
    """A codec that the store might have."""

    store_bytes: int
    """Length of all files of the complete store."""
    keeps: Comparison


@dataclass(frozen=True)
class TimedPlan(Plan):
    """And in time, from a short trial of it."""

    seconds: float
    """From the first batch to the last shard, on as many processes as made the plan."""
    teacher_seconds_an_image: float
    """Forward pass of one checkpoint, on one process: the median over checkpoints and batches."""
    online_seconds: float
    """What one checkpoint's forward passes add to a student of as many epochs as there are views."""
    students: int
    """From so many students on, each with a teacher of one checkpoint, caching takes less time than online teachers."""
    choices: list[Choice]
    """For more classes than a dense record pays for, if the trial gave records enough: what codecs would keep."""
    enough_seconds: int | None
    """Of the trial, for some thousand records to compare codecs by; None where a dense record is the smallest."""


def plan(config: PlanConfig, device: torch.device) -> Plan:
    """Tell what the rest of a caching takes and, with `config.trial_seconds`, cache for so long into a temporary folder
    to tell the time; collective."""
    wanted, recorder = describe(replace(config, data=replace(config.data, verify=False)), device)
    store, names = Path(config.store), list(wanted.checkpoints)
    manifest = recorder.manifest = dist.on_main(lambda: merged(store, wanted))
    work = dist.on_main(lambda: missing_work(store, manifest, names, config.views, config.teachers_at_once))
    size, files = store_size(manifest)
    needed, free = dist.on_main(lambda: space(store, manifest))
    sizes = Plan(
        bytes=size,
        files=files,
        largest_shard_bytes=shard_size(manifest, manifest.shards(names[0], 0)[0]),
        missing_bytes=needed,
        free_bytes=free,
        missing_records=sum(count_records(ranges) for _, ranges in work),
    )
    if not config.trial_seconds:
        return sizes
    disk = next(p for p in store.absolute().parents if p.exists())
    group = names[: config.teachers_at_once or len(names)]
    teachers, rank, world = recorder.load(group), dist.rank(), dist.world_size()
    with tempfile.TemporaryDirectory(prefix=".plan_", dir=disk) as folder:
        ((_, trial),) = missing_work(Path(folder), manifest, group, config.views, None)
        recorder.fit(Path(folder), group)
        batches = recorder.write(Path(folder), teachers, trial[rank::world])
        dist.barrier()
        first, rate = _trial(batches, config.trial_seconds)
        batches.close()
    forward = _forward_seconds(recorder, teachers)
    first, rate, forward = (max(each) for each in zip(*dist.gather_objects((first, rate, forward)), strict=True))
    slowest = max(sum(count_records(ranges[k::world]) for _, ranges in work) for k in range(world))
    seconds = first + slowest * rate if work else 0.0
    choices = dist.on_main(lambda: _choices(config, recorder, dict([teachers.popitem()])))
    online = forward * config.views * manifest.dataset["count"] / world
    return TimedPlan(
        **asdict(sizes),
        seconds=seconds,
        teacher_seconds_an_image=forward,
        online_seconds=online,
        students=max(1, math.ceil(seconds / online)),
        choices=choices,
        enough_seconds=math.ceil(4 * compare.FEWEST * forward) if _worth_comparing(manifest) else None,
    )


def _worth_comparing(manifest: Manifest) -> bool:
    return manifest.dataset["num_classes"] > DENSE_PAYS and manifest.dataset["count"] >= compare.FEWEST


def _choices(config: PlanConfig, recorder: Recorder, teacher: dict[str, nn.Module]) -> list[Choice]:
    """Codecs beside each other, on answers of one checkpoint to random images: as many as `trial_seconds` give."""
    manifest, parts, started = recorder.manifest, [], time.perf_counter()
    if not _worth_comparing(manifest):
        return []
    most = min(compare.TESTED + transform.SAMPLE, manifest.dataset["count"])
    ids = np.random.RandomState(manifest.view_seed).permutation(manifest.dataset["count"])[:most]
    for _, logits in recorder.logits(teacher, ids, 0):
        parts += [each.cpu() for each in logits.values()]
        if time.perf_counter() - started > config.trial_seconds:
            break
    every = torch.cat(parts)
    if len(every) < compare.FEWEST:
        return []
    tested, fitting = every.tensor_split([min(compare.TESTED, len(every) // 3)])
    sizes = sorted({*compare.SIZES, *([config.bytes] if config.bytes else [])})
    found = compare.compare_logits(tested, fitting, sizes, manifest.view_seed)
    return [Choice(store_size(replace(manifest, codec=each.codec))[0], each) for each in found]


def _trial(batches: Iterator[int], trial_seconds: float) -> tuple[float, float]:
    """(seconds of starting up, seconds a record) of a caching, from its first `trial_seconds`."""
    started = time.perf_counter()
    count = next(batches, 0)
    first = time.perf_counter() - started
    records, started = 0, time.perf_counter()
    for more in batches:
        records += more
        if time.perf_counter() - started > trial_seconds:
            break
    if not records:  # there is but one batch
        return 0.0, first / max(1, count)
    rate = (time.perf_counter() - started) / records
    return max(0.0, first - count * rate), rate


def _forward_seconds(recorder: Recorder, teachers: dict[str, nn.Module], batches: int = 5) -> float:
    """Seconds an image of one checkpoint's forward pass: the median over batches and checkpoints."""
    count = min(recorder.manifest.dataset["count"], recorder.batch_size)
    batch = next(recorder.loader.batches(np.arange(count)))
    seconds = []
    for model in teachers.values():
        for _ in range(batches):
            started = time.perf_counter()
            forward_logits(model, batch.images, recorder.manifest.forward["amp"]).sum().item()
            seconds.append((time.perf_counter() - started) / count)
    return statistics.median(seconds)

"""The logit store: writing it against the bare forward pass, reading it against memory, and what `plan` foretells."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count as count_up
from pathlib import Path

import numpy as np
import torch

from ckd_dist.bench import cold
from ckd_dist.bench.loader import photographs
from ckd_dist.bench.measure import Row, in_turn
from ckd_dist.bench.random_store import write_random_store
from ckd_dist.bench.training import Setup, output
from ckd_dist.core.options import load_config
from ckd_dist.data.batch import Batch
from ckd_dist.data.dataset import DatasetInfo
from ckd_dist.nn import forward
from ckd_dist.store import recording
from ckd_dist.store.check import faults
from ckd_dist.store.codecs import Dense, TopK, factory, transform
from ckd_dist.store.codecs.base import Codec
from ckd_dist.store.describe import describe
from ckd_dist.store.manifest import Manifest
from ckd_dist.store.options import CacheConfig, CodecConfig
from ckd_dist.store.reader import StoreReader
from ckd_dist.store.size import format_bytes, store_size
from ckd_dist.studies.commands import run_module

IMAGENET = 1_281_167


class MemoryLoader:
    """A loader whose batches are in memory: what is left of a caching when decoding costs nothing."""

    def __init__(self, batches: list[Batch]):
        self._batches = batches

    def batches(self, ids: np.ndarray, view: int) -> Iterator[Batch]:
        """All the batches: one range of ids covers them."""
        return iter(self._batches)


def measure_caching(setup: Setup, info: DatasetInfo, model: str, size: int) -> list[Row]:
    """Caching checkpoints of a `model` at `size` px against their bare forward passes, one and four of them: from data
    in memory, where it costs the less, and from the images; four of them, in one pass over the images and in four."""
    run, device = setup.folder / f"trajectory_{info.path.stem}_{model}", setup.device
    count = 4
    options = ["--data.train", info.path, "--data.image_size", size, "--data.batch_size", 64]
    train = [*options, "--model.name", model, "--epochs", count, "--save_every", 1, "--optim.lr", 0.01]
    run_module(f"a trajectory of {model}", "ckd_dist.train_teacher", *train, "--run_dir", run)
    stores = setup.folder / "scratch" / "cached"
    shutil.rmtree(stores, ignore_errors=True)
    new_store = (stores / str(number) for number in count_up())
    config = load_config(CacheConfig, [str(word) for word in [*options, "--teacher.run", run, "--store", stores]])
    manifest, recorder = describe(config, device)
    teachers = recorder.load(list(manifest.checkpoints))
    every = np.arange(info.count)
    batches = list(recorder.loader.batches(every))
    from_images, from_memory = recorder.loader, MemoryLoader(batches)
    one = list(teachers)[:1]

    def bare(names: list[str]) -> float:
        for batch in batches:
            for name in names:
                forward.forward_logits(teachers[name], batch.images, manifest.forward["amp"])
        return info.count * len(names)

    def cache(loader, groups: list[list[str]]) -> Callable[[], float]:
        def work() -> float:
            recorder.loader, store = loader, next(new_store)
            for names in groups:
                for _, ranges in recording.missing_work(store, manifest, names, 1, None):
                    for _ in recorder.write(store, teachers, ranges):
                        pass
            return info.count * sum(map(len, groups))

        return work

    case = f"caching, {model}, {size} px, {info.path.stem.replace('_', ' ')}"
    rows: list[Row] = []
    for names, what in ((one, "1 checkpoint"), (list(teachers), "4 checkpoints")):
        works: dict[str, Callable[[], float]] = {
            f"bare forward pass, {what}": partial(bare, names),
            f"caching {what}, data in memory": cache(from_memory, [names]),
        }
        if names == one:
            works[f"caching {what}"] = cache(from_images, [names])
        rows += in_turn(case, "records/s", works, rounds=15)
        for row in rows[-len(works) + 1 :]:
            row.limit = "arithmetic: the forward pass" if "memory" in row.what else "decoding, and the forward pass"
    passes = {
        "caching 4 checkpoints, four passes": cache(from_images, [[name] for name in teachers]),
        "caching 4 checkpoints, one pass": cache(from_images, [list(teachers)]),
    }
    rows += in_turn(case, "records/s", passes, rounds=5)
    shutil.rmtree(stores)
    return rows


def measure_reading(
    path: Path, count: int, classes: int = 1000, batch_size: int = 1024, batches: int = 100
) -> list[Row]:
    """Write, verify and read a dense store of `count` records of random logits; reading, in random order from the page
    cache, in turn with numpy's own `take` of the same rows of an array in memory. Every row read is compared."""
    shutil.rmtree(path, ignore_errors=True)
    started = time.perf_counter()
    every = write_random_store(path, count, classes)
    written = time.perf_counter() - started
    manifest = Manifest.load(path, "RUN_DIR")
    started = time.perf_counter()
    assert faults(path, manifest) == []
    verified = time.perf_counter() - started

    reader, rng = StoreReader(str(path), []), np.random.default_rng(0)
    order = [rng.integers(0, count, batch_size) for _ in range(batches)]
    for ids in order:
        assert (reader.rows(ids, 0)[:, 0].view(np.float16) == every.take(ids, axis=0)).all()

    def take() -> float:
        for ids in order:
            every.take(ids, axis=0)
        return batches * batch_size

    def rows() -> float:
        for ids in order:
            reader.rows(ids, 0)
        return batches * batch_size

    size = format_bytes(store_size(manifest)[0])
    case = f"store, dense, {count:,} records of {classes} classes, {size}"
    works = {"numpy's take of the same rows in memory": take, "reading, random order, page cache": rows}
    limits = {"reading, random order, page cache": "memory: rows of 2 kB from anywhere"}
    found = in_turn(case, "records/s", works, rounds=15, warm_up=3, limits=limits)
    shutil.rmtree(path)
    rates = {"writing": count / written, "verifying": count / verified}
    disk = "disk, and xxh3 on one core"
    return [*found, *(Row(case, what, "records/s", [rate], limit=disk) for what, rate in rates.items())]


def measure_decoding(classes: int = 1000, count: int = 8192) -> list[Row]:
    """Encoding and decoding records on one core, in turn; logits of a few dozen directions and noise."""
    rng, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    shape = torch.randn(64, classes, generator=rng) * torch.linspace(2, 0.2, 64)[:, None]
    logits = torch.randn(count, 64, generator=rng) @ shape + 0.1 * torch.randn(count, classes, generator=rng)
    codecs: dict[str, Codec] = {"dense": Dense(classes), "topk, k 8": TopK(classes, 8)}
    for config in (CodecConfig(codec="transform", bytes=size) for size in (54, 28, 16)):
        codec = factory.from_config(config, classes)
        assert isinstance(codec, transform.Transform)
        codecs[f"transform, {config.bytes} bytes"] = codec.fitted(transform.fit(codec, logits, 0))
    labels = logits.argmax(dim=1)

    def encode(codec: Codec) -> float:
        return len(codec.encode(logits, labels))

    def decode(codec: Codec, records: torch.Tensor) -> float:
        for part in records.split(256):
            codec.decode(part, 1.0)
        return count

    case = f"codecs, {classes} classes, one core, batches of 256"
    torch.set_num_threads(1)
    encoding = {f"encoding {name}": partial(encode, codec) for name, codec in codecs.items()}
    decoding = {f"decoding {name}": partial(decode, c, c.encode(logits, labels)) for name, c in codecs.items()}
    rows = [*in_turn(case, "records/s", encoding, rounds=5), *in_turn(case, "records/s", decoding, rounds=15)]
    torch.set_num_threads(threads)
    return rows


def measure_plan(setup: Setup, tries: int = 3) -> list[Row]:
    """What `store plan` foretells against what caching then does, both as commands."""
    store = setup.folder / "scratch" / "planned_store"
    teacher = setup.teacher(setup.models.teachers[0])
    options = [*setup.options, "--teacher.run", teacher, "--store", store, "--views", 4]
    foretold, done = [], []
    for _ in range(tries):
        shutil.rmtree(store, ignore_errors=True)
        planned = json.loads(output("ckd_dist.store", "plan", *options, "--json"))
        found = re.search(r"written in ([\d.]+) s", output("ckd_dist.cache_logits", *options))
        assert found and planned["bytes"] == sum(p.stat().st_size for p in store.rglob("*") if p.is_file())
        records = 4 * setup.info.count
        foretold.append(records / planned["seconds"])
        done.append(records / float(found[1]))
    shutil.rmtree(store)
    ratios = [a / b for a, b in zip(done, foretold, strict=True)]
    return [
        Row("store plan", "foretold", "records/s", foretold),
        Row("store plan", "done", "records/s", done, "foretold", ratios),
    ]


def measure(setup: Setup) -> list[Row]:
    """All of this file."""
    model, size = ("resnet50", 224) if setup.device.type == "cuda" else ("resnet18", 64)
    return [
        *measure_caching(setup, setup.info, setup.models.teachers[0], setup.models.image_size),
        *measure_caching(setup, photographs(setup.folder, "jpg"), model, size),
        *measure_reading(setup.folder / "scratch" / "imagenet_store", IMAGENET),
        *cold.measure(setup.folder),
        *measure_decoding(),
        *measure_plan(setup),
    ]

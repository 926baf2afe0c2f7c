"""Measure what distillation costs: ratios, side by side and interleaved in one process, medians of several.

  python -m ckd_dist.bench [RUN_DIR]

Writes bench.json into RUN_DIR (default runs/bench) and prints the same as a table.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from ckd_dist.stages import run_in_folder, stage

IMAGES, BATCH_SIZE, VIEWS, ROUNDS = 6000, 128, 2, 7
IMAGENET = 1_281_167


def main(folder: Path) -> None:
    """Prepare data and a store in `folder`, measure, print."""
    from ckd_dist import dist, log

    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    with dist.process_group() as device:
        rows = measure_epochs(folder, device)
        result = {
            "environment": log.environment(),
            "rows": rows,
            "store": measure_store(folder / "scratch" / "imagenet_store", IMAGENET),
            "plan": measure_plan(folder),
            "students": measure_students(folder),
        }
    (folder / "bench.json").write_text(json.dumps(result, indent=2) + "\n")
    show(result)


def prepare(folder: Path) -> None:
    """Images, a teacher of one epoch and its logits, by the commands that a user would type."""
    train, teacher = folder / "train.beton", folder / "teacher"
    if not train.exists():
        images = ["--dataset", "fashion_mnist", "--split", "train", "--subset", IMAGES, "--out", train]
        stage("images", "data_prep.write_beton", *images)
    model = ["--data.train", train, "--model.name", "resnet20", "--epochs", 1, "--run_dir", teacher]
    stage("a teacher", "ckd_dist.train_teacher", *model)
    cache = ["--data.train", train, "--teacher.run", teacher, "--views", VIEWS, "--store", folder / "store"]
    stage("its logits", "ckd_dist.cache_logits", *cache)


def measure_epochs(folder: Path, device) -> list[dict]:
    """Seconds of a whole epoch, loader included: plain training, distillation from the store, and with the online
    teacher; the same student on the same images, in turn."""
    import shutil
    from functools import partial

    from ckd_dist import data, engine, losses, models
    from ckd_dist.config import DistillConfig, KDConfig, load_config, to_dict
    from ckd_dist.log import RunFolder
    from ckd_dist.store import codecs
    from ckd_dist.store.reader import StoreReader

    info = data.read_info(folder / "train.beton", "data.train")
    reader = StoreReader(str(folder / "store"), [], info)
    codec, kd = codecs.Dense(info.num_classes), KDConfig()
    teacher_model, _ = models.load_model(folder / "teacher" / "checkpoints" / "epoch_0001.pt", "teacher")
    teacher = partial(engine.online_records, [engine.to_device(teacher_model, device)], codec, "bfloat16")
    steps = info.count // BATCH_SIZE

    def plain(logits, batch, epoch):
        return {"loss": losses.cross_entropy(logits, batch.labels)}

    def distillation(logits, batch, epoch):
        teacher = codecs.teacher_logits(codec, batch.teacher_records, kd)
        return losses.distillation(logits, teacher, batch.labels, kd)

    def make_epoch(name: str, loss, rows, online):
        run_dir = folder / "scratch" / name
        shutil.rmtree(run_dir, ignore_errors=True)
        options = ["--data.train", str(info.path), "--model.name", "resnet8", "--epochs", str(ROUNDS + 1)]
        config = load_config(DistillConfig, [*options, "--run_dir", str(run_dir), "--data.batch_size", str(BATCH_SIZE)])
        run = RunFolder(config.run_dir, to_dict(config))
        model = models.build_model("resnet8", info.num_classes)
        learner = engine.Learner(model, config, loss, run, device, {}, steps)
        size = info.image_size(None)
        loader = data.BetonLoader(
            info, config.data, reader.recipe, batch_size=BATCH_SIZE, image_size=size, device=device
        )

        def epoch(number: int) -> float:
            started = time.perf_counter()
            for batch in loader.batches(data.train_ids(info.count, BATCH_SIZE, 0, number), number % VIEWS, rows):
                if online is not None:
                    batch.teacher_records = online(batch.images)
                learner.train_step(batch)
            learner.log(time.perf_counter() - started, 0.0)
            return time.perf_counter() - started

        return epoch

    epochs = {
        "plain training": make_epoch("plain", plain, None, None),
        "distill from store": make_epoch("store", distillation, reader.rows, None),
        "distill online, resnet20": make_epoch("online", distillation, None, teacher),
    }
    seconds: dict[str, list[float]] = {name: [] for name in epochs}
    for number in range(ROUNDS + 1):  # the first compiles and warms up
        for name, epoch in epochs.items():
            took = epoch(number)
            if number:
                seconds[name].append(took)
    base = seconds["plain training"]
    return [
        {
            "case": f"{name}, resnet8 student",
            "seconds": _spread(values),
            "ratio_to_plain": _spread([a / b for a, b in zip(values, base, strict=True)]),
            "images_per_s": steps * BATCH_SIZE / statistics.median(values),
        }
        for name, values in seconds.items()
    ]


def measure_store(path: Path, count: int, classes: int = 1000, batch_size: int = 1024, batches: int = 300) -> dict:
    """Write, verify and read a dense store of `count` records of random logits; reading, in random order from the page
    cache, in turn with numpy's own `take` of the same rows of an array in memory."""
    import shutil

    import numpy as np

    from ckd_dist.store import codecs
    from ckd_dist.store.check import faults
    from ckd_dist.store.manifest import Manifest
    from ckd_dist.store.reader import StoreReader
    from ckd_dist.store.writer import ShardWriter, open_store

    shutil.rmtree(path, ignore_errors=True)
    manifest = Manifest(
        dataset={"name": "random", "content_hash": "none", "count": count, "num_classes": classes},
        recipe={},
        view_seed=0,
        forward={},
        codec=codecs.to_dict(codecs.Dense(classes)),
        shard_size=65536,
        views=1,
        checkpoints={"epoch_0001": {"epoch": 1, "model": "none", "weights_sha256": "none"}},
        images={},
    )
    open_store(path, manifest)
    rng = np.random.default_rng(0)
    every = np.empty((count, classes), dtype=np.float16)
    block = rng.normal(size=(batch_size, classes)).astype(np.float16)
    for first in range(0, count, batch_size):  # the same numbers in every block, but for a sample's own in front
        every[first : first + batch_size] = block[: count - first]
    every[:, 0], every[:, 1] = np.arange(count) % 2048, np.arange(count) // 2048

    started = time.perf_counter()
    for shard in manifest.shards("epoch_0001", 0):
        writer = ShardWriter(path, shard, manifest)
        for first in range(shard.first, shard.last + 1, batch_size):
            writer.append(every[first : min(first + batch_size, shard.last + 1)].view(np.uint8))
        writer.commit()
    written = time.perf_counter() - started
    started = time.perf_counter()
    assert faults(path, manifest) == []
    verified = time.perf_counter() - started

    reader = StoreReader(str(path), [])
    order = rng.permutation(count)
    seconds: dict[str, list[float]] = {"take": [], "rows": []}
    for number in range(-20, batches):  # the first ones compile and touch pages
        ids = order[rng.integers(0, count, batch_size)]
        started = time.perf_counter()
        taken = every.take(ids, axis=0)
        between = time.perf_counter()
        rows = reader.rows(ids, 0)
        ended = time.perf_counter()
        assert (rows[:, 0].view(np.float16) == taken).all()
        if number >= 0:
            seconds["take"].append(between - started)
            seconds["rows"].append(ended - between)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    shutil.rmtree(path)
    return {
        "records": count,
        "classes": classes,
        "bytes": size,
        "write_bytes_per_s": size / written,
        "verify_bytes_per_s": size / verified,
        "read_records_per_s": batch_size / statistics.median(seconds["rows"]),
        "read_rate_over_take": _spread([a / b for a, b in zip(seconds["take"], seconds["rows"], strict=True)]),
    }


def measure_plan(folder: Path, tries: int = 3) -> dict:
    """What `store plan` foretells over what caching then takes, both as commands."""
    import re
    import shutil

    store = folder / "scratch" / "planned_store"
    options = [
        "--data.train",
        folder / "train.beton",
        "--teacher.run",
        folder / "teacher",
        "--store",
        store,
        "--views",
        4,
    ]
    ratios = []
    for _ in range(tries):
        shutil.rmtree(store, ignore_errors=True)
        planned = json.loads(_output("ckd_dist.store", "plan", *options, "--json"))
        found = re.search(r"written in ([\d.]+) s", _output("ckd_dist.cache_logits", *options))
        assert found and planned["bytes"] == sum(f.stat().st_size for f in store.rglob("*") if f.is_file())
        ratios.append(planned["seconds"] / float(found[1]))
    shutil.rmtree(store)
    return {"planned_seconds_over_taken": _spread(ratios)}


def measure_students(folder: Path, count: int = 4, tries: int = 3) -> dict:
    """Wall time of training `count` students side by side, over that of as many separate commands, in turn; each
    student's weights must be those of its separate run."""
    import shutil

    import torch

    from ckd_dist import checkpoint

    def wall_seconds(*words: object) -> float:
        started = time.perf_counter()
        _output(*words)
        return time.perf_counter() - started

    def weights(run: Path) -> dict:
        return checkpoint.load(checkpoint.checkpoint_path(run, 2), "RUN_DIR")["weights"]

    train, runs = folder / "train.beton", folder / "scratch" / "students"
    options = ["--data.train", train, "--data.val", train, "--model.name", "resnet8", "--epochs", 2]
    options += ["--data.batch_size", BATCH_SIZE, "--teacher.store", folder / "store", "--teacher.checkpoints", "[1]"]
    alphas = [round((1 + number) / (count + 1), 2) for number in range(count)]
    together, apart, training = [], [], []
    for _ in range(tries):
        shutil.rmtree(runs, ignore_errors=True)
        search = ["ckd_dist.search", *options, "--grid.alphas", alphas, "--run_dir", runs / "search"]
        together.append(wall_seconds(*search))
        alone = [["ckd_dist.distill", *options, "--kd.alpha", a, "--run_dir", runs / str(a)] for a in alphas]
        apart.append(sum(wall_seconds(*words) for words in alone))
        students = sorted((runs / "search" / "students").iterdir())
        for student, alpha in zip(students, alphas, strict=True):
            mine, theirs = weights(student), weights(runs / str(alpha))
            assert all(torch.equal(mine[name], theirs[name]) for name in mine), student
        seconds = [json.loads((run / "summary.json").read_text())["train_seconds"] for run in runs.glob("0.*")]
        summary = json.loads((students[0] / "summary.json").read_text())
        training.append(summary["train_seconds"] / sum(seconds))
    shutil.rmtree(runs)
    return {
        "count": count,
        "wall_over_separate": _spread([a / b for a, b in zip(together, apart, strict=True)]),
        "training_over_separate": _spread(training),
    }


def _output(*words: object) -> str:
    command = [sys.executable, "-m", *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(result: dict) -> None:
    """Print the result as a table."""
    from rich.console import Console
    from rich.table import Table

    environment = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    table = Table(
        title=f"Whole epochs, interleaved, {ROUNDS} each; {environment['device']}, {environment['cores']} cores, "
        f"{environment['threads']} threads\n{versions}",
        title_justify="left",
    )
    table.add_column("case")
    for column in ("seconds: median (min to max)", "ratio to plain: median (min to max)", "images/s"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        cells = ["{median:.3f} ({min:.3f} to {max:.3f})".format(**row[key]) for key in ("seconds", "ratio_to_plain")]
        table.add_row(row["case"], *cells, f"{row['images_per_s']:,.0f}")
    console = Console(width=120, highlight=False)
    console.print(table)
    store, plan, students = result["store"], result["plan"], result["students"]
    spread = "{median:.2f} ({min:.2f} to {max:.2f})".format
    console.print(
        f"Dense store of {store['records']:,} records x {store['classes']} classes, {store['bytes'] / 1e9:.2f} GB: "
        f"written at {store['write_bytes_per_s'] / 1e6:,.0f} MB/s, verified at "
        f"{store['verify_bytes_per_s'] / 1e6:,.0f} MB/s, read in random order, batches of 1024, at "
        f"{store['read_records_per_s']:,.0f} records/s: {spread(**store['read_rate_over_take'])} of numpy's take of "
        "the same rows in memory.\n"
        f"`store plan`: seconds foretold over seconds taken, 3 tries: {spread(**plan['planned_seconds_over_taken'])}.\n"
        f"{students['count']} students side by side over separate runs, weights equal, 3 tries: wall time "
        f"{spread(**students['wall_over_separate'])}, training alone {spread(**students['training_over_separate'])}."
    )


if __name__ == "__main__":
    run_in_folder(main, "runs/bench")

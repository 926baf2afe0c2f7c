"""Measure what distillation costs: ratios, side by side and interleaved in one process, medians of several.

  python -m ckd_dist.bench [RUN_DIR]

Writes bench.json into RUN_DIR (default runs/bench) and prints the same as a table.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

from ckd_dist.stages import stage

IMAGES, BATCH_SIZE, VIEWS, ROUNDS = 6000, 128, 2, 7


def main(folder: Path) -> None:
    """Prepare data and a store in `folder`, measure, print."""
    from ckd_dist import dist, log

    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    with dist.process_group() as device:
        rows = measure_epochs(folder, device)
        result = {"environment": log.environment(), "rows": rows}
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

    def plain(logits, batch):
        return {"loss": losses.cross_entropy(logits, batch.labels)}

    def distillation(logits, batch):
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
    Console(width=120).print(table)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]) or len(sys.argv) > 2:
        print(__doc__)
        sys.exit(0 if len(sys.argv) <= 2 else 2)
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/bench"))

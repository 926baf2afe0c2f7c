"""Compare what codecs keep of a teacher, and what students learn from them: the table of the README.

  python -m ckd_dist.studies.codecs [RUN_DIR]

Two tasks of real images: Fashion-MNIST, and Stacked Fashion-MNIST with a thousand classes. One resnet20 a task, its
logits cached densely and converted to every codec; resnet8 students of three seeds learn from each. About 2 hours on
two CPU cores; run again, what is complete is not repeated. Writes codecs.json and codecs.md into RUN_DIR (default
runs/codecs).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ckd_dist.core.results import mean_and_deviation
from ckd_dist.studies.commands import console, run_in_folder, run_module, write_images

SEEDS, TEACHER_EPOCHS, STUDENT_EPOCHS, ALPHA = (0, 1, 2), 16, 8, 0.1
ELSEWHERE = (
    ("TinyViT: top-100 probabilities, 1000 classes", "404, and keys"),
    ("TinyViT: top-10 probabilities, 1000 classes", "44"),
    ("FKD: top-5 probabilities, 1000 classes", "29 to 57, and a file an image"),
    ("apple/ml-dr: top-10 probabilities, 1000 classes", "65 to 104, in a pickle an image"),
)


@dataclass(frozen=True)
class Task:
    """Images, and for each temperature of the loss the codecs to compare with dense float16: name -> options of
    convert."""

    dataset: str
    images: int
    codecs: dict[int, dict[str, list[object]]]


def topk(k: int) -> dict[str, list[object]]:
    """A codec by its name, with options of convert."""
    return {f"topk, k {k}": ["--codec", "topk", "--k", k]}


def sampled(k: int, temperature: int) -> dict[str, list[object]]:
    """A codec by its name, with options of convert."""
    return {f"sampled, k {k}, T {temperature}": ["--codec", "sampled", "--k", k, "--sample_temperature", temperature]}


def transform(*sizes: int) -> dict[str, list[object]]:
    """Codecs by their names, with options of convert."""
    return {f"transform, {size} bytes": ["--codec", "transform", "--bytes", size] for size in sizes}


BFLOAT16: dict[str, list[object]] = {"dense bfloat16": ["--codec", "dense", "--dtype", "bfloat16"]}
TASKS = (
    Task("fashion_mnist", 12_000, {4: {**BFLOAT16, **topk(4), **topk(2), **sampled(4, 4)}}),
    Task(
        "stacked_fashion_mnist",
        18_000,
        {
            1: {**transform(54, 28, 16, 6), **topk(8), **topk(4), **sampled(11, 1)},
            4: {**BFLOAT16, **transform(54, 28, 16, 6), **topk(8), **topk(4), **sampled(32, 4), **sampled(11, 4)},
        },
    ),
)


def main(folder: Path) -> None:
    """Run what is missing in `folder`, print and write the table."""
    results = [compare(folder / task.dataset, task) for task in TASKS]
    (folder / "codecs.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    table = "\n".join(markdown(results))
    (folder / "codecs.md").write_text(table + "\n", encoding="utf-8")
    print(table)


def compare(folder: Path, task: Task) -> dict:
    """One task: its teacher, stores and students; returns a row for each codec."""
    write_images(folder, task.dataset, {"train": task.images, "holdout": 2000})
    train, held_out = folder / "train.beton", folder / "holdout.beton"
    images = ["--data.train", train, "--data.val", held_out]
    recipe = ["--optim.warmup_epochs", 1, "--log_every", 20]
    teacher, dense = folder / "teacher", folder / "stores" / "dense"
    run_module(
        f"{task.dataset}: teacher",
        *("ckd_dist.train_teacher", *images, *recipe, "--model.name", "resnet20", "--epochs", TEACHER_EPOCHS),
        *("--save_every", TEACHER_EPOCHS, "--run_dir", teacher),
    )
    cache = ["--teacher.run", teacher, "--views", STUDENT_EPOCHS, "--store", dense, "--data.batch_size", 256]
    run_module(f"{task.dataset}: dense logits", "ckd_dist.cache_logits", "--data.train", train, *cache)
    stores = {"dense float16": dense}
    for name, options in {name: options for each in task.codecs.values() for name, options in each.items()}.items():
        stores[name] = folder / "stores" / slug(name)
        convert = ["ckd_dist.store", "convert", dense, stores[name], "--data.train", train, *options]
        run_module(f"{task.dataset}: {name}", *convert)

    student = ["ckd_dist.distill", *images, *recipe, "--model.name", "resnet8", "--epochs", STUDENT_EPOCHS]
    runs: dict[tuple, list[object]] = {}
    for seed in SEEDS:
        runs[0, "no teacher", seed] = [*student, "--data.views", STUDENT_EPOCHS, "--seed", seed]
        for temperature, each in task.codecs.items():
            loss = ["--kd.alpha", ALPHA, "--kd.temperature", temperature]
            for name in ("dense float16", *each):
                runs[temperature, name, seed] = [*student, *loss, "--teacher.store", stores[name], "--seed", seed]
    for (temperature, name, seed), words in runs.items():
        words += ["--run_dir", folder / "students" / slug(f"{name}, at {temperature}, seed {seed}")]
    top1 = train_students(task.dataset, runs)
    rows: list[dict] = [{"codec": "no teacher", "top1": [top1[0, "no teacher", seed] for seed in SEEDS]}]
    for temperature, each in task.codecs.items():
        for name in ("dense float16", *each):
            measured = fidelity(dense, stores[name], temperature)
            accuracy = [top1[temperature, name, seed] for seed in SEEDS]
            rows.append({"temperature": temperature, "codec": name, **measured, "top1": accuracy})
    last = json.loads((teacher / "summary.json").read_text(encoding="utf-8"))["top1"]
    classes = json.loads(Path(f"{train}.json").read_text(encoding="utf-8"))["num_classes"]
    return {"dataset": task.dataset, "classes": classes, "images": task.images, "teacher_top1": last, "rows": rows}


def slug(name: str) -> str:
    """The name of a folder."""
    return name.replace(",", "").replace(" ", "_")


def train_students(title: str, runs: dict) -> dict:
    """Train students, as many at a time as there are cores (up to 4), and return the accuracy of each, None where none
    was measured."""
    cores = len(os.sched_getaffinity(0))
    at_once = min(4, cores)
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores // at_once)}
    console.rule(f"[bold]{title}: {len(runs)} students, {at_once} at a time", align="left")

    def train(words: list[object]) -> float | None:
        done = subprocess.run(
            [sys.executable, "-m", *map(str, words)],
            env=environment,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{words[-1]}: {done.stderr.strip()}")
        top1 = json.loads((Path(str(words[-1])) / "summary.json").read_text(encoding="utf-8")).get("top1")
        console.print(f"{words[-1]}: " + ("trained" if top1 is None else f"top-1 {top1:.2f} %"), soft_wrap=True)
        return top1

    with ThreadPoolExecutor(at_once) as pool:
        return dict(zip(runs, pool.map(train, runs.values()), strict=True))


def fidelity(dense: Path, store: Path, temperature: int, count: int = 4096) -> dict:
    """Bytes of a record, and how far its target is from the dense one, what top-k leaves out shared evenly: the mean
    KL(target || dense target) in nats at T = 1 and 4, None where the codec does not serve it; and the share of the
    dense softmax at `temperature` that the eight most probable classes have."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    from ckd_dist.nn.options import KDConfig
    from ckd_dist.store.codecs.targets import teacher_logits
    from ckd_dist.store.reader import StoreReader

    exact, reader = StoreReader(str(dense), []), StoreReader(str(store), [])
    ids = np.random.default_rng(0).permutation(exact.manifest.dataset["count"])[:count]

    def log_softmax(of: StoreReader, at: int) -> torch.Tensor:
        records = torch.from_numpy(of.rows(ids, 0))
        return F.log_softmax(teacher_logits(of.codecs, records, KDConfig(temperature=at)) / at, dim=1)

    result: dict[str, float | None] = {"bytes": reader.codec.record_bytes}
    result["top8_mass"] = log_softmax(exact, temperature).exp().topk(8, dim=1).values.sum(1).mean().item()
    for at in (1, 4):
        result[f"kl_at_{at}"] = None
        if reader.codec.unsupported(KDConfig(temperature=at), None) is None:
            truth, target = log_softmax(exact, at), log_softmax(reader, at)
            result[f"kl_at_{at}"] = F.kl_div(truth, target, reduction="batchmean", log_target=True).item()
    return result


def markdown(results: list[dict]) -> list[str]:
    """The table, with what other systems store below."""
    lines = [
        "| T | codec | bytes an image and view | KL at T = 1 | KL at T = 4 | student top-1, % | minus dense |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        task = f"**{result['dataset']}**, {result['classes']} classes, {result['images']:,} images"
        lines.append(f"| | {task}; teacher {result['teacher_top1']:.2f} % | | | | | |")
        for row in result["rows"]:
            temperature = row.get("temperature")
            kls = ["" if row.get(key) is None else f"{row[key]:.2g}" for key in ("kl_at_1", "kl_at_4")]
            minus = ""
            if temperature and row["codec"] != "dense float16":
                base = next(r for r in result["rows"] if r.get("temperature") == temperature)["top1"]
                minus = mean_and_deviation([a - b for a, b in zip(row["top1"], base, strict=True)], "+")
            accuracy = mean_and_deviation(row["top1"])
            cells = [str(temperature or ""), row["codec"], str(row.get("bytes", "")), *kls, accuracy, minus]
            lines.append(f"| {' | '.join(cells)} |")
    lines.append("| | **elsewhere** | | | | | |")
    lines += [f"| | {name} | {size} | | | | |" for name, size in ELSEWHERE]
    return lines


if __name__ == "__main__":
    run_in_folder(main, "runs/codecs")

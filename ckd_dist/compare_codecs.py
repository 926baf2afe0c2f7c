"""Compare what codecs keep of a teacher, and what students learn from them: the table of the README.

  python -m ckd_dist.compare_codecs [RUN_DIR]

Two tasks of real images: Fashion-MNIST, and Stacked Fashion-MNIST with a thousand classes. One resnet20 a task, its
logits cached densely and converted to every codec; resnet8 students of three seeds learn from each. About 50 minutes on
two CPU cores; run again, what is complete is not repeated. Writes codecs.json and codecs.md into RUN_DIR (default
runs/codecs).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ckd_dist.stages import console, stage

SEEDS, TEACHER_EPOCHS, STUDENT_EPOCHS, TEMPERATURE, ALPHA = (0, 1, 2), 16, 8, 4, 0.1
ELSEWHERE = (
    ("TinyViT: top-100 probabilities, 1000 classes", "404, and keys"),
    ("TinyViT: top-10 probabilities, 1000 classes", "44"),
    ("FKD: top-5 probabilities, 1000 classes", "29 to 57, and a file an image"),
    ("apple/ml-dr: top-10 probabilities, 1000 classes", "65 to 104, in a pickle an image"),
)


@dataclass(frozen=True)
class Task:
    """Images, and the codecs to compare on them: name -> options of convert."""

    dataset: str
    images: int
    codecs: dict[str, list[object]]


def topk(k: int) -> list[object]:
    """Options of a codec."""
    return ["--codec", "topk", "--k", k]


def sampled(k: int) -> list[object]:
    """Options of a codec."""
    return ["--codec", "sampled", "--k", k, "--sample_temperature", TEMPERATURE]


BFLOAT16: list[object] = ["--codec", "dense", "--dtype", "bfloat16"]
TASKS = (
    Task(
        "fashion_mnist",
        12_000,
        {"dense bfloat16": BFLOAT16, "topk, k 4": topk(4), "topk, k 2": topk(2), "sampled, k 4": sampled(4)},
    ),
    Task(
        "stacked_fashion_mnist",
        18_000,
        {
            "dense bfloat16": BFLOAT16,
            "topk, k 8": topk(8),
            "topk, k 4": topk(4),
            "sampled, k 32": sampled(32),
            "sampled, k 11": sampled(11),
        },
    ),
)


def main(folder: Path) -> None:
    """Run what is missing in `folder`, print and write the table."""
    results = [compare(folder / task.dataset, task) for task in TASKS]
    (folder / "codecs.json").write_text(json.dumps(results, indent=2) + "\n")
    table = "\n".join(markdown(results))
    (folder / "codecs.md").write_text(table + "\n")
    print(table)


def compare(folder: Path, task: Task) -> dict:
    """One task: its teacher, stores and students; returns a row for each codec."""
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = folder / "train.beton", folder / "holdout.beton"
    for split, path, count in (("train", train, task.images), ("holdout", held_out, 2000)):
        if not path.exists():
            options = ["--dataset", task.dataset, "--split", split, "--subset", count, "--out", path]
            stage(f"{task.dataset}: {split}", "data_prep.write_beton", *options)
    images = ["--data.train", train, "--data.val", held_out]
    recipe = ["--optim.warmup_epochs", 1, "--log_every", 20]
    teacher, dense = folder / "teacher", folder / "stores" / "dense"
    stage(
        f"{task.dataset}: teacher",
        *("ckd_dist.train_teacher", *images, *recipe, "--model.name", "resnet20", "--epochs", TEACHER_EPOCHS),
        *("--save_every", TEACHER_EPOCHS, "--run_dir", teacher),
    )
    cache = ["--teacher.run", teacher, "--views", STUDENT_EPOCHS, "--store", dense, "--data.batch_size", 256]
    stage(f"{task.dataset}: dense logits", "ckd_dist.cache_logits", "--data.train", train, *cache)
    stores = {"dense float16": dense}
    for name, options in task.codecs.items():
        stores[name] = folder / "stores" / name.replace(", k ", "_").replace(" ", "_")
        convert = ["ckd_dist.store", "convert", dense, stores[name], "--data.train", train, *options]
        stage(f"{task.dataset}: {name}", *convert)

    student = ["ckd_dist.distill", *images, *recipe, "--model.name", "resnet8", "--epochs", STUDENT_EPOCHS]
    loss = ["--kd.alpha", ALPHA, "--kd.temperature", TEMPERATURE]
    runs = {}
    for seed in SEEDS:
        runs["no teacher", seed] = [*student, "--data.views", STUDENT_EPOCHS, "--seed", seed]
        for name, store in stores.items():
            runs[name, seed] = [*student, *loss, "--teacher.store", store, "--seed", seed]
    top1 = train_students(
        task.dataset, {key: [*words, "--run_dir", _run_dir(folder, *key)] for key, words in runs.items()}
    )
    rows = [{"codec": "no teacher", "top1": [top1["no teacher", seed] for seed in SEEDS]}]
    for name, store in stores.items():
        measured = fidelity(dense, store)
        rows.append({"codec": name, **measured, "top1": [top1[name, seed] for seed in SEEDS]})
    last = json.loads((teacher / "summary.json").read_text())["top1"]
    classes = json.loads(Path(f"{train}.json").read_text())["num_classes"]
    return {"dataset": task.dataset, "classes": classes, "images": task.images, "teacher_top1": last, "rows": rows}


def _run_dir(folder: Path, name: str, seed: int) -> Path:
    return folder / "students" / f"{name.replace(', k ', '_').replace(' ', '_')}_{seed}"


def train_students(title: str, runs: dict) -> dict:
    """Train students, as many at a time as there are cores (up to 4), and return the accuracy of each."""
    cores = len(os.sched_getaffinity(0))
    at_once = min(4, cores)
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores // at_once)}
    console.rule(f"[bold]{title}: {len(runs)} students, {at_once} at a time", align="left")

    def train(words: list[object]) -> float:
        done = subprocess.run(
            [sys.executable, "-m", *map(str, words)], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{words[-1]}: {done.stderr.strip()}")
        top1 = json.loads((Path(str(words[-1])) / "summary.json").read_text())["top1"]
        console.print(f"{words[-1]}: top-1 {top1:.2f} %")
        return top1

    with ThreadPoolExecutor(at_once) as pool:
        return dict(zip(runs, pool.map(train, runs.values()), strict=True))


def fidelity(dense: Path, store: Path, count: int = 4096) -> dict:
    """Bytes of a record, and how far its target is from the dense one: mean KL(target || dense target) in nats at T = 1
    and T = `TEMPERATURE`, None where the codec does not serve it."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    from ckd_dist.config import KDConfig
    from ckd_dist.store import codecs
    from ckd_dist.store.reader import StoreReader

    exact, reader = StoreReader(str(dense), [], check=False), StoreReader(str(store), [], check=False)
    ids = np.random.default_rng(0).permutation(exact.manifest.dataset["count"])[:count]
    divergences: dict[str, float | None] = {}
    for temperature in (1, TEMPERATURE):
        kd = KDConfig(temperature=temperature)
        name = f"kl_at_{temperature}"
        if reader.codec.refusal(kd, None):
            divergences[name] = None
            continue
        truth, target = (
            F.log_softmax(codecs.teacher_logits(r.codec, torch.from_numpy(r.rows(ids, 0)), kd) / temperature, dim=1)
            for r in (exact, reader)
        )
        divergences[name] = F.kl_div(truth, target, reduction="batchmean", log_target=True).item()
    return {"bytes": codecs.record_bytes(reader.codec), **divergences}


def markdown(results: list[dict]) -> list[str]:
    """The table, with what other systems store below."""
    lines = [
        f"| codec | bytes an image and view | KL at T = 1 | KL at T = {TEMPERATURE} | student top-1, % | minus dense |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        task = f"**{result['dataset']}**, {result['classes']} classes, {result['images']:,} images"
        lines.append(f"| {task}; teacher {result['teacher_top1']:.2f} % | | | | | |")
        base = next(row["top1"] for row in result["rows"] if row["codec"] == "dense float16")
        for row in result["rows"]:
            kls = ["" if row.get(key) is None else f"{row[key]:.2g}" for key in ("kl_at_1", f"kl_at_{TEMPERATURE}")]
            difference = [a - b for a, b in zip(row["top1"], base, strict=True)]
            minus = "" if row["codec"] == "dense float16" else _mean_and_deviation(difference, "+")
            cells = [row["codec"], str(row.get("bytes", "")), *kls, _mean_and_deviation(row["top1"]), minus]
            lines.append(f"| {' | '.join(cells)} |")
    lines.append("| **elsewhere** | | | | | |")
    lines += [f"| {name} | {size} | | | | |" for name, size in ELSEWHERE]
    return lines


def _mean_and_deviation(values: list[float], sign: str = "") -> str:
    return f"{statistics.mean(values):{sign}.2f} ± {statistics.stdev(values):.2f}"


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]) or len(sys.argv) > 2:
        print(__doc__)
        sys.exit(0 if len(sys.argv) <= 2 else 2)
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/codecs"))

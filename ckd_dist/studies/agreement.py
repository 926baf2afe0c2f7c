"""Students of one teacher's logits as codecs keep them, by how far they come to answer as it does: for images without
labels.

  python -m ckd_dist.studies.agreement TRAIN.beton HELD_OUT.beton TEACHER_RUN [RUN_DIR] [--teacher.model NAME]

The last checkpoint of TEACHER_RUN is cached densely on views of the training images and converted to every codec;
resnet8 students at 64 px, of three seeds, learn from each. Of the held-out images, and of the training images as they
are evaluated, a view that no student saw: the share on which a student's most probable class is the teacher's, and the
mean KL(teacher || student) at T = 1. Run again, what is complete is not repeated. Writes agreement.json and
agreement.md into RUN_DIR (default runs/agreement).
"""

from __future__ import annotations

import json
import sys
from functools import lru_cache
from pathlib import Path

from ckd_dist.core.options import Parser
from ckd_dist.core.process import run_process
from ckd_dist.core.results import mean_and_deviation
from ckd_dist.studies.codecs import SEEDS, slug, topk, train_students, transform
from ckd_dist.studies.commands import console, run_module

VIEWS, EPOCHS, TEMPERATURES = 16, 32, (1, 4)
CODECS = {**transform(54, 28, 16, 6), **topk(8)}


def main() -> None:
    """Run what is missing, print and write the table."""
    parser = Parser(prog="python -m ckd_dist.studies.agreement", description=__doc__)
    for name, metavar in (("train", "TRAIN.beton"), ("held_out", "HELD_OUT.beton"), ("teacher", "TEACHER_RUN")):
        parser.add_argument(name, type=Path, metavar=metavar)
    parser.add_argument("run_dir", type=Path, nargs="?", default=Path("runs/agreement"), metavar="RUN_DIR")
    parser.add_argument("--teacher.model", dest="model", metavar="NAME", help="its network, where it is your own code")
    options = parser.parse_args(sys.argv[1:])
    folder: Path = options.run_dir
    code = ["--teacher.model", options.model] if options.model else []
    dense = folder / "stores" / "dense"
    run_module(
        "dense logits",
        *("ckd_dist.cache_logits", "--data.train", options.train, "--teacher.run", options.teacher, *code),
        *("--views", VIEWS, "--store", dense),
    )
    stores = {"dense float16": dense}
    for name, words in CODECS.items():
        stores[name] = folder / "stores" / slug(name)
        run_module(name, "ckd_dist.store", "convert", dense, stores[name], "--data.train", options.train, *words)
    student = [
        *("ckd_dist.distill", "--data.train", options.train, "--data.image_size", 64, "--data.batch_size", 64),
        *("--model.name", "resnet8", "--epochs", EPOCHS, "--optim.warmup_epochs", 2, "--kd.alpha", 0),
    ]
    runs: dict[tuple, list[object]] = {
        (temperature, name, seed): [
            *(*student, "--kd.temperature", temperature, "--teacher.store", store, "--seed", seed),
            *("--run_dir", folder / "students" / slug(f"{name}, at {temperature}, seed {seed}")),
        ]
        for temperature in TEMPERATURES
        for name, store in stores.items()
        for seed in SEEDS
    }
    train_students("agreement", runs)
    folders = {key: Path(str(words[-1])) for key, words in runs.items()}
    rows: list[dict] = []
    for of in ("held_out", "train"):
        found = agreement(getattr(options, of), options.teacher, options.model, folders)
        rows += [
            {
                "of": of,
                "temperature": temperature,
                "codec": name,
                "students": [found[temperature, name, s] for s in SEEDS],
            }
            for temperature in TEMPERATURES
            for name in stores
        ]
    (folder / "agreement.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    table = "\n".join(markdown(rows))
    (folder / "agreement.md").write_text(table + "\n", encoding="utf-8")
    console.print(table)


def agreement(path: Path, teacher: Path, code: str | None, students: dict[tuple, Path]) -> dict[tuple, dict]:
    """For each of the `students`, by their run folders: percent of the images in `path` on which its most probable
    class is the teacher's, and the mean KL(teacher || student) at T = 1 in nats. Each network sees them as it is
    evaluated."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    from ckd_dist.core import checkpoint
    from ckd_dist.data.beton import open_beton
    from ckd_dist.data.loader import BetonLoader
    from ckd_dist.data.options import LoaderConfig
    from ckd_dist.nn import forward, models

    cpu, images = torch.device("cpu"), open_beton(path, "images")

    @lru_cache(maxsize=2)  # one of the teacher, one that all students share
    def batches(**metadata: object) -> list[torch.Tensor]:
        loader = BetonLoader.for_evaluation(images, LoaderConfig(), metadata, cpu)
        return [each.images for each in loader.batches(np.arange(images.count))]

    def log_softmax(run: Path, code: str | None) -> torch.Tensor:
        epoch, file = max(checkpoint.trajectory(str(run), "TEACHER_RUN").items())
        model, metadata = models.load_model(file, f"epoch {epoch}", code)
        network = forward.to_device(model, cpu)
        known = ("image_size", "val_image_size", "augment", "crop_share")
        shown = {key: metadata[key] for key in known if key in metadata}
        shown |= {key: tuple(metadata[key]) for key in ("mean", "std")}
        return torch.cat([forward.forward_logits(network, each, "off") for each in batches(**shown)]).log_softmax(dim=1)

    truth, found = log_softmax(teacher, code), {}
    for key, run in students.items():
        answer = log_softmax(run, None)
        kl = F.kl_div(answer, truth, reduction="batchmean", log_target=True).item()
        found[key] = {"agrees": 100 * (answer.argmax(1) == truth.argmax(1)).double().mean().item(), "kl": kl}
    return found


def markdown(rows: list[dict]) -> list[str]:
    """The table; differences from dense of the same images and T are paired by seed."""
    head = ["images", "T", "codec", "agrees with the teacher, %", "minus dense", "KL", "minus dense"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        same = [each for each in rows if each["of"] == row["of"] and each["temperature"] == row["temperature"]]
        base = same[0]["students"]
        cells = [row["of"], str(row["temperature"]), row["codec"]]
        for key in ("agrees", "kl"):
            values = [each[key] for each in row["students"]]
            minus = [value - other[key] for value, other in zip(values, base, strict=True)]
            cells += [mean_and_deviation(values), "" if row["students"] is base else mean_and_deviation(minus, "+")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    run_process(main)

"""Reading a file that is larger than memory: images in random order, in quasi-random order, and one after another.

python -m ckd_dist.bench.order BETON ORDER      one epoch; prints images/s
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

from ckd_dist.bench.limited import MEMORY, rates
from ckd_dist.bench.loader import PHOTOGRAPHS, photograph_files
from ckd_dist.bench.measure import Row
from ckd_dist.data import dataset
from ckd_dist.data.loader import BetonLoader
from ckd_dist.data.options import LoaderConfig, TrainDataConfig
from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.studies.commands import run_module

COPIES, WINDOW, BATCH_SIZE = 12, 12, 256
LIMITS = {
    "random": "disk: {:,.0f} MB/s, an image here and an image there",
    "quasi_random": "disk: {:,.0f} MB/s, in pages of 8 MB",
    "sequential": "disk: {:,.0f} MB/s",
}


def measure(folder: Path, tries: int = 3) -> list[Row]:
    """Epochs of a process whose memory is limited below the size of the file, in turn; none where it cannot be."""
    path = folder / "photographs_many.beton"
    if not path.exists():
        photographs = photograph_files(folder)
        root = folder / "photographs_many"
        for copy in range(COPIES):
            (root / "all").mkdir(parents=True, exist_ok=True)
            for image in (photographs / "all").iterdir():
                shutil.copyfile(image, root / "all" / f"{copy:02d}_{image.name}")  # links would count once
        options = ["--dataset", "imagefolder", "--root", root, "--split", "test", "--max-resolution", 341]
        run_module(f"{COPIES * PHOTOGRAPHS} photographs, raw", "data_prep.write_beton", *options, "--out", path)
    size, count = path.stat().st_size, dataset.read_info(path, "RUN_DIR").count
    found = rates(__name__, path, list(LIMITS), tries)
    case = f"file of {size / 1e9:.1f} GB, memory of {MEMORY / 1e9:.1f} GB, windows of {WINDOW} pages"
    rows = []
    for order, own in found.items():
        row = Row(case, f"{order} order", "images/s", own)
        row.limit = LIMITS[order].format(row.rate * size / count / 1e6)
        if order != "random":
            row.reference, row.ratios = "random order", [a / b for a, b in zip(own, found["random"], strict=True)]
        rows.append(row)
    return rows


def main(path: str, order: str) -> None:
    """Print the images/s of one epoch."""
    info = dataset.read_info(path, "BETON")
    pages_ahead = WINDOW if order == "quasi_random" else 0
    recipe, cpu = ViewRecipe(kind="random_resized_crop"), torch.device("cpu")
    loader = BetonLoader(
        info,
        LoaderConfig(workers=2),
        recipe,
        batch_size=BATCH_SIZE,
        image_size=64,
        device=cpu,
        pages_ahead=pages_ahead,
    )
    ids = np.arange(info.count)
    if order != "sequential":
        config = TrainDataConfig(train=path, order=order, window_pages=WINDOW)  # type: ignore[arg-type]
        ids = loader.epoch_ids(config, 0, 0)
    list(loader.batches(ids[:1]))  # compiles
    started = time.perf_counter()
    seen = sum(len(batch.ids) for batch in loader.batches(ids))
    assert seen == info.count
    print(seen / (time.perf_counter() - started))


if __name__ == "__main__":
    main(*sys.argv[1:])

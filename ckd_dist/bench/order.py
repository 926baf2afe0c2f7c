"""Reading a file that is larger than memory: images in random order, in quasi-random order, and one after another.

python -m ckd_dist.bench.order BETON ORDER      one epoch; prints images/s
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from ckd_dist.bench.loader import PHOTOGRAPHS, photograph_files
from ckd_dist.bench.measure import Row
from ckd_dist.data import dataset
from ckd_dist.data.loader import BetonLoader
from ckd_dist.data.options import LoaderConfig, TrainDataConfig
from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.studies.commands import console, run_module

COPIES, MEMORY, WINDOW, BATCH_SIZE = 12, 10**9, 12, 256
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
    rates: dict[str, list[float]] = {order: [] for order in LIMITS}
    try:
        with limited_memory() as group:
            for _ in range(tries):
                for order, found in rates.items():
                    found.append(_epoch_elsewhere(path, order, group))
    except OSError as error:
        console.print(f"order: left out, memory cannot be limited here ({error})")
        return []
    case = f"file of {size / 1e9:.1f} GB, memory of {MEMORY / 1e9:.1f} GB, windows of {WINDOW} pages"
    rows = []
    for order, found in rates.items():
        row = Row(case, f"{order} order", "images/s", found)
        row.limit = LIMITS[order].format(row.rate * size / count / 1e6)
        if order != "random":
            row.reference, row.ratios = "random order", [a / b for a, b in zip(found, rates["random"], strict=True)]
        rows.append(row)
    return rows


@contextmanager
def limited_memory() -> Iterator[Path]:
    """A control group of `MEMORY` bytes, page cache included; raises OSError where there is none to be had."""
    unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    parent = Path("/sys/fs/cgroup") if unified else Path("/sys/fs/cgroup/memory")
    group = parent / f"ckd_dist_{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.max" if unified else "memory.limit_in_bytes")).write_text(str(MEMORY), encoding="utf-8")
        yield group
    finally:
        group.rmdir()


def _epoch_elsewhere(path: Path, order: str, group: Path) -> float:
    with open(path, "rb") as file:  # out of the page cache, wherever it comes from
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    join = f"echo $$ > {group}/cgroup.procs && exec {sys.executable} -m {__name__} {path} {order}"
    done = subprocess.run(["sh", "-c", join], check=True, stdout=subprocess.PIPE, encoding="utf-8", errors="replace")
    return float(done.stdout.splitlines()[-1])


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

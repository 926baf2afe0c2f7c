"""Reading a store that is larger than memory: row by row from its files, and each view whole before its turn.

python -m ckd_dist.bench.cold STORE rows|ahead      prints records/s
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from ckd_dist.bench.measure import Row
from ckd_dist.bench.order import MEMORY, limited_memory
from ckd_dist.bench.random_store import write_random_store
from ckd_dist.store.ahead import ReadAhead
from ckd_dist.store.manifest import Manifest
from ckd_dist.store.reader import StoreReader
from ckd_dist.store.size import format_bytes, store_size
from ckd_dist.studies.commands import console

COUNT, CLASSES, VIEWS, BATCH_SIZE = 50_000, 1000, 40, 1024
ROWS = 20 * BATCH_SIZE
"""That are read one by one, which takes long."""


def measure(folder: Path, tries: int = 3) -> list[Row]:
    """Dense records of all views of a store four times larger than the memory of the process that reads them, in random
    order, in turn; none where memory cannot be limited. Nothing is trained meanwhile: reading ahead has no time but
    its own."""
    path = folder / "scratch" / "cold_store"
    shutil.rmtree(path, ignore_errors=True)
    write_random_store(path, COUNT, CLASSES, VIEWS)
    found: dict[str, list[float]] = {"rows": [], "ahead": []}
    try:
        with limited_memory() as group:
            for _ in range(tries):
                for how, rates in found.items():
                    rates.append(_read_elsewhere(path, how, group))
    except OSError as error:
        console.print(f"cold store: left out, memory cannot be limited here ({error})")
        return []
    finally:
        size = store_size(Manifest.load(path, "RUN_DIR"))[0]
        shutil.rmtree(path)
    case = f"cold store, dense, {format_bytes(size)} of records in {VIEWS} views, memory of {format_bytes(MEMORY)}"
    ratios = [a / b for a, b in zip(found["ahead"], found["rows"], strict=True)]
    rows = Row(case, "random order, row by row", "records/s", found["rows"])
    ahead = Row(case, "random order, views read ahead", "records/s", found["ahead"], rows.what, ratios)
    ahead.limit = f"disk: {ahead.rate * CLASSES * 2 / 1e6:,.0f} MB/s, checksums included"
    return [rows, ahead]


def _read_elsewhere(path: Path, how: str, group: Path) -> float:
    for file in path.rglob("*.npy"):  # out of the page cache
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    join = f"echo $$ > {group}/cgroup.procs && exec {sys.executable} -m {__name__} {path} {how}"
    done = subprocess.run(["sh", "-c", join], check=True, stdout=subprocess.PIPE, encoding="utf-8", errors="replace")
    return float(done.stdout.splitlines()[-1])


def main(path: str, how: str) -> None:
    """Print the records/s of `ROWS` records of the first view, or of all views read ahead."""
    reader = StoreReader(path, [])
    assert reader.outgrows_memory
    order = np.random.default_rng(0).permutation(reader.manifest.dataset["count"])
    epochs = [reader.views_of([0], view) for view in range(reader.views)]
    if how == "rows":
        reader.take(dict.fromkeys(epochs[0]))  # as if it had been checked long ago
    reader.rows(order[:1], 0)  # compiles
    started = time.perf_counter()
    if how == "rows":
        for first in range(0, ROWS, BATCH_SIZE):
            reader.rows(order[first : first + BATCH_SIZE], 0)
        print(ROWS / (time.perf_counter() - started))
        return
    ahead = ReadAhead(reader, epochs)
    for view in range(len(epochs)):
        ahead.begin(view)
        for first in range(0, len(order), BATCH_SIZE):
            reader.rows(order[first : first + BATCH_SIZE], view)
    print(len(epochs) * len(order) / (time.perf_counter() - started))


if __name__ == "__main__":
    main(*sys.argv[1:])

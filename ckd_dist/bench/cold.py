"""Reading a store that is larger than memory: row by row from its files, and each view whole before its turn.

python -m ckd_dist.bench.cold STORE rows|ahead      prints records/s
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import numpy as np

from ckd_dist.bench.limited import MEMORY, rates
from ckd_dist.bench.measure import Row
from ckd_dist.bench.random_store import write_random_store
from ckd_dist.store.ahead import ReadAhead
from ckd_dist.store.manifest import Manifest
from ckd_dist.store.reader import StoreReader
from ckd_dist.store.size import format_bytes, store_size

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
    size = store_size(Manifest.load(path, "RUN_DIR"))[0]
    try:
        found = rates(__name__, path, ("rows", "ahead"), tries)
    finally:
        shutil.rmtree(path)
    if not found:
        return []
    case = f"cold store, dense, {format_bytes(size)} of records in {VIEWS} views, memory of {format_bytes(MEMORY)}"
    ratios = [a / b for a, b in zip(found["ahead"], found["rows"], strict=True)]
    rows = Row(case, "random order, row by row", "records/s", found["rows"])
    ahead = Row(case, "random order, views read ahead", "records/s", found["ahead"], rows.what, ratios)
    ahead.limit = f"disk: {ahead.rate * CLASSES * 2 / 1e6:,.0f} MB/s, checksums included"
    return [rows, ahead]


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

"""Rates of processes whose memory, page cache included, is limited: of reading files that are larger."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ckd_dist.studies.commands import console

MEMORY = 10**9


def rates(module: str, path: Path, ways: Sequence[str], tries: int) -> dict[str, list[float]]:
    """What `python -m module path WAY` prints last, for each way in turn, each time with the files at `path` out of the
    page cache; empty where memory cannot be limited."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    try:
        with limited_memory() as group:
            for _ in range(tries):
                for way, own in found.items():
                    own.append(_elsewhere(module, path, way, group))
    except OSError as error:
        console.print(f"{path}: left out, memory cannot be limited here ({error})")
        return {}
    return found


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


def _elsewhere(module: str, path: Path, way: str, group: Path) -> float:
    for each in path.rglob("*.npy") if path.is_dir() else [path]:
        with open(each, "rb") as file:  # out of the page cache, wherever it comes from
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    join = f"echo $$ > {group}/cgroup.procs && exec {sys.executable} -m {module} {path} {way}"
    done = subprocess.run(["sh", "-c", join], check=True, stdout=subprocess.PIPE, encoding="utf-8", errors="replace")
    return float(done.stdout.splitlines()[-1])

"""Memory that this process may use, and memory that the processes of a node share."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ckd_dist.core import dist
from ckd_dist.core.errors import UserError


def limit() -> int:
    """Bytes of memory of this machine, or fewer where a control group (of SLURM, of a container) allows no more."""
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()]
    except OSError:  # not on Linux
        return found
    for _, controllers, path in groups:
        if controllers not in ("", "memory"):
            continue
        root = Path("/sys/fs/cgroup", controllers)
        group = root / path.lstrip("/")
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        for folder in (group, *group.parents[: len(group.relative_to(root).parts)]):
            try:
                allowed = (folder / name).read_text(encoding="utf-8").strip()
            except OSError:  # the group lies outside of what a container sees
                continue
            if allowed.isdecimal():
                found = min(found, int(allowed))
    return found


def shared(sizes: Sequence[int], node: Sequence[int], option: str) -> list[np.ndarray]:
    """Memory of these sizes in bytes, uint8 [size] each, that the ranks of a `node`, `dist.node_ranks`, have in common;
    it takes up room as it is written to, and is gone with the last array or process. Collective: all ranks give the
    same sizes.

    Raises `UserError` naming the `option` that asked for it where processes cannot share any.
    """
    own = [os.memfd_create("ckd_dist") for _ in sizes] if node[0] == dist.rank() else []
    for descriptor, size in zip(own, sizes, strict=False):
        os.ftruncate(descriptor, size)
    process, descriptors = dist.gather_objects((os.getpid(), own))[node[0]]
    opened = own
    try:
        if not own:
            opened = [os.open(f"/proc/{process}/fd/{each}", os.O_RDWR) for each in descriptors]
        arrays = [
            np.frombuffer(mmap.mmap(each, size), dtype=np.uint8) for each, size in zip(opened, sizes, strict=True)
        ]
    except OSError as error:
        raise UserError(f"{option}: the processes of this node cannot share memory ({error.strerror})") from None
    dist.barrier()  # all have opened it
    for each in opened:
        os.close(each)
    return arrays

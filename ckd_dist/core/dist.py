"""Processes: the group, its collectives, and the share of the machine that each rank gets."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as td

from ckd_dist.core.errors import UserError, require

T = TypeVar("T")


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the ranks that torchrun or srun started, if any, and yield this rank's device.

    nccl or gloo, see `backend`. A process started plainly is rank 0 of 1. Raises `UserError` when the environment is
    half set. An error inside leaves the group as it is: to take it down means to wait for all ranks under nccl, and the
    process is about to end.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    launched = "RANK" in os.environ or "WORLD_SIZE" in os.environ
    require(
        not launched or not missing,
        f"the environment sets RANK or WORLD_SIZE but not {', '.join(missing)}: start with torchrun, or unset them",
    )
    gpus = torch.cuda.device_count()
    if gpus:
        device = torch.device("cuda", local_rank() % gpus)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    else:
        device = torch.device("cpu")
        torch.set_num_threads(cores_per_rank())
        _keep_freed_memory()
    if launched:
        _join(device)
    yield device
    if launched:
        td.destroy_process_group()


def _join(device: torch.device) -> None:
    """Make the group, of what each rank says in the store of its device."""
    timeout = timedelta(minutes=10)
    store, number, count = next(td.rendezvous("env://", timeout=timeout))
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    store.set(f"ckd_dist/device/{number}", json.dumps([socket.gethostname(), gpu]))
    devices = [tuple(json.loads(store.get(f"ckd_dist/device/{other}"))) for other in range(count)]
    name, why = backend(devices)
    if why and number == 0:
        print(f"gloo instead of nccl, which is faster: {why}; start one process on every GPU")
    own = device if name == "nccl" else None
    td.init_process_group(name, store=store, rank=number, world_size=count, timeout=timeout, device_id=own)


def backend(devices: Sequence[tuple[str, str | None]]) -> tuple[str, str | None]:
    """nccl or gloo, and why not nccl, for ranks with these (host, GPU or None): nccl needs a GPU of its own for each.
    Where no rank has one, gloo needs no reason."""
    if all(gpu is None for _, gpu in devices):
        return "gloo", None
    for number, (host, gpu) in enumerate(devices):
        if gpu is None:
            return "gloo", f"rank {number} on {host} has no GPU"
        if (first := devices.index((host, gpu))) < number:
            return "gloo", f"ranks {first} and {number} share a GPU of {host}"
    return "nccl", None


def _keep_freed_memory() -> None:
    """Have the C library keep what tensors free, for the next ones: by default it gives large blocks back to the system
    and has every page cleared and mapped anew, which took a forward pass up to a third of its time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; another C library may have none
    if mallopt:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 * 2**20)


def rank() -> int:
    """This process's number among all; 0 leads."""
    return td.get_rank() if td.is_initialized() else 0


def world_size() -> int:
    """Number of processes over all nodes."""
    return td.get_world_size() if td.is_initialized() else 1


def local_rank() -> int:
    """This process's number on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Number of processes on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def node_ranks() -> list[int]:
    """Ranks of the processes on this one's node that see each other (not those of another container), in order.
    Collective."""
    own = (Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8"), os.readlink("/proc/self/ns/pid"))
    return [rank for rank, other in enumerate(gather_objects(own)) if other == own]


def cores_per_rank() -> int:
    """Cores of this node divided among its ranks, at least 1; for a process started plainly, OMP_NUM_THREADS if set;
    for one of a job of `launch`, whose processes may each be bound to their own cores, CKD_DIST_CORES.

    (torchrun sets OMP_NUM_THREADS to 1 unasked, so under it that variable says nothing.)
    """
    if "CKD_DIST_CORES" in os.environ:
        return int(os.environ["CKD_DIST_CORES"])
    if "LOCAL_WORLD_SIZE" not in os.environ and os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    return max(1, len(os.sched_getaffinity(0)) // local_world_size())


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all ranks, in place, and return it."""
    if td.is_initialized():
        td.all_reduce(tensor)
    return tensor


def broadcast_tensors(tensors: Iterator[torch.Tensor]) -> None:
    """Overwrite each tensor with rank 0's, in place."""
    if td.is_initialized():
        for tensor in tensors:
            td.broadcast(tensor, src=0)


def barrier() -> None:
    """Wait for all ranks."""
    if td.is_initialized():
        td.barrier()


@contextmanager
def uneven_work() -> Iterator[None]:
    """A block in which ranks work each for itself: whoever leaves it waits for the others, for hours if need be, where
    a collective would soon take them for dead. Collective; a rank that dies ends the others as everywhere."""
    if not td.is_initialized():
        yield
        return
    td.barrier()  # all are alive and here: so the group, whose making notices no death, is made at once
    patient: Any = td.new_group(timeout=timedelta(days=30))
    yield
    work: Any = td.barrier(patient, async_op=True)
    while not work.is_completed():
        time.sleep(0.05)  # signals are heard between these
    work.wait()
    td.destroy_process_group(patient)


def on_main(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 alone and return its (picklable) result on every rank.

    A `UserError` or `OSError` of rank 0 is raised on every rank as a `UserError`, so that all stop together.
    """
    if not td.is_initialized():
        return function()
    box: list[tuple[T | None, str | None]] = [(None, None)]
    if td.get_rank() == 0:
        try:
            box = [(function(), None)]
        except UserError as error:
            box = [(None, str(error))]
        except OSError as error:
            box = [(None, f"{error.strerror or error}: {error.filename or ''}")]
    td.broadcast_object_list(box, src=0)
    result, message = box[0]
    if message is not None:
        raise UserError(message)
    return result  # type: ignore[return-value]


def gather_objects(value: T) -> list[T]:
    """Every rank's (picklable) `value`, in rank order, on every rank."""
    if not td.is_initialized():
        return [value]
    values: list = [None] * td.get_world_size()
    td.all_gather_object(values, value)
    return values

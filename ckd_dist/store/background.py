"""Records from the device to disk, on a GPU in the background."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ckd_dist.core.errors import TrainingError
from ckd_dist.store.writer import ShardWriter


class BackgroundWriter:
    """Brings records from the device to disk, in order.

    On a GPU by a thread, while the next batches are computed: the device is waited for there alone, and an error is
    raised by a later call. On a CPU at once: a thread would take from the computing more than it hides.
    """

    def __init__(self, device: torch.device) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1) if device.type == "cuda" else None
        self._pending: deque[Future] = deque()

    def append(self, writer: ShardWriter, records: torch.Tensor, logits: torch.Tensor) -> None:
        """Write the `records` of `logits`, uint8 [n, bytes] and float32 [n, classes]."""
        largest = logits.abs().amax()
        arrived = None
        if records.is_cuda:
            records, largest = (_pinned(tensor) for tensor in (records, largest))
            arrived = torch.cuda.Event()
            arrived.record()

        def write() -> None:
            if arrived is not None:
                arrived.synchronize()
            if not largest.item() <= 65504:  # also where it is not a number
                name = writer.shard.checkpoint
                raise TrainingError(f"{name} gives logits that float16 cannot hold: is it a good checkpoint?")
            writer.append(records.numpy())

        self._submit(write)

    def commit(self, writer: ShardWriter) -> None:
        """Make a shard stand, once all of it is written."""
        self._submit(writer.commit)

    def finish(self) -> None:
        """Wait until all is on disk."""
        self._submit(lambda: None, waiting=0)

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _submit(self, work: Callable[[], None], waiting: int = 16) -> None:
        if self._thread is None:
            work()
            return
        self._pending.append(self._thread.submit(work))
        while len(self._pending) > waiting:
            self._pending.popleft().result()


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in host memory, once the work that the current stream has by now is done."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

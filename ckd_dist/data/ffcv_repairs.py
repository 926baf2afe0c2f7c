"""All that this package uses of FFCV, with workarounds for its bugs.

A comment at each workaround names the bug, so that it can be removed once FFCV is fixed (seen with 1.0.2).
"""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty, Full

import numba
import numba.typed
import numpy as np
import torch

# FFCV keeps two constants in a numba dictionary, which costs seconds of compilation at every import. Nothing reads it
# from compiled code: a plain dictionary does.
_numba_dict, numba.typed.Dict = numba.typed.Dict, dict
_threads = torch.get_num_threads()

from ffcv import libffcv  # noqa: E402
from ffcv.fields.basics import IntDecoder  # noqa: E402
from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder  # noqa: E402
from ffcv.loader import Loader, OrderOption  # noqa: E402
from ffcv.loader.epoch_iterator import EpochIterator  # noqa: E402
from ffcv.memory_managers import OSCacheManager  # noqa: E402
from ffcv.pipeline import PipelineSpec  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402
from ffcv.reader import Reader  # noqa: E402
from ffcv.transforms import ToTensor  # noqa: E402

numba.typed.Dict = _numba_dict
torch.set_num_threads(_threads)  # its import sets 1

__all__ = [
    "IMAGE_MODES",
    "AllocationQuery",
    "Compiler",
    "Epoch",
    "IntDecoder",
    "Loader",
    "OrderOption",
    "PipelineSpec",
    "Reader",
    "SimpleRGBImageDecoder",
    "ToTensor",
    "libffcv",
    "precompiled",
]


_compile = Compiler.compile.__func__


def precompiled(code: Callable) -> Callable:
    """Mark a decoder's code to be run as it is: FFCV would compile it, anew for every loader."""
    code.is_precompiled = True  # type: ignore[attr-defined]
    return code


def _compile_unless_precompiled(cls, code, signature=None):
    return code if getattr(code, "is_precompiled", False) else _compile(cls, code, signature)


def _compile_reader(self):
    # FFCV's version marks numba's interned uint8 array type immutable, which breaks every function compiled for that
    # type from the second loader of a process on. This one is compiled when a decoder of FFCV's calls it.
    def read(address, state):
        size = state[2][np.searchsorted(state[1], address)]
        return state[0][address : address + size]

    return Compiler.compile(read)


def _set_num_threads(cls, count):
    # FFCV's version also sets torch's thread count, for the whole process, at the start of every epoch.
    cls.num_threads = count
    numba.set_num_threads(count)


OSCacheManager.compile_reader = _compile_reader
Compiler.set_num_threads = classmethod(_set_num_threads)
Compiler.compile = classmethod(_compile_unless_precompiled)


class Epoch(EpochIterator):
    """FFCV's pipeline thread over the samples `order`: `close` ends it, and its errors are raised in the consumer.

    (After an error in FFCV's own thread the consumer waits for ever, and so does the thread when the consumer stops
    early.) `extra` is called in the thread with each batch's sample ids, and its result is added to the batch.
    """

    def __init__(self, loader: Loader, order: np.ndarray, extra: Callable[[np.ndarray], object]):
        self.error: BaseException | None = None
        self._gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._extra = extra
        super().__init__(loader, order)

    def run(self):
        """Fill the queue of batches; what goes wrong is raised where they are taken."""
        try:
            if self._gpu is not None:  # a new thread is on the first one, where pinning memory would make a context
                torch.cuda.set_device(self._gpu)
            super().run()
        except BaseException as error:
            self.error = error
            while not self.terminate_event.is_set():
                try:
                    return self.output_queue.put(None, timeout=0.5)
                except Full:
                    pass

    def run_pipeline(self, b_ix, batch_indices, batch_slot, cuda_event):
        """FFCV's arrays of a batch, and the extra ones."""
        return (*super().run_pipeline(b_ix, batch_indices, batch_slot, cuda_event), self._extra(batch_indices))

    def __next__(self):
        try:
            return super().__next__()
        except StopIteration:
            if self.error is not None:
                raise self.error from None
            raise

    def close(self):
        """End the thread, also when it waits for room in the queue of batches."""
        super().close()
        while self.is_alive():
            try:
                self.output_queue.get(timeout=0.05)
            except Empty:
                pass

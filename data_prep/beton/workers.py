"""Processes that read, encode and store the images of a .beton file; the first that fails ends them all."""

import hashlib
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import struct
import warnings
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.errors import InputError
from data_prep.progress import Progress
from data_prep.signals import deferred_signals
from data_prep.sources.datasets import Source

CHUNK = 16  # samples that a worker claims at a time
SAMPLES_PER_WORKER = 64  # each worker pads its last page, so small sets get few workers
FORK = multiprocessing.get_context("fork")  # a source is shared, not pickled, however large


class Job:
    """What the workers share with the parent.

    Attributes:
        source: the images.
        indices: int64 [N], those to write, in this order.
        fields: N ffcv.fields.RGBImageField, the raw one or the JPEG one for each sample.
        writer: ffcv.writer.DatasetWriter, prepared.
        allocator: ffcv.memory_allocator.MemoryAllocator.
        sizes: uint64 [N] in shared memory, stored bytes of each sample.
        digests: uint64 [N] in shared memory, `digest` of each sample's pixels.
        claimed: number of samples handed out so far, in shared memory.
        errors: queue of messages.
        parent: its process id.
    """

    def __init__(
        self, source: Source, indices: NDArray[np.int64], fields: list[Any], writer: Any, allocator: Any
    ) -> None:
        self.source = source
        self.indices = indices
        self.fields = fields
        self.writer = writer
        self.allocator = allocator
        self.sizes = FORK.RawArray("Q", len(indices))
        self.digests = FORK.RawArray("Q", len(indices))
        self.claimed = FORK.Value("Q", 0)
        self.errors = FORK.SimpleQueue()
        self.parent = os.getpid()


def metadata_columns(writer: Any) -> tuple[NDArray, NDArray]:
    """The 'image' and 'label' columns of the metadata that a prepared DatasetWriter has in shared memory."""
    table = np.frombuffer(writer.metadata_sm.buf, writer.metadata_type, count=writer.num_samples)
    image, label = writer.metadata_type.names
    return table[image], table[label]


def digest(image: NDArray[np.uint8]) -> int:
    """The first 64 bits of SHA-1, which processors compute fastest, of an image's height and width, as little-endian
    uint32, and its pixels, as a little-endian number: among a million different images, two share theirs with a
    probability of 3e-8."""
    sha1 = hashlib.sha1(struct.pack("<II", *image.shape[:2]), usedforsecurity=False)
    sha1.update(np.ascontiguousarray(image).data)
    return int.from_bytes(sha1.digest()[:8], "little")


# --- The parent ---------------------------------------------------------------------------------------


def run_workers(job: Job, most: int) -> None:
    """Runs workers, `most` of them or fewer, to the end, or kills all when one fails.

    Raises:
        InputError: the failed worker's message, or how it died.
    """
    count = min(most, math.ceil(len(job.indices) / SAMPLES_PER_WORKER))
    processes = [FORK.Process(target=_work, args=(job,)) for _ in range(count)]
    try:
        with deferred_signals():
            for process in processes:
                try:
                    process.start()
                except OSError as error:
                    raise InputError(f"--workers: no further process ({error.strerror}): use fewer") from error
        with Progress("writing", len(job.indices)) as progress:
            while True:
                # In this order: a worker that dies in between is still counted as running, and seen next time.
                running = [process.sentinel for process in processes if process.exitcode is None]
                if failed := [process.exitcode for process in processes if process.exitcode]:
                    raise InputError(_why(failed[0], job))
                if not running:
                    break
                multiprocessing.connection.wait(running, timeout=0.1)
                # Without the lock: a worker killed inside it would take the parent along.
                progress.update(job.claimed.get_obj().value)
            progress.update(len(job.indices))
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _why(exitcode: int, job: Job) -> str:
    """The message about a worker that failed."""
    if not job.errors.empty():
        return job.errors.get()
    if exitcode == -signal.SIGBUS:
        return "--workers: a writer process died of SIGBUS: /dev/shm is full; enlarge it (docker: --shm-size)"
    cause = signal.Signals(-exitcode).name if exitcode < 0 else f"exit status {exitcode}"
    return (
        f"--workers: a writer process died ({cause}); if memory ran out, use fewer workers "
        "or a smaller --max-resolution"
    )


# --- A worker -----------------------------------------------------------------------------------------


def _work(job: Job) -> None:
    """One worker process: claims chunks of samples until none is left."""
    _set_up_process()
    images, labels = metadata_columns(job.writer)
    total = len(job.indices)
    try:
        with job.allocator:
            while os.getppid() == job.parent:  # a parent killed outright leaves nobody to write for
                with job.claimed.get_lock():
                    start = job.claimed.value
                    stop = job.claimed.value = min(start + CHUNK, total)
                if start == total:
                    break
                for position in range(start, stop):
                    try:
                        labels[position] = _store(job, position, images[position : position + 1])
                    except InputError as error:
                        _fail(job, f"{job.source.name(int(job.indices[position]))}: {error}")
    except OSError as error:
        folder = Path(job.writer.fname).parent
        _fail(job, f"--out: {error.strerror} in {folder}: free some space, or write elsewhere")


def _set_up_process() -> None:
    import cv2

    for number in (signal.SIGINT, signal.SIGHUP):  # they reach the whole group; the parent ends us
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore")  # PIL complains of odd EXIF data
    Image.MAX_IMAGE_PIXELS = None  # the source has its own limit, after it knows at what scale it will decode
    cv2.setNumThreads(1)  # one core a worker; OpenCV's thread pool does not survive a fork either


def _fail(job: Job, message: str) -> NoReturn:
    # Not through an exception: leaving the allocator's context would wait for pages of the other workers.
    job.errors.put(message[:2000])
    os._exit(1)


def _store(job: Job, position: int, metadata: NDArray) -> int:
    """Reads an image, and encodes it into the worker's page and its row of the metadata; returns its label.

    Raises:
        InputError: it cannot be read or stored; the message does not name the image.
        OSError: a page cannot be written.
    """
    image, label = _read(job, position)
    job.digests[position] = digest(image)
    _encode(job, position, image, metadata)
    return label


def _read(job: Job, position: int) -> tuple[NDArray[np.uint8], int]:
    field = job.fields[position]

    def check(height: int, width: int) -> None:
        if field.write_mode == "raw" and field.max_resolution is None:
            _require_room(job, field, height, width, 3 * height * width)

    try:
        return job.source.read(int(job.indices[position]), check)
    except InputError:
        raise
    except Exception as error:  # PIL raises OSError, SyntaxError, struct.error, ...
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"unreadable image ({reason}): repair or remove it") from error


def _encode(job: Job, position: int, image: NDArray[np.uint8], metadata: NDArray) -> None:
    field = job.fields[position]
    height, width = image.shape[:2]

    def allocate(size: int) -> tuple[int, NDArray[np.uint8]]:
        _require_room(job, field, height, width, size)
        job.sizes[position] = size
        return job.allocator.malloc(size)

    job.allocator.set_current_sample(position)
    try:
        field.encode(metadata, image, allocate)
    except (InputError, OSError):
        raise
    except Exception as error:  # OpenCV's own error class, or a side beyond FFCV's 16 bits
        raise InputError(
            f"{height} x {width} pixels cannot be stored ({error}): change --max-resolution or remove the image"
        ) from error


def _require_room(job: Job, field: Any, height: int, width: int, size: int) -> None:
    """Raises `InputError` where the `size` bytes of an image exceed a page."""
    page_size = job.writer.page_size
    if size > page_size:
        keep = f", or keep its size with --max-resolution {max(height, width)}"
        raise InputError(
            f"{height} x {width} pixels take {size:,} bytes, more than a page of {page_size:,}: "
            f"scale down with --max-resolution {math.isqrt(page_size // 3)}"
            + (keep if field.max_resolution is None else "")
        )

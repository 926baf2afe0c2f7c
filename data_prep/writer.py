"""Writes a .beton file with worker processes that may fail, and reads it back for its content hash.

FFCV's own `DatasetWriter.from_indexed_dataset` waits for ever when a worker raises or is killed: it polls a
counter that nobody advances any more, and the other workers wait for the dead one's page. Here FFCV still
lays out the file (header, field encoders, page allocator, allocation table), but the loop around the
workers is this module's, so that the first failure ends all of them.
"""

import errno
import hashlib
import math
import mmap
import multiprocessing
import multiprocessing.connection
import os
import signal
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.progress import Progress
from data_prep.sources import InputError, Source

COMPRESS_SEED = 20221130
CHUNK = 16  # samples that a worker claims at a time
SAMPLES_PER_WORKER = 64  # each worker pads its last page, so small sets get few workers
MIN_PAGE, DEFAULT_PAGE, MAX_PAGE = 1 << 21, 1 << 23, 1 << 30


@dataclass(frozen=True)
class Encoding:
    """How images are stored; the meaning of each option is `ffcv.fields.RGBImageField`'s.

    Attributes:
        write_mode: "raw", "jpg" or "proportion".
        max_resolution: longest side in pixels that is stored; longer ones are scaled down. None: any.
        jpeg_quality: 1 to 100.
        compress_probability: chance that "proportion" gives an image to JPEG.
    """

    write_mode: str = "raw"
    max_resolution: int | None = None
    jpeg_quality: int = 90
    compress_probability: float = 0.5


def write_images(
    path: Path, source: Source, indices: NDArray[np.int64], encoding: Encoding, workers: int
) -> NDArray[np.uint64]:
    """Writes the source's images `indices` and their labels as fields 'image' and 'label', in this order.

    What is stored for a sample depends on the source, its index and the encoding only: with "proportion",
    FFCV would roll the dice anew at each write.

    Args:
        path: file to write; what a failure leaves there is the caller's to remove.
        source: the images.
        indices: int64 [N], N > 0.
        encoding: how to store each image.
        workers: processes to use at most.

    Returns:
        uint64 [N], a digest of each image as it was decoded, before it was scaled or compressed, see `_digest`.

    Raises:
        InputError: an image that cannot be read or stored, a full disk, a killed worker. No worker runs on.
    """
    import numba.typed

    # FFCV keeps two constants in a numba dictionary, seconds of compilation at every import: a plain one does.
    numba_dict, numba.typed.Dict = numba.typed.Dict, dict
    try:
        with _deferred_signals():
            from ffcv.fields import IntField, RGBImageField
            from ffcv.memory_allocator import MemoryAllocator
            from ffcv.writer import DatasetWriter
    finally:
        numba.typed.Dict = numba_dict

    rgb_field = partial(RGBImageField, max_resolution=encoding.max_resolution, jpeg_quality=encoding.jpeg_quality)
    raw, jpg = rgb_field(write_mode="raw"), rgb_field(write_mode="jpg")
    probability = {"raw": 0.0, "jpg": 1.0, "proportion": encoding.compress_probability}[encoding.write_mode]
    # Drawn for the whole source, so that an image is stored alike in every split and subset.
    to_jpg = np.random.RandomState(COMPRESS_SEED).random_sample(len(source))[indices] < probability

    page_size = _page_size(source, encoding.max_resolution)
    writer = DatasetWriter(str(path), {"image": raw, "label": IntField()}, page_size, workers)
    writer.num_samples = len(indices)
    try:
        writer.prepare()
        fork = multiprocessing.get_context("fork")  # the source is shared, not pickled, however large
        job = _Job(
            source=source,
            indices=indices,
            fields=[jpg if flag else raw for flag in to_jpg],
            writer=writer,
            allocator=MemoryAllocator(str(path), writer.data_region_start, page_size),
            sizes=fork.RawArray("Q", len(indices)),
            digests=fork.RawArray("Q", len(indices)),
            claimed=fork.Value("Q", 0),
            errors=fork.SimpleQueue(),
            parent=os.getpid(),
        )
        workers = min(workers, math.ceil(len(indices) / SAMPLES_PER_WORKER))
        _run_workers([fork.Process(target=_work, args=(job,)) for _ in range(workers)], job)

        pages = job.allocator.next_page_written.value
        if path.stat().st_size != job.allocator.offset + pages * page_size:
            # FFCV does not look at how much of a page the system took: a disk that fills up cuts it short.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        pointers = _metadata(writer)[0]["data_ptr"].tolist()
        writer.finalize(list(zip(range(len(indices)), pointers, job.sizes, strict=True)))
    except OSError as error:
        raise InputError(f"--out: {error.strerror} in {path.parent}: free some space, or write elsewhere") from error
    finally:
        shared: Any = getattr(writer, "metadata_sm", None)
        if hasattr(shared, "unlink"):
            shared.close()
            shared.unlink()
    return np.array(job.digests, np.uint64)


def content_hash(path: Path) -> str:
    """Hash of what a .beton file holds, whatever order its pages were written in.

    SHA-256 over all samples in order, each as little-endian int64 label, uint16 height, uint16 width, uint8
    stored mode (FFCV's: 0 JPEG, 1 raw), uint64 number of stored bytes, then the stored bytes. So it tells
    which images became JPEG and at which quality, but not how many workers wrote the file.

    Returns:
        "sha256:" and 64 hexadecimal digits.

    Raises:
        InputError: the allocation table does not match the samples, or points beyond the file.
    """
    from ffcv.reader import Reader

    reader = Reader(str(path))
    images, labels = (reader.metadata[name] for name in reader.metadata_type.names)
    table = np.sort(reader.alloc_table, order="sample_id")
    ends = table["ptr"] + table["size"]
    if not np.array_equal(table["ptr"], images["data_ptr"]) or ends.max() > path.stat().st_size:
        raise InputError(f"{path}: the file is damaged: write it anew")

    heads = np.empty(
        len(images),
        [("label", "<i8"), ("height", "<u2"), ("width", "<u2"), ("mode", "u1"), ("bytes", "<u8")],
    )
    heads["label"], heads["bytes"] = labels, table["size"]
    for name in ("height", "width", "mode"):
        heads[name] = images[name]
    head_bytes, head_size = heads.tobytes(), heads.itemsize

    digest = hashlib.sha256()
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as data,
        Progress("hashing", len(images)) as progress,
    ):
        for sample, (start, end) in enumerate(zip(table["ptr"].tolist(), ends.tolist(), strict=True)):
            digest.update(head_bytes[sample * head_size : (sample + 1) * head_size])
            digest.update(data[start:end])
            progress.update(sample + 1)
    return f"sha256:{digest.hexdigest()}"


def stored_sizes(path: Path) -> dict[str, list[int]]:
    """{"min": [height, width], "max": [height, width]} over the images of a .beton file, as stored."""
    from ffcv.reader import Reader

    reader = Reader(str(path))
    images = reader.metadata[reader.metadata_type.names[0]]
    return {bound.__name__: [int(bound(images["height"])), int(bound(images["width"]))] for bound in (min, max)}


def _page_size(source: Source, max_resolution: int | None) -> int:
    """Pages of FFCV's default size, smaller for small images, larger where one image would not fit."""
    side = min(filter(None, (source.max_side, max_resolution)), default=None)
    if side is None:
        return DEFAULT_PAGE
    largest = 1 << (3 * side * side - 1).bit_length()
    return min(max(largest, min(32 * largest, DEFAULT_PAGE), MIN_PAGE), MAX_PAGE)


@contextmanager
def _deferred_signals() -> Iterator[None]:
    """Has signals that end the program wait for the end of the block, where an exception of theirs would be lost: numba
    calls Python back while it compiles, and so does a fork."""
    came: list[int] = []
    # Not blocked: a thread of a library's would take them then, and have them handled here all the same.
    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in ends}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for arrived in came:
            signal.raise_signal(arrived)


# --- Workers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What the workers share with the parent."""

    source: Source
    indices: NDArray[np.int64]
    fields: list[Any]  # one RGBImageField a sample: the raw one or the JPEG one
    writer: Any  # ffcv.writer.DatasetWriter, prepared
    allocator: Any  # ffcv.memory_allocator.MemoryAllocator
    sizes: Any  # uint64 [N] in shared memory: stored bytes of each sample
    digests: Any  # uint64 [N] in shared memory: of each sample's pixels
    claimed: Any  # number of samples handed out so far
    errors: Any  # SimpleQueue of messages
    parent: int  # process id


def _metadata(writer: Any) -> tuple[NDArray, NDArray]:
    """The 'image' and 'label' columns of the metadata in shared memory."""
    table = np.frombuffer(writer.metadata_sm.buf, writer.metadata_type, count=writer.num_samples)
    image, label = writer.metadata_type.names
    return table[image], table[label]


def _run_workers(processes: list[Any], job: _Job) -> None:
    """Runs them to the end, or kills all when one fails.

    Raises:
        InputError: the failed worker's message, or how it died.
    """
    try:
        with _deferred_signals():
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


def _why(exitcode: int, job: _Job) -> str:
    if not job.errors.empty():
        return job.errors.get()
    if exitcode == -signal.SIGBUS:
        return "--workers: a writer process died of SIGBUS: /dev/shm is full; enlarge it (docker: --shm-size)"
    cause = signal.Signals(-exitcode).name if exitcode < 0 else f"exit status {exitcode}"
    return (
        f"--workers: a writer process died ({cause}); if memory ran out, use fewer workers "
        "or a smaller --max-resolution"
    )


def _work(job: _Job) -> None:
    """One worker process: claims chunks of samples until none is left."""
    import cv2

    for number in (signal.SIGINT, signal.SIGHUP):  # they reach the whole group; the parent ends us
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore")  # PIL complains of odd EXIF data
    Image.MAX_IMAGE_PIXELS = None  # the source has its own limit, after it knows at what scale it will decode
    cv2.setNumThreads(1)  # one core a worker; OpenCV's thread pool does not survive a fork either

    images, labels = _metadata(job.writer)
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


def _fail(job: _Job, message: str) -> NoReturn:
    # Not through an exception: leaving the allocator's context would wait for pages of the other workers.
    job.errors.put(message[:2000])
    os._exit(1)


def _store(job: _Job, position: int, metadata: NDArray) -> int:
    """Encodes one image into the worker's page and its metadata; returns its label.

    Raises:
        InputError: it cannot be read or stored; the message does not name the image.
        OSError: a page cannot be written.
    """
    index = int(job.indices[position])
    field, page_size = job.fields[position], job.writer.page_size

    def fit(height: int, width: int, size: int) -> None:
        if size > page_size:
            keep = f", or keep its size with --max-resolution {max(height, width)}"
            raise InputError(
                f"{height} x {width} pixels take {size:,} bytes, more than a page of {page_size:,}: "
                f"scale down with --max-resolution {math.isqrt(page_size // 3)}"
                + (keep if field.max_resolution is None else "")
            )

    def check(height: int, width: int) -> None:
        if field.write_mode == "raw" and field.max_resolution is None:
            fit(height, width, 3 * height * width)

    try:
        image, label = job.source.read(index, check)
    except InputError:
        raise
    except Exception as error:  # PIL raises OSError, SyntaxError, struct.error, ...
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"unreadable image ({reason}): repair or remove it") from error
    height, width = image.shape[:2]
    job.digests[position] = _digest(image)

    def allocate(size: int) -> tuple[int, NDArray[np.uint8]]:
        fit(height, width, size)
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
    return label


def _digest(image: NDArray[np.uint8]) -> int:
    """The first 64 bits of SHA-1, which processors compute fastest, of an image's height and width, as little-endian
    uint32, and its pixels, as a little-endian number: among a million different images, two share theirs with a
    probability of 3e-8."""
    digest = hashlib.sha1(struct.pack("<II", *image.shape[:2]), usedforsecurity=False)
    digest.update(np.ascontiguousarray(image).data)
    return int.from_bytes(digest.digest()[:8], "little")

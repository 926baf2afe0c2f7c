"""Writes a .beton file with worker processes that may fail.

FFCV's own `DatasetWriter.from_indexed_dataset` waits for ever when a worker raises or is killed: it polls a
counter that nobody advances any more, and the other workers wait for the dead one's page. Here FFCV still
lays out the file (header, field encoders, page allocator, allocation table), but the loop around the
workers is that of `workers`, so that the first failure ends all of them.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.beton.workers import Job, metadata_columns, run_workers
from data_prep.errors import InputError
from data_prep.signals import deferred_signals
from data_prep.sources.datasets import Source

COMPRESS_SEED = 20221130
MIN_PAGE, DEFAULT_PAGE, MAX_PAGE = 1 << 21, 1 << 23, 1 << 30  # bytes


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
        uint64 [N], a digest of each image as it was decoded, before it was scaled or compressed, see `workers.digest`.

    Raises:
        InputError: an image that cannot be read or stored, a full disk, a killed worker. No worker runs on.
    """
    with _quick_import_of_ffcv():
        from ffcv.fields import IntField, RGBImageField
        from ffcv.memory_allocator import MemoryAllocator
        from ffcv.writer import DatasetWriter

    raw, jpg = (
        RGBImageField(write_mode=mode, max_resolution=encoding.max_resolution, jpeg_quality=encoding.jpeg_quality)
        for mode in ("raw", "jpg")
    )
    fields = [jpg if flag else raw for flag in _become_jpeg(encoding, len(source))[indices]]
    page_size = _page_size(source, encoding.max_resolution)
    writer = DatasetWriter(str(path), {"image": raw, "label": IntField()}, page_size, workers)
    writer.num_samples = len(indices)
    try:
        writer.prepare()
        allocator = MemoryAllocator(str(path), writer.data_region_start, page_size)
        job = Job(source, indices, fields, writer, allocator)
        run_workers(job, workers)
        _finish(path, job)
    except OSError as error:
        raise InputError(f"--out: {error.strerror} in {path.parent}: free some space, or write elsewhere") from error
    finally:
        shared: Any = getattr(writer, "metadata_sm", None)
        if hasattr(shared, "unlink"):
            shared.close()
            shared.unlink()
    return np.array(job.digests, np.uint64)


@contextmanager
def _quick_import_of_ffcv() -> Iterator[None]:
    """FFCV keeps two constants in a numba dictionary, seconds of compilation at every import: a plain one does."""
    import numba.typed

    numba_dict, numba.typed.Dict = numba.typed.Dict, dict
    try:
        with deferred_signals():
            yield
    finally:
        numba.typed.Dict = numba_dict


def _become_jpeg(encoding: Encoding, count: int) -> NDArray[np.bool_]:
    """[count], which images of a whole source are stored as JPEG: alike in every split and subset."""
    probability = {"raw": 0.0, "jpg": 1.0, "proportion": encoding.compress_probability}[encoding.write_mode]
    return np.random.RandomState(COMPRESS_SEED).random_sample(count) < probability


def _page_size(source: Source, max_resolution: int | None) -> int:
    """Bytes: FFCV's default for its pages, less for small images, more where one image would not fit."""
    side = min(filter(None, (source.max_side, max_resolution)), default=None)
    if side is None:
        return DEFAULT_PAGE
    largest = 1 << (3 * side * side - 1).bit_length()
    return min(max(largest, min(32 * largest, DEFAULT_PAGE), MIN_PAGE), MAX_PAGE)


def _finish(path: Path, job: Job) -> None:
    """Writes the metadata and the allocation table behind the pages of the workers.

    Raises:
        OSError: the disk is full, now or already before.
    """
    pages = job.allocator.next_page_written.value
    if path.stat().st_size != job.allocator.offset + pages * job.writer.page_size:
        # FFCV does not look at how much of a page the system took: a disk that fills up cuts it short.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    pointers = metadata_columns(job.writer)[0]["data_ptr"].tolist()
    job.writer.finalize(list(zip(range(len(job.indices)), pointers, job.sizes, strict=True)))

"""Reads a .beton file back: the hash of what it holds, and the sizes of its images."""

import hashlib
import mmap
from pathlib import Path

import numpy as np

from data_prep.errors import InputError
from data_prep.progress import Progress


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

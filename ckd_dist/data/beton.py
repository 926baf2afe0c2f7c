"""Opens .beton files for training, caching and evaluation, and compares each with its description."""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import os
from contextlib import closing, suppress
from pathlib import Path

import numpy as np

from ckd_dist.core import dist
from ckd_dist.core.console import ProgressDisplay, say
from ckd_dist.core.errors import UserError, require
from ckd_dist.core.files import parse_json, write_bytes_atomically
from ckd_dist.data import classes
from ckd_dist.data.dataset import DatasetInfo, read_info
from ckd_dist.data.ffcv_repairs import Reader
from ckd_dist.data.loader import Readahead, field_metadata
from ckd_dist.data.options import LoaderConfig

PAGES_AHEAD = 32
"""Of the file, while it is hashed: mostly 8 MB each."""


def open_images(data: LoaderConfig, *names: str) -> dict[str, DatasetInfo]:
    """Open the .beton files that the options data.NAME give, for those of the `names` that are set.

    Returns option -> description, as from `open_beton`; labels are those of the first file's classes, see
    `classes.match`, or of the first that has labels; only those of data.train may lack them. Collective. Raises
    `UserError` on every rank for what these two refuse, and where two files, by the way in which they were split, have
    images in common.
    """
    found: dict[str, DatasetInfo] = {}
    for option, path in ((f"data.{name}", getattr(data, name)) for name in names):
        if not path:
            continue
        info = open_beton(path, option, verify=data.verify)
        for before, other in found.items():
            require_disjoint(before, other, option, info)
        if option != "data.train":
            classes.require_labels(info, option)
        first = next((each for each in found.values() if each.labelled), info)
        if first is not info:
            info = classes.match(info, option, first.classes, first.num_classes, str(first.path), data.map_classes)
        found[option] = info
    if dist.rank() == 0:
        _warn_of_duplicates(found)
    return found


def require_disjoint(option: str, info: DatasetInfo, other_option: str, other: DatasetInfo) -> None:
    """Raise `UserError` where two files have images in common: the same ones, or parts of one image set that were split
    in different ways."""
    fix = "write both parts with the same --holdout, or all at once with data_prep.write_beton --split all"
    pair = f"{other_option}: {other.path} and {option} {info.path}"
    require(info.content_hash != other.content_hash, f"{pair} hold the same images: {fix}")
    if info.source_hash and other.source_hash:
        same_source = info.source_hash == other.source_hash
    else:  # of an older version
        same_source = info.dataset == other.dataset != "imagefolder" and bool(info.holdout and other.holdout)
    if not same_source:
        return
    how = [
        f"{each.split} with --holdout {each.holdout[0]}" if each.holdout else f"{each.split}, all of them"
        for each in (other, info)
    ]
    require(
        {info.split, other.split} == {"train", "holdout"} and info.holdout == other.holdout,
        f"{pair} are parts of the same images and overlap ({how[0]}; {how[1]}): {fix}",
    )


def _warn_of_duplicates(infos: dict[str, DatasetInfo]) -> None:
    """Warn of images of one file that are in another too, pixel for pixel, where the digests of both are on disk."""
    digests = {}
    for option, info in infos.items():
        path = Path(f"{info.path}.digests.npy")
        with suppress(OSError, ValueError):
            values = np.load(path, allow_pickle=False)
            if values.shape == (info.count,) and values.dtype == np.uint64:
                digests[option] = values
    for (option, values), (other, others) in itertools.combinations(digests.items(), 2):
        few, many = sorted((values, others), key=len)
        few = np.sort(few)  # np.isin alone takes a second for ImageNet
        in_both = many[few[np.searchsorted(few, many).clip(max=len(few) - 1)] == many]
        if count := int(np.isin(others, in_both).sum()):
            say(f"warning: {count} of the {len(others)} images of {other} are in {option} too, pixel for pixel")


def open_beton(path: str | Path, option: str, *, verify: bool = True) -> DatasetInfo:
    """Read the description of a .beton file, see `read_info`, and compare it with the file: number, labels and sizes of
    the images and, with `verify`, the hash of all that is stored, unless an earlier call has done so.

    Collective. Raises `UserError` on every rank where a rank's file does not match.
    """
    info, fault, key = None, None, None
    try:
        info = read_info(path, option)
        status = os.stat(path)
        # Two nodes' own copies differ in these, one file that both see does not: whoever sees it first reads it.
        key = (status.st_ino, status.st_ctime_ns, status.st_size)
    except UserError as error:
        fault = str(error)
    readers = dist.gather_objects(key)
    with dist.uneven_work():
        if info and readers.index(key) == dist.rank():
            try:
                _compare(info, option, verify)
            except UserError as error:
                fault = str(error)
    faults = [each for each in dist.gather_objects(fault) if each]
    if info is None or faults:
        raise UserError(faults[0])
    return info


def _compare(info: DatasetInfo, option: str, verify: bool) -> None:
    """Raise `UserError` where the file does not match `info`."""
    fix = f"write {info.path} anew with data_prep.write_beton"
    try:
        reader = Reader(str(info.path))
        images, labels = (field_metadata(reader, field) for field in ("image", "label"))
    except Exception as error:  # whatever a damaged header leads to
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{option}: {info.path} is not a .beton file that this FFCV reads ({reason}): {fix}") from None
    require(
        len(labels) == info.count,
        f"{option}: {info.path} holds {len(labels)} images, {info.path}.json says {info.count}: {fix}",
    )
    require(
        labels.min() >= 0 and labels.max() < info.num_classes,
        f"{option}: {info.path} holds labels from {labels.min()} to {labels.max()}, {info.path}.json says "
        f"{info.num_classes} classes: {fix}",
    )
    sizes = [tuple(int(bound(images[side])) for side in ("height", "width")) for bound in (np.min, np.max)]
    require(
        sizes == [info.min_size, info.max_size],
        f"{option}: {info.path} holds images of {sizes[0]} to {sizes[1]} pixels, {info.path}.json says "
        f"{info.min_size} to {info.max_size}: {fix}",
    )
    if verify:
        _compare_hash(info, option, fix)


def _compare_hash(info: DatasetInfo, option: str, fix: str) -> None:
    """Raise `UserError` where the content has another hash; once it matched, a file beside the images or in the user's
    cache folder records it, and the hash is not computed again while size and time of the file stay."""
    status = info.path.stat()
    verified = {"content_hash": info.content_hash, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "ckd_dist"
    name = hashlib.sha256(os.fsencode(info.path.resolve())).hexdigest()[:32]
    records = [Path(f"{info.path}.verified"), cache / f"{name}.verified"]
    for record in records:
        with suppress(OSError, ValueError):
            if record.is_file() and parse_json(record.read_bytes(), dict) == verified:
                return
    if status.st_size > 10**9:
        size = f"{status.st_size / 1e9:,.0f} GB"
        say(f"{info.path}: comparing its {size} with their hash, this once; --data.verify false leaves it out")
    found = content_hash(info)
    require(
        found == info.content_hash,
        f"{option}: {info.path} is damaged: its content has hash {found[:19]}, {info.path}.json says "
        f"{info.content_hash[:19]}: copy it again, or {fix}",
    )
    for record in records:  # the second where the images' folder cannot be written
        with suppress(OSError):
            record.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomically(record, json.dumps(verified).encode())
            return


def content_hash(info: DatasetInfo) -> str:
    """Hash of what a .beton file holds, as data_prep.write_beton writes it into the description: "sha256:" and the
    digest over all samples in order, each as little-endian int64 label, uint16 height, uint16 width, uint8 mode, uint64
    number of stored bytes, and these bytes."""
    reader = Reader(str(info.path))
    images, labels = (field_metadata(reader, field) for field in ("image", "label"))
    table = np.sort(reader.alloc_table, order="sample_id")
    head = [("label", "<i8"), ("height", "<u2"), ("width", "<u2"), ("mode", "u1"), ("bytes", "<u8")]
    heads = np.empty(len(labels), head)
    if len(table) != len(labels) or (table["ptr"] != images["data_ptr"]).any():
        return "a table that is not of its images"
    heads["label"], heads["bytes"] = labels.reshape(-1), table["size"]
    for name in ("height", "width", "mode"):
        heads[name] = images[name]
    digest = hashlib.sha256()
    with (
        closing(Readahead(info, np.arange(info.count), PAGES_AHEAD)) as ahead,
        open(info.path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as data,
        ProgressDisplay(info.count) as progress,
    ):
        for sample, (start, size) in enumerate(zip(table["ptr"].tolist(), table["size"].tolist(), strict=True)):
            digest.update(heads[sample].tobytes())
            digest.update(data[start : start + size])
            if sample % 256 == 0:
                ahead.advance(256)
                progress.update(sample, f"comparing {info.path.name} with its hash")
    return f"sha256:{digest.hexdigest()}"

"""Datasets by name: how their images are found and normalized."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.errors import InputError
from data_prep.sources.arrays import ArraySource, cifar10, cifar100, fashion_mnist, stacked_fashion_mnist
from data_prep.sources.decoding import Decoding
from data_prep.sources.encoded import FileSource
from data_prep.sources.imagenet import imagenet
from data_prep.sources.layouts import imagefolder, images, tiny_imagenet
from data_prep.sources.listed import part_files
from data_prep.sources.parquet import parquet
from data_prep.sources.tables import csv_table
from data_prep.sources.webdataset import webdataset

Source = ArraySource | FileSource


@dataclass(frozen=True)
class Dataset:
    """What is known of a dataset by its name.

    Attributes:
        load: called with the root folder and whether the training images are wanted, or the test images.
        mean: of R, G and B over pixels in [0, 1], as published with the dataset's common recipes.
        std: their standard deviation.
        downloaded: whether what is missing in the root folder is downloaded into it.
        packaged: whether Debian has it as a package, so that it needs no root folder.
        suffix: of its files, which the root folder may also be one of.
    """

    load: Callable[..., Source]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    downloaded: bool = False
    packaged: bool = False
    suffix: str = ""


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of ImageNet, which serve for other photographs too."""
DATASETS = {
    "fashion_mnist": Dataset(
        fashion_mnist, (0.2860, 0.2860, 0.2860), (0.3530, 0.3530, 0.3530), downloaded=True, packaged=True
    ),
    "stacked_fashion_mnist": Dataset(
        stacked_fashion_mnist, (0.2860, 0.2860, 0.2860), (0.3530, 0.3530, 0.3530), downloaded=True, packaged=True
    ),
    "cifar10": Dataset(cifar10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), downloaded=True),
    "cifar100": Dataset(cifar100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), downloaded=True),
    "tiny_imagenet": Dataset(tiny_imagenet, (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
    "imagenet": Dataset(imagenet, *IMAGENET),
    "imagefolder": Dataset(imagefolder, *IMAGENET),
    "images": Dataset(images, *IMAGENET),
    "csv": Dataset(csv_table, *IMAGENET, suffix=".csv"),
    "parquet": Dataset(parquet, *IMAGENET, suffix=".parquet"),
    "webdataset": Dataset(webdataset, *IMAGENET, suffix=".tar"),
}


def load_source(name: str, root: Path | None, train: bool, decoding: Decoding | None = None) -> Source:
    """The training or test images of a dataset, in an order that depends on the files' names only.

    Args:
        name: a key of `DATASETS`.
        root: folder of the dataset; None for (stacked) Fashion-MNIST from Debian's package.
        train: the training images, or the test images (official validation set of ImageNet and
            Tiny-ImageNet). Where `has_test_images` is false both are all images.
        decoding: how image files become pixels.

    Raises:
        InputError: a missing folder, a wrong layout, an empty class, a damaged archive, a failed download.
    """
    dataset = DATASETS[name]
    if root is None and not dataset.packaged:
        raise InputError(f"--root: {name} needs a folder to read from, e.g. --root data/{name}")
    if root is not None and not root.is_dir() and not (dataset.suffix and root.is_file()):
        mend = f"correct it, or make it (mkdir -p {root}); the dataset is downloaded into it"
        kind = "folder or file" if dataset.suffix else "folder"
        raise InputError(f"--root {root}: no such {kind}: {mend if dataset.downloaded else 'correct it'}")
    source = dataset.load(root, train)
    return replace(source, decoding=decoding) if decoding and isinstance(source, FileSource) else source


def has_test_images(name: str, root: Path | None) -> bool:
    """Whether the images to test on are others than those to train on."""
    if root and (suffix := DATASETS[name].suffix):
        return bool({"test", "validation"} & part_files(root, suffix).keys())
    return name not in ("imagefolder", "images")


def source_hash(name: str, source: Source) -> str:
    """What every part of a source shares, at whatever root folder it lies: "sha256:" and 64 hexadecimal digits.

    Of image files the names count, not what is in them, which would have to be read.

    Args:
        name: that of the dataset.
        source: all images of its training set, or of its test set.
    """
    digest = hashlib.sha256(name.encode() + b"\0")
    for piece in source.identity():
        digest.update(piece)
    return f"sha256:{digest.hexdigest()}"

"""The parts of a dataset that a command writes: which images go into which file."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep import splits
from data_prep.errors import InputError
from data_prep.options import Options
from data_prep.sources.datasets import Source, has_test_images, load_source
from data_prep.sources.decoding import Decoding


@dataclass(frozen=True)
class Part:
    """What goes into one file.

    Attributes:
        split: "train", "holdout" or "test".
        out: the .beton file.
        source: all images of the training set, or of the test set.
        indices: int64 [N], those to write, in this order.
    """

    split: str
    out: Path
    source: Source
    indices: NDArray[np.int64]


def out_files(options: Options) -> dict[str, Path]:
    """Split -> its .beton file, the training images last: where their file is, a set is whole."""
    if options.split != "all":
        return {options.split: options.out}
    wanted = {"holdout": options.holdout > 0, "test": has_test_images(options.dataset, options.root), "train": True}
    return {split: options.out / f"{split}.beton" for split in wanted if wanted[split]}


def load_parts(options: Options) -> list[Part]:
    """The images of each split in `out_files`, in that order; each source is listed once.

    Raises:
        InputError: the dataset is not there whole, or has too few images for what is asked.
    """
    decoding = Decoding(
        max_resolution=options.max_resolution,
        max_pixels=options.max_pixels,
        integer_range=options.integer_range,
        exif_transpose=options.exif_transpose,
    )
    load = cache(lambda train: load_source(options.dataset, options.root, train, decoding))
    outs = out_files(options)
    sources = {split: load(split != "test") for split in outs}
    return [Part(split, outs[split], source, _indices(options, split, source)) for split, source in sources.items()]


def _indices(options: Options, split: str, source: Source) -> NDArray[np.int64]:
    """Which images of its source a split has, in the order in which they are written."""
    num_classes = max(1, len(source.classes))  # without labels all are alike
    indices = np.arange(len(source))
    if split != "test":
        held_out = splits.holdout_indices(source.labels, options.holdout, num_classes)
        indices = held_out if split == "holdout" else np.delete(indices, held_out)
        if not len(indices):
            raise InputError(f"--holdout {options.holdout}: holds out none of {len(source)} images: raise it")
    if options.subset is not None:
        if options.subset > len(indices):
            raise InputError(f"--subset {options.subset}: split {split} has {len(indices)} images only")
        indices = indices[splits.balanced_subset(source.labels[indices], options.subset, num_classes)]
    return splits.shuffled(indices) if options.shuffle else indices

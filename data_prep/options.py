"""The command line of `python -m data_prep.write_beton`: a table of its options, and what their values have to be."""
# ruff: noqa: RUF009  (`_option` makes a field, no default)

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from data_prep.sources.datasets import DATASETS
from data_prep.sources.decoding import MAX_PIXELS

EXAMPLES = """\
examples; the first writes data/train.beton, data/holdout.beton and data/test.beton, as far as the dataset has them:
  %(prog)s --dataset fashion_mnist --split all --out data
  %(prog)s --dataset cifar100 --root cifar --split all --out data --holdout 0.2
  %(prog)s --dataset tiny_imagenet --root tiny-imagenet-200 --split test --out test.beton
  %(prog)s --dataset imagenet --root /imagenet --split all --out data --max-resolution 500 \
--write-mode proportion --shuffle
  %(prog)s --dataset imagefolder --root photos --split all --out data --write-mode jpg
  %(prog)s --dataset imagefolder --root photos --split test --out small.beton --subset 1000
  %(prog)s --dataset parquet --root downloads/food101/data --split all --out data --write-mode jpg
  %(prog)s --dataset images --root unlabelled --split train --holdout 0 --out train.beton
  %(prog)s --dataset csv --root list.csv --split train --holdout 0 --out train.beton
"""


def _option(**settings: Any) -> Any:
    """A field of `Options` that `ArgumentParser.add_argument` is told this of."""
    return field(metadata=settings)


@dataclass(frozen=True)
class Options:
    """The options, in the order of --help; that of the field `max_pixels` is --max-pixels."""

    dataset: str = _option(required=True, choices=sorted(DATASETS), help="which dataset to read")
    root: Path | None = _option(
        type=Path,
        metavar="PATH",
        help="its folder, or the one file of csv, parquet and webdataset; fashion_mnist and cifar are downloaded into "
        "it unless they are there; (stacked_)fashion_mnist needs none where Debian's package dataset-fashion-mnist is "
        "installed",
    )
    split: str = _option(
        required=True,
        choices=["all", "train", "holdout", "test"],
        help="train and holdout part the training images; test is the official test or validation set "
        "(for imagefolder and images: the whole tree); all writes the three of them, as far as there are any, and "
        "says which images of one are in another too",
    )
    out: Path = _option(
        required=True,
        type=Path,
        metavar="X.beton|FOLDER",
        help="file to write, or with --split all the folder for train.beton, holdout.beton and test.beton; old files "
        "are replaced",
    )
    holdout: float = _option(
        type=float,
        default=0.1,
        metavar="FRACTION",
        help="part of the training images that is held out, always the same ones (default: %(default)s)",
    )
    subset: int | None = _option(
        type=int, metavar="N", help="write only N images of each split, balanced over the classes"
    )
    shuffle: bool = _option(
        action="store_true",
        help="write the images in random order, always the same: for training in quasi-random order, when the file is "
        "larger than memory",
    )
    max_resolution: int | None = _option(
        type=int, metavar="PIXELS", help="scale down images whose longer side exceeds this"
    )
    max_pixels: int = _option(
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help="a file with more pixels is decoded at a reduced scale, if it is a JPEG and --max-resolution is given, "
        "and refused otherwise: it may be a decompression bomb (default: %(default)s)",
    )
    integer_range: int | None = _option(
        type=int,
        metavar="WHITE",
        help="the value of white in integer pixels of more than 8 bits, e.g. 255, 4095 or 65535, where the file does "
        "not tell it; without this option: 65535 in 16-bit pictures with a value that needs all 16, others are refused",
    )
    exif_transpose: bool = _option(
        action="store_true",
        help="turn and flip pictures as their EXIF orientation says, which is ignored otherwise, as by torchvision and "
        "timm (TIFFs always are turned)",
    )
    write_mode: str = _option(
        choices=["raw", "jpg", "proportion"],
        default="raw",
        help="store pixels, JPEG, or a mix by --compress-probability (default: %(default)s)",
    )
    jpeg_quality: int = _option(type=int, default=90, metavar="1..100", help="(default: %(default)s)")
    compress_probability: float = _option(
        type=float,
        default=0.5,
        metavar="P",
        help="share of images that --write-mode proportion stores as JPEG (default: %(default)s)",
    )
    workers: int = _option(
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: one a core, here %(default)s); the content does not depend on it",
    )

    @property
    def holdout_file(self) -> Path:
        """Where --split all writes the images that are held out."""
        return self.out / "holdout.beton"


@dataclass(frozen=True)
class Requirement:
    """Which values an option may have.

    Attributes:
        option: e.g. "--max-pixels".
        holds: whether the options meet it.
        mend: what to do where they do not; in it {o} is formatted as the options.
    """

    option: str
    holds: Callable[[Options], bool]
    mend: str


REQUIREMENTS = (
    Requirement("--holdout", lambda o: 0 <= o.holdout < 1, "give a fraction from 0 to below 1"),
    Requirement(
        "--holdout",
        lambda o: o.holdout > 0 or o.split != "holdout",
        "give a fraction above 0, or there is nothing to write",
    ),
    Requirement("--subset", lambda o: o.subset is None or o.subset > 0, "give a number of images, 1 or more"),
    Requirement(
        "--max-resolution",
        lambda o: o.max_resolution is None or 0 < o.max_resolution < 2**16,
        "give a number of pixels from 1 to 65535",
    ),
    Requirement("--max-pixels", lambda o: o.max_pixels > 0, "give a number of pixels, 1 or more"),
    Requirement(
        "--integer-range",
        lambda o: o.integer_range is None or 0 < o.integer_range < 2**31,
        "give the value of white, from 1 to 2147483647",
    ),
    Requirement("--jpeg-quality", lambda o: 0 < o.jpeg_quality <= 100, "give a quality from 1 to 100"),
    Requirement("--compress-probability", lambda o: 0 <= o.compress_probability <= 1, "give a number from 0 to 1"),
    Requirement("--workers", lambda o: o.workers > 0, "give a number of processes, 1 or more"),
    Requirement(
        "--out",
        lambda o: o.out.is_dir() or o.split != "all",
        "no folder, which --split all writes into: mkdir -p {o.out}",
    ),
    Requirement(
        "--holdout",
        lambda o: o.holdout > 0 or o.split != "all" or not o.holdout_file.exists(),
        "train.beton would hold images of {o.holdout_file}: remove it",
    ),
    Requirement("--out", lambda o: o.out.suffix == ".beton" or o.split == "all", "give a name that ends in .beton"),
    Requirement(
        "--out",
        lambda o: o.out.parent.is_dir() or o.split == "all",
        "no folder {o.out.parent}: mkdir -p {o.out.parent}",
    ),
    Requirement(
        "--out",
        lambda o: not o.out.is_dir() or o.split == "all",
        "is a folder: give the name of a file, or --split all",
    ),
)
"""The first that is not met is told."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (--help shows examples)", file=sys.stderr)
        sys.exit(2)


def parse_options(argv: Sequence[str] | None) -> Options:
    """Options, each within its range; a bad one ends the program with status 2 and one line."""
    parser = _Parser(
        prog="python -m data_prep.write_beton",
        usage="%(prog)s --dataset NAME [--root PATH] --split all --out FOLDER [options]\n"
        "       %(prog)s --dataset NAME [--root PATH] --split train|holdout|test --out X.beton [options]",
        description="Write a dataset as X.beton for FFCV, with X.beton.json, which describes it, and\n"
        "X.beton.digests.npy, which has 64 bits of a hash of each image's pixels (uint64, in the file's order).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for each in fields(Options):
        parser.add_argument(f"--{each.name.replace('_', '-')}", **each.metadata)
    options = Options(**vars(parser.parse_args(argv)))
    for requirement in REQUIREMENTS:
        if not requirement.holds(options):
            value = getattr(options, requirement.option.removeprefix("--").replace("-", "_"))
            parser.error(f"{requirement.option} {value}: {requirement.mend.format(o=options)}")
    return options

"""Writes a dataset as a .beton file, with a JSON description beside it.

    python -m data_prep.write_beton --dataset fashion_mnist --split train --out data/train.beton

Exit status: 0 written, 2 refused (one line on stderr), 130 interrupted, 143 terminated. A .beton never
stands under its final name before it is whole and its JSON lies beside it.
"""

import argparse
import fcntl
import glob
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from data_prep import splits, writer
from data_prep.sources import MAX_PIXELS, NORMALIZATION, Decoding, FileSource, InputError, kinds, load_source

FORMAT = 1

EXAMPLES = """\
examples, the three parts of one dataset first:
  %(prog)s --dataset fashion_mnist --split train --out train.beton
  %(prog)s --dataset fashion_mnist --split holdout --out holdout.beton
  %(prog)s --dataset fashion_mnist --split test --out test.beton
  %(prog)s --dataset cifar100 --root data --split train --out train.beton
  %(prog)s --dataset tiny_imagenet --root tiny-imagenet-200 --split test --out test.beton
  %(prog)s --dataset imagenet --root /imagenet --split train --out train.beton --max-resolution 500 \
--write-mode proportion --shuffle
  %(prog)s --dataset imagefolder --root photos --split train --out train.beton --write-mode jpg
  %(prog)s --dataset imagefolder --root photos --split test --out small.beton --subset 1000
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (--help shows examples)", file=sys.stderr)
        sys.exit(2)


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options, each within its range; a bad one ends the program with status 2 and one line."""
    parser = _Parser(
        prog="python -m data_prep.write_beton",
        usage="%(prog)s --dataset NAME [--root DIR] --split train|holdout|test --out X.beton [options]",
        description="Write a dataset as X.beton for FFCV, and X.beton.json, which describes it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dataset", required=True, choices=sorted(NORMALIZATION), help="which dataset to read")
    add(
        "--root",
        type=Path,
        metavar="DIR",
        help="its folder; fashion_mnist and cifar are downloaded into it unless they are there; (stacked_)"
        "fashion_mnist needs none where Debian's package dataset-fashion-mnist is installed",
    )
    add(
        "--split",
        required=True,
        choices=["train", "holdout", "test"],
        help="train and holdout part the training images; test is the official test or validation set "
        "(for imagefolder: the whole tree)",
    )
    add("--out", required=True, type=Path, metavar="X.beton", help="file to write; an old one is replaced")
    add(
        "--holdout",
        type=float,
        default=0.1,
        metavar="FRACTION",
        help="part of the training images that is held out, always the same ones (default: %(default)s)",
    )
    add("--subset", type=int, metavar="N", help="write only N images of the split, balanced over the classes")
    add(
        "--shuffle",
        action="store_true",
        help="write the images in random order, always the same: for training in quasi-random order, when the file is "
        "larger than memory",
    )
    add(
        "--max-resolution",
        type=int,
        metavar="PIXELS",
        help="scale down images whose longer side exceeds this",
    )
    add(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help="a file with more pixels is decoded at a reduced scale, if it is a JPEG and --max-resolution is given, "
        "and refused otherwise: it may be a decompression bomb (default: %(default)s)",
    )
    add(
        "--integer-range",
        type=int,
        metavar="WHITE",
        help="the value of white in integer pixels of more than 8 bits, e.g. 255, 4095 or 65535, where the file does "
        "not tell it; without this option: 65535 in 16-bit pictures with a value that needs all 16, others are refused",
    )
    add(
        "--exif-transpose",
        action="store_true",
        help="turn and flip pictures as their EXIF orientation says, which is ignored otherwise, as by torchvision and "
        "timm (TIFFs always are turned)",
    )
    add(
        "--write-mode",
        choices=["raw", "jpg", "proportion"],
        default="raw",
        help="store pixels, JPEG, or a mix by --compress-probability (default: %(default)s)",
    )
    add("--jpeg-quality", type=int, default=90, metavar="1..100", help="(default: %(default)s)")
    add(
        "--compress-probability",
        type=float,
        default=0.5,
        metavar="P",
        help="share of images that --write-mode proportion stores as JPEG (default: %(default)s)",
    )
    add(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: one a core, here %(default)s); the content does not depend on it",
    )
    options = parser.parse_args(argv)

    def require(good: bool, option: str, mend: str) -> None:
        if not good:
            value = getattr(options, option.removeprefix("--").replace("-", "_"))
            parser.error(f"{option} {value}: {mend}")

    require(0 <= options.holdout < 1, "--holdout", "give a fraction from 0 to below 1")
    if options.split == "holdout":
        require(options.holdout > 0, "--holdout", "give a fraction above 0, or there is nothing to write")
    require(options.subset is None or options.subset > 0, "--subset", "give a number of images, 1 or more")
    require(
        options.max_resolution is None or 0 < options.max_resolution < 2**16,
        "--max-resolution",
        "give a number of pixels from 1 to 65535",
    )
    require(options.max_pixels > 0, "--max-pixels", "give a number of pixels, 1 or more")
    require(
        options.integer_range is None or 0 < options.integer_range < 2**31,
        "--integer-range",
        "give the value of white, from 1 to 2147483647",
    )
    require(0 < options.jpeg_quality <= 100, "--jpeg-quality", "give a quality from 1 to 100")
    require(0 <= options.compress_probability <= 1, "--compress-probability", "give a number from 0 to 1")
    require(options.workers > 0, "--workers", "give a number of processes, 1 or more")
    require(options.out.suffix == ".beton", "--out", "give a name that ends in .beton")
    require(options.out.parent.is_dir(), "--out", f"no folder {options.out.parent}: mkdir -p {options.out.parent}")
    require(not options.out.is_dir(), "--out", "is a folder: give the name of a file")
    return options


def write_beton(options: argparse.Namespace) -> dict[str, Any]:
    """Writes `options.out` and its JSON, and returns what the JSON holds.

    Raises:
        InputError: anything that the user can mend; then neither file is written or changed.
    """
    out: Path = options.out
    with _temporary_files(out) as (new_beton, new_json):
        description = _write(options, new_beton)
        try:
            new_json.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
            _publish(new_beton, new_json, out)
        except OSError as error:
            raise InputError(f"--out {out}: {error.strerror}: free some space, or write elsewhere") from error
    return description


@contextmanager
def _temporary_files(out: Path) -> Iterator[tuple[Path, Path]]:
    """Hidden names beside `out`: of a .beton, which exists, and of its JSON; neither is there at the end.

    The .beton is locked as long as this process or one of its workers lives. By that lock, those that another left
    behind when it was killed are told from those of one that still writes the same `out`, and removed at first.
    """
    for data in out.parent.glob(f".{glob.escape(out.name)}.*.data.tmp"):
        with suppress(OSError), data.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _json_of(data).unlink(missing_ok=True)
            data.unlink()
    lock = None
    try:
        # Refuses a folder that is not ours before hours of reading. Somebody may remove the file before it is locked.
        while lock is None or not os.fstat(lock.fileno()).st_nlink:
            data = out.with_name(f".{out.name}.{secrets.token_hex(4)}.data.tmp")
            lock = data.open("xb")
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}: choose a folder that you may write to") from error
    try:
        yield data, _json_of(data)
    finally:
        data.unlink(missing_ok=True)
        _json_of(data).unlink(missing_ok=True)
        lock.close()


def _json_of(data: Path) -> Path:
    return data.with_name(data.name.removesuffix("data.tmp") + "json.tmp")


def _write(options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Writes the images to `path` and describes the file."""
    decoding = Decoding(
        max_resolution=options.max_resolution,
        max_pixels=options.max_pixels,
        integer_range=options.integer_range,
        exif_transpose=options.exif_transpose,
    )
    source = load_source(options.dataset, options.root, options.split != "test", decoding)
    from_files = isinstance(source, FileSource)
    num_classes = len(source.classes)
    indices = np.arange(len(source))
    if options.split != "test":
        held_out = splits.holdout_indices(source.labels, options.holdout, num_classes)
        indices = held_out if options.split == "holdout" else np.delete(indices, held_out)
        if not len(indices):
            raise InputError(f"--holdout {options.holdout}: holds out none of {len(source)} images: raise it")
    if options.subset is not None:
        if options.subset > len(indices):
            raise InputError(f"--subset {options.subset}: split {options.split} has {len(indices)} images only")
        indices = indices[splits.balanced_subset(source.labels[indices], options.subset, num_classes)]
    if options.shuffle:
        indices = splits.shuffled(indices)
    part = f"{len(indices):,} of {len(source):,} images, classes: {num_classes}"
    left_out = kinds(source.left_out) if isinstance(source, FileSource) else ""
    print(f"{options.dataset} {options.split}: {part}{left_out and f'; left out: {left_out}'}", file=sys.stderr)

    encoding = writer.Encoding(
        write_mode=options.write_mode,
        max_resolution=options.max_resolution,
        jpeg_quality=options.jpeg_quality,
        compress_probability=options.compress_probability,
    )
    writer.write_images(path, source, indices, encoding, options.workers)
    mean, std = NORMALIZATION[options.dataset]
    in_training = options.split != "test"
    has_jpegs = options.write_mode != "raw"
    return {
        "format": FORMAT,
        "dataset": options.dataset,
        "split": options.split,
        "count": len(indices),
        "num_classes": num_classes,
        "classes": source.classes,
        "image_size": writer.stored_sizes(path),
        "content_hash": writer.content_hash(path),
        "beton_bytes": path.stat().st_size,
        # null: the setting had no part in this file.
        "recipe": {
            "holdout": options.holdout if in_training else None,
            "holdout_seed": splits.HOLDOUT_SEED if in_training else None,
            "subset": options.subset,
            "subset_seed": splits.SUBSET_SEED if options.subset else None,
            "shuffle_seed": splits.SHUFFLE_SEED if options.shuffle else None,
            "max_resolution": options.max_resolution,
            "max_pixels": options.max_pixels if from_files and options.max_resolution else None,
            "integer_range": options.integer_range if from_files else None,
            "exif_transpose": options.exif_transpose if from_files else None,
            "write_mode": options.write_mode,
            "jpeg_quality": options.jpeg_quality if has_jpegs else None,
            "compress_probability": (options.compress_probability if options.write_mode == "proportion" else None),
            "compress_seed": writer.COMPRESS_SEED if options.write_mode == "proportion" else None,
        },
        "normalization": {"mean": mean, "std": std},
    }


def _publish(new_beton: Path, new_json: Path, out: Path) -> None:
    """Moves both files to their final names.

    A reader must never see a .beton with the JSON of another one. So an old .beton goes first, then the
    JSON comes, then the .beton: killed in between, this leaves a JSON alone, and readers miss the .beton.
    """
    for path in (new_beton, new_json):
        _sync(path)
    out.unlink(missing_ok=True)
    new_json.replace(out.with_name(out.name + ".json"))
    new_beton.replace(out)
    _sync(out.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = parse_options(argv)
    start = time.monotonic()
    try:
        written = write_beton(options)
    except InputError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    (low_h, low_w), (high_h, high_w) = written["image_size"]["min"], written["image_size"]["max"]
    size = f"{high_h}x{high_w}" if (low_h, low_w) == (high_h, high_w) else f"{low_h}x{low_w} to {high_h}x{high_w}"
    print(
        f"wrote {options.out}: {written['count']:,} images, {size}, {written['beton_bytes'] / 1e6:.1f} MB, "
        f"{written['content_hash'][:19]}, {time.monotonic() - start:.1f} s"
    )
    return 0


def _exit_on_signal(number: int, frame: Any) -> NoReturn:
    sys.exit(128 + number)  # an exception, so that workers end and temporary files go


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal may not show every name
    signal.signal(signal.SIGTERM, _exit_on_signal)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # not under nohup
        signal.signal(signal.SIGHUP, _exit_on_signal)
    sys.exit(main())

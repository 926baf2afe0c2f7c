"""Writes a dataset, or parts of it, as .beton files, each with a JSON description and digests of its images beside it.

    python -m data_prep.write_beton --dataset fashion_mnist --split all --out data

Exit status: 0 written, 2 refused (one line on stderr), 130 interrupted, 143 terminated. A .beton never
stands under its final name before it is whole and what describes it lies beside it.
"""

import argparse
import fcntl
import glob
import itertools
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from data_prep import splits, writer
from data_prep.sources import (
    MAX_PIXELS,
    NORMALIZATION,
    Decoding,
    FileSource,
    InputError,
    Source,
    kinds,
    load_source,
    source_hash,
)

FORMAT = 1
ENDINGS = {".digests.npy": "digests.tmp", ".json": "json.tmp", "": "data.tmp"}
"""A part's files, in the order in which they get their names: what follows X.beton in these, and what in the hidden
ones that they have before."""

EXAMPLES = """\
examples; the first writes data/train.beton, data/holdout.beton and data/test.beton, as far as the dataset has them:
  %(prog)s --dataset fashion_mnist --split all --out data
  %(prog)s --dataset cifar100 --root cifar --split all --out data --holdout 0.2
  %(prog)s --dataset tiny_imagenet --root tiny-imagenet-200 --split test --out test.beton
  %(prog)s --dataset imagenet --root /imagenet --split all --out data --max-resolution 500 \
--write-mode proportion --shuffle
  %(prog)s --dataset imagefolder --root photos --split all --out data --write-mode jpg
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
        usage="%(prog)s --dataset NAME [--root DIR] --split all --out FOLDER [options]\n"
        "       %(prog)s --dataset NAME [--root DIR] --split train|holdout|test --out X.beton [options]",
        description="Write a dataset as X.beton for FFCV, with X.beton.json, which describes it, and\n"
        "X.beton.digests.npy, which has 64 bits of a hash of each image's pixels (uint64, in the file's order).",
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
        choices=["all", "train", "holdout", "test"],
        help="train and holdout part the training images; test is the official test or validation set "
        "(for imagefolder: the whole tree); all writes the three of them (no test of imagefolder), and says which "
        "images of one are in another too",
    )
    add(
        "--out",
        required=True,
        type=Path,
        metavar="X.beton|FOLDER",
        help="file to write, or with --split all the folder for train.beton, holdout.beton and test.beton; old files "
        "are replaced",
    )
    add(
        "--holdout",
        type=float,
        default=0.1,
        metavar="FRACTION",
        help="part of the training images that is held out, always the same ones (default: %(default)s)",
    )
    add("--subset", type=int, metavar="N", help="write only N images of each split, balanced over the classes")
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
    if options.split == "all":
        require(options.out.is_dir(), "--out", f"no folder, which --split all writes into: mkdir -p {options.out}")
        kept = options.out / "holdout.beton"
        require(
            options.holdout > 0 or not kept.exists(), "--holdout", f"train.beton would hold images of {kept}: remove it"
        )
        return options
    require(options.out.suffix == ".beton", "--out", "give a name that ends in .beton")
    require(options.out.parent.is_dir(), "--out", f"no folder {options.out.parent}: mkdir -p {options.out.parent}")
    require(not options.out.is_dir(), "--out", "is a folder: give the name of a file, or --split all")
    return options


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


def write_beton(options: argparse.Namespace) -> None:
    """Writes the file, or with --split all the files, that the options ask for, and says so.

    With the first new file, all old ones of the set go, which may have images of the new. The training images come
    last: where their file is, the set is whole.

    Raises:
        InputError: anything that the user can mend; then only those files were written that were said to be.
    """
    outs = {options.split: options.out}
    if options.split == "all":
        wanted = {"holdout": options.holdout > 0, "test": options.dataset != "imagefolder", "train": True}
        outs = {split: options.out / f"{split}.beton" for split in wanted if wanted[split]}
    with ExitStack() as stack:
        files = {split: stack.enter_context(_temporary_files(out)) for split, out in outs.items()}
        parts = _parts(options, outs)
        digests = {}
        for number, part in enumerate(parts):
            outdated = [later.out for later in parts[number:]]
            digests[part.out.name] = _write_part(options, part, files[part.split], outdated)
    for (name, ours), (other, theirs) in itertools.combinations(digests.items(), 2):
        if shared := np.isin(ours, theirs).sum():
            _warn(f"{shared:,} images of {name} are in {other} too, pixel for pixel: they say nothing of new images")


def _parts(options: argparse.Namespace, outs: dict[str, Path]) -> list[Part]:
    """The images of each split in `outs`; each source is listed once."""
    decoding = Decoding(
        max_resolution=options.max_resolution,
        max_pixels=options.max_pixels,
        integer_range=options.integer_range,
        exif_transpose=options.exif_transpose,
    )
    load = cache(lambda train: load_source(options.dataset, options.root, train, decoding))
    sources = {split: load(split != "test") for split in outs}
    return [Part(split, outs[split], source, _indices(options, split, source)) for split, source in sources.items()]


def _indices(options: argparse.Namespace, split: str, source: Source) -> NDArray[np.int64]:
    """Which images of its source a split has, in the order in which they are written."""
    num_classes = len(source.classes)
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


@contextmanager
def _temporary_files(out: Path) -> Iterator[dict[str, Path]]:
    """Hidden names beside `out`, by `ENDINGS`, of a .beton, which exists, and what goes with it; none is there at the
    end.

    The .beton is locked as long as this process or one of its workers lives. By that lock, those that another left
    behind when it was killed are told from those of one that still writes the same `out`, and removed at first.
    """
    for data in out.parent.glob(f".{glob.escape(out.name)}.*.data.tmp"):
        with suppress(OSError), data.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in _with_companions(data).values():
                path.unlink(missing_ok=True)
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
        yield _with_companions(data)
    finally:
        for path in _with_companions(data).values():
            path.unlink(missing_ok=True)
        lock.close()


def _with_companions(data: Path) -> dict[str, Path]:
    """The temporary files that go with that of a .beton, and this one last, by the endings that they will have."""
    stem = data.name.removesuffix(ENDINGS[""])
    return {ending: data.with_name(stem + temporary) for ending, temporary in ENDINGS.items()}


def _write_part(
    options: argparse.Namespace, part: Part, files: dict[str, Path], outdated: list[Path]
) -> NDArray[np.uint64]:
    """Writes one part to the temporary `files`, publishes it instead of the `outdated` .beton files, and says what it
    is; returns the digests of its images."""
    start = time.monotonic()
    source, out = part.source, part.out
    which = f"{len(part.indices):,} of {len(source):,} images, classes: {len(source.classes)}"
    left_out = kinds(source.left_out) if isinstance(source, FileSource) else ""
    print(f"{options.dataset} {part.split}: {which}{left_out and f'; left out: {left_out}'}", file=sys.stderr)
    encoding = writer.Encoding(
        write_mode=options.write_mode,
        max_resolution=options.max_resolution,
        jpeg_quality=options.jpeg_quality,
        compress_probability=options.compress_probability,
    )
    digests = writer.write_images(files[""], source, part.indices, encoding, options.workers)
    description = _describe(options, part, files[""])
    try:
        files[".json"].write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        with files[".digests.npy"].open("wb") as file:
            np.save(file, digests)
        _publish(files, out, outdated)
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}: free some space, or write elsewhere") from error

    (low_h, low_w), (high_h, high_w) = description["image_size"]["min"], description["image_size"]["max"]
    size = f"{high_h}x{high_w}" if (low_h, low_w) == (high_h, high_w) else f"{low_h}x{low_w} to {high_h}x{high_w}"
    print(
        f"wrote {out}: {len(digests):,} images, {size}, {description['beton_bytes'] / 1e6:.1f} MB, "
        f"{description['content_hash'][:19]}, {time.monotonic() - start:.1f} s",
        flush=True,
    )
    copies, contradictions = _count_copies(digests, source.labels[part.indices])
    if copies:
        _warn(
            f"{copies:,} images of {out.name} are the same as another of it, pixel for pixel, {contradictions:,} of "
            "them with different labels"
        )
    return digests


def _count_copies(digests: NDArray[np.uint64], labels: NDArray[np.int64]) -> tuple[int, int]:
    """How many images have the same digest as another, and how many of these as one of another label."""
    _, group, sizes = np.unique(digests, return_inverse=True, return_counts=True)
    step = labels.max() + 1
    labels_in_group = np.bincount(np.unique(group * step + labels) // step)
    return int(sizes[sizes > 1].sum()), int(sizes[labels_in_group > 1].sum())


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _describe(options: argparse.Namespace, part: Part, path: Path) -> dict[str, Any]:
    """What X.beton.json says of the .beton file at `path`."""
    mean, std = NORMALIZATION[options.dataset]
    in_training = part.split != "test"
    has_jpegs = options.write_mode != "raw"
    from_files = isinstance(part.source, FileSource)
    return {
        "format": FORMAT,
        "dataset": options.dataset,
        # Of which images, before they were split; with the split and the recipe, exactly which these are.
        "source": {"count": len(part.source), "hash": source_hash(options.dataset, part.source)},
        "split": part.split,
        "count": len(part.indices),
        "num_classes": len(part.source.classes),
        "classes": part.source.classes,
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


def _publish(files: dict[str, Path], out: Path, outdated: list[Path]) -> None:
    """Moves the files to their final names.

    A reader must never see a .beton with the JSON or the digests of another one. So what is outdated goes first, each
    .beton before its companions, then the new companions come, then the .beton: killed in between, this leaves
    companions alone, and readers miss the .beton.
    """
    for path in files.values():
        _sync(path)
    for path, ending in itertools.product(outdated, reversed(ENDINGS)):
        path.with_name(path.name + ending).unlink(missing_ok=True)
    for ending, path in files.items():
        path.replace(out.with_name(out.name + ending))
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
    try:
        write_beton(options)
    except InputError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: no unfinished file is left", file=sys.stderr)
        return 130
    return 0


def _exit_on_signal(number: int, frame: Any) -> NoReturn:
    sys.exit(128 + number)  # an exception, so that workers end and temporary files go


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal may not show every name
    signal.signal(signal.SIGTERM, _exit_on_signal)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # not under nohup
        signal.signal(signal.SIGHUP, _exit_on_signal)
    sys.exit(main())

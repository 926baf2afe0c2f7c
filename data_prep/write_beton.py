"""Writes a dataset, or parts of it, as .beton files, each with a JSON description and digests of its images beside it.

    python -m data_prep.write_beton --dataset fashion_mnist --split all --out data

Exit status: 0 written, 2 refused (one line on stderr), 130 interrupted, 143 terminated. A .beton never
stands under its final name before it is whole and what describes it lies beside it.
"""

import itertools
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.beton.writer import Encoding, write_images
from data_prep.description import describe
from data_prep.errors import InputError
from data_prep.options import Options, parse_options
from data_prep.parts import Part, load_parts, out_files
from data_prep.publishing import BetonFiles, publish, temporary_files
from data_prep.signals import exit_on_termination
from data_prep.sources.encoded import FileSource
from data_prep.sources.pictures import kinds


def write_beton(options: Options) -> None:
    """Writes the file, or with --split all the files, that the options ask for, and says so.

    With the first new file, all old ones of the set go, which may have images of the new. The training images come
    last: where their file is, the set is whole.

    Raises:
        InputError: anything that the user can mend; then only those files were written that were said to be.
    """
    with ExitStack() as stack:
        files = {split: stack.enter_context(temporary_files(out)) for split, out in out_files(options).items()}
        parts = load_parts(options)
        digests = {}
        for number, part in enumerate(parts):
            outdated = [later.out for later in parts[number:]]
            digests[part.out.name] = _write_part(options, part, files[part.split], outdated)
    for (name, ours), (other, theirs) in itertools.combinations(digests.items(), 2):
        if shared := np.isin(ours, theirs).sum():
            _warn(f"{shared:,} images of {name} are in {other} too, pixel for pixel: they say nothing of new images")


def _write_part(options: Options, part: Part, files: BetonFiles, outdated: list[Path]) -> NDArray[np.uint64]:
    """Writes one part to the temporary `files`, publishes it instead of the `outdated` .beton files, and says what it
    is; returns the digests of its images, uint64 [N]."""
    start = time.monotonic()
    _announce(options.dataset, part)
    encoding = Encoding(
        write_mode=options.write_mode,
        max_resolution=options.max_resolution,
        jpeg_quality=options.jpeg_quality,
        compress_probability=options.compress_probability,
    )
    digests = write_images(files.beton, part.source, part.indices, encoding, options.workers)
    description = describe(options, part, files.beton)
    try:
        files.description.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        with files.digests.open("wb") as file:
            np.save(file, digests)
        publish(files, part.out, outdated)
    except OSError as error:
        raise InputError(f"--out {part.out}: {error.strerror}: free some space, or write elsewhere") from error
    _report(part.out, description, time.monotonic() - start)
    copies, contradictions = _count_copies(digests, part.source.labels[part.indices])
    if copies:
        labels = f", {contradictions:,} of them with different labels" if part.source.classes else ""
        _warn(f"{copies:,} images of {part.out.name} are the same as another of it, pixel for pixel{labels}")
    return digests


def _announce(dataset: str, part: Part) -> None:
    source = part.source
    which = f"{len(part.indices):,} of {len(source):,} images, classes: {len(source.classes) or 'none'}"
    if isinstance(source, FileSource):
        left_out = kinds(source.left_out)
        which += f"{source.found and f'; from {source.found}'}{left_out and f'; left out: {left_out}'}"
    print(f"{dataset} {part.split}: {which}", file=sys.stderr)


def _report(out: Path, description: dict[str, Any], seconds: float) -> None:
    (low_h, low_w), (high_h, high_w) = description["image_size"]["min"], description["image_size"]["max"]
    size = f"{high_h}x{high_w}" if (low_h, low_w) == (high_h, high_w) else f"{low_h}x{low_w} to {high_h}x{high_w}"
    print(
        f"wrote {out}: {description['count']:,} images, {size}, {description['beton_bytes'] / 1e6:.1f} MB, "
        f"{description['content_hash'][:19]}, {seconds:.1f} s",
        flush=True,
    )


def _count_copies(digests: NDArray[np.uint64], labels: NDArray[np.int64]) -> tuple[int, int]:
    """How many images have the same digest as another, and how many of these as one of another label."""
    _, group, sizes = np.unique(digests, return_inverse=True, return_counts=True)
    step = labels.max() + 1
    labels_in_group = np.bincount(np.unique(group * step + labels) // step)
    return int(sizes[sizes > 1].sum()), int(sizes[labels_in_group > 1].sum())


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


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


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal may not show every name
    exit_on_termination()
    sys.exit(main())

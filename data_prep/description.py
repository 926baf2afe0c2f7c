"""X.beton.json: of which images a .beton file was made, how, and what it holds."""

from pathlib import Path
from typing import Any

from data_prep import splits
from data_prep.beton.reader import content_hash, stored_sizes
from data_prep.beton.writer import COMPRESS_SEED
from data_prep.options import Options
from data_prep.parts import Part
from data_prep.sources.datasets import DATASETS, source_hash
from data_prep.sources.encoded import FileSource

FORMAT = 1


def describe(options: Options, part: Part, path: Path) -> dict[str, Any]:
    """What X.beton.json says of the .beton file at `path`, which was written with these options."""
    dataset = DATASETS[options.dataset]
    return {
        "format": FORMAT,
        "dataset": options.dataset,
        # Of which images, before they were split; with the split and the recipe, exactly which these are.
        "source": {"count": len(part.source), "hash": source_hash(options.dataset, part.source)},
        "split": part.split,
        "count": len(part.indices),
        # Without labels the file has zeros for them.
        "labels": bool(part.source.classes),
        "num_classes": max(1, len(part.source.classes)),
        "classes": part.source.classes,
        "image_size": stored_sizes(path),
        "content_hash": content_hash(path),
        "beton_bytes": path.stat().st_size,
        "recipe": _recipe(options, part),
        "normalization": {"mean": dataset.mean, "std": dataset.std},
    }


def _recipe(options: Options, part: Part) -> dict[str, Any]:
    """The settings; None: the setting had no part in this file."""
    in_training = part.split != "test"
    has_jpegs = options.write_mode != "raw"
    from_files = isinstance(part.source, FileSource)
    return {
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
        "compress_probability": options.compress_probability if options.write_mode == "proportion" else None,
        "compress_seed": COMPRESS_SEED if options.write_mode == "proportion" else None,
    }

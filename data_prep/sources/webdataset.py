"""WebDataset: tar files in which the files of a sample have one name and different suffixes; read in place."""

import json
import os
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np

from data_prep.errors import InputError
from data_prep.sources.encoded import FileSource
from data_prep.sources.listed import Listed, listed_images
from data_prep.sources.pictures import is_image, unwanted_below
from data_prep.sources.tars import Member, Members, index, read_at


def webdataset(root: Path, train: bool) -> FileSource:
    """The images of the tar file `root`, or of the shards in that folder, shard by shard as they lie there.

    A sample KEY is one image, KEY.jpg, and its label: KEY.cls, the number or the name of a class, or `label` in
    KEY.json.

    Raises:
        InputError: what a shard lacks, or a sample.
    """
    return listed_images(root, ".tar", train, _read)


@cache  # the training images are asked for again, for the classes of the test images
def _read(shards: tuple[Path, ...]) -> Listed:
    members: list[str] = []
    where: list[tuple[int, int, int]] = []
    labels: list[int | str | None] = []
    left_out: Counter[str] = Counter()
    for number, shard in enumerate(shards):
        for key, files in _samples(shard, left_out).items():
            images = {suffix: each for suffix, each in files.items() if is_image(f"x.{suffix}", lambda: None)}
            left_out.update(
                f".{suffix}" if suffix else "without suffix"
                for suffix in files.keys() - images.keys() - {"cls", "json"}
            )
            if len(images) > 1:
                raise InputError(f"{shard}: {key} has {len(images)} images ({', '.join(images)}): keep one of them")
            if not images:
                left_out["samples without an image"] += 1
                continue
            (image,) = images.values()
            members.append(image.name)
            where.append((number, image.start, image.size))
            labels.append(_label(shard, files))
    storage = Members([str(shard) for shard in shards], np.array(where, np.int64).reshape(-1, 3), members)
    return Listed(storage, members, labels, left_out)


def _samples(shard: Path, left_out: Counter[str]) -> dict[str, dict[str, Member]]:
    """Key -> suffix, in lower case and without its dot -> file. The key is the name up to its first dot."""
    samples: dict[str, dict[str, Member]] = {}
    for member in index(shard):
        folder, name = os.path.split(member.name)
        if kind := "hidden" if name.startswith(".") else unwanted_below(folder.split("/")):
            left_out[kind] += 1
        else:
            stem, _, suffix = name.partition(".")
            samples.setdefault(os.path.join(folder, stem), {})[suffix.lower()] = member
    return samples


def _label(shard: Path, files: dict[str, Member]) -> int | str | None:
    """What the sample's .cls or .json says; None where it has neither."""
    for suffix in ("cls", "json"):
        if (member := files.get(suffix)) is None:
            continue
        try:
            text = read_at(str(shard), member.start, member.size).decode("utf-8")
            label = json.loads(text).get("label") if suffix == "json" else text.strip()
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"{shard}: {member.name} cannot be read ({error}): write the shard anew") from error
        if isinstance(label, str):
            return os.fsdecode(label.encode())
        if isinstance(label, int) and not isinstance(label, bool):
            return label
    return None

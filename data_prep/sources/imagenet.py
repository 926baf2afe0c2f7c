"""ImageNet as its organisers and Kaggle ship it, and as class folders: all of them give the same images in the same
order under the same names.

For training `train/<wnid>/*.JPEG`, or `ILSVRC2012_img_train.tar`, a tar file of one tar file a class; for validation
`val/<wnid>/*.JPEG` or, with a file that says their classes, a flat `val/` or `ILSVRC2012_img_val.tar`.
"""

import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from data_prep.errors import InputError
from data_prep.sources.encoded import FileSource
from data_prep.sources.files import class_folders, each_file_once, images_below, subfolders
from data_prep.sources.imagenet_labels import WANTED, ValidationLabels, validation_labels
from data_prep.sources.pictures import kinds, utf8_name
from data_prep.sources.tars import Member, Members, index, only_images

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
KAGGLE_FOLDERS = ("CLS-LOC", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")
"""Where Kaggle's train/ and val/ lie in what it ships."""


@dataclass(frozen=True)
class Images:
    """Training or validation images that were found.

    Attributes:
        found: where, for messages.
        wnids: their classes, sorted.
        load: reads which there are.
    """

    found: str
    wnids: list[str]
    load: Callable[[], FileSource]


def imagenet(root: Path, train: bool) -> FileSource:
    """The training or the validation images below `root`, however they lie there; the classes are the WordNet ids.

    Raises:
        InputError: there are none, not all of those that a file lists, or training and validation images of different
            classes.
    """
    places = [place for place in (root, *(root / folder for folder in KAGGLE_FOLDERS)) if place.is_dir()]
    validation = partial(_validation, root)
    find, find_other = (_training, validation) if train else (validation, _training)
    images = next(filter(None, map(find, places)), None)
    if images is None:
        raise InputError(f"--root {root}: {_missing(root, train)}")
    other = None
    with suppress(InputError):  # an evaluation machine may hold val/ alone; what is wrong with the other is no matter
        other = next(filter(None, map(find_other, places)), None)
    if other and other.wnids != images.wnids:
        odd = sorted(set(images.wnids) ^ set(other.wnids))
        raise InputError(
            f"--root {root}: {images.found} and {other.found} hold different classes ({len(odd)}, e.g. {odd[0]}): "
            "complete them, or move one of them away"
        )
    return replace(images.load(), found=images.found)


def _missing(root: Path, train: bool) -> str:
    """What was looked for in vain."""
    where = f"there or in its {', '.join(KAGGLE_FOLDERS)}"
    if train:
        return f"no training images; looked for {root}/train/<wnid>/*.JPEG and {TRAIN_TAR}, {where}"
    return (
        f"no validation images; looked for {root}/val/<wnid>/*.JPEG and, with {WANTED}, {root}/val/*.JPEG and "
        f"{VAL_TAR}, {where}"
    )


def _training(place: Path) -> Images | None:
    if images := _class_folders(place, "train"):
        return images
    tar = place / TRAIN_TAR
    if not tar.is_file():
        return None
    inner = {PurePosixPath(each.name).stem: each for each in index(tar) if each.name.endswith(".tar")}
    if not inner:
        raise InputError(f"{tar}: no tar files of classes in it, as in the organisers': get it anew")
    wnids = sorted(inner, key=os.fsencode)
    return Images(str(tar), list(map(utf8_name, wnids)), lambda: _from_train_tar(tar, inner, wnids))


def _class_folders(place: Path, split: str) -> Images | None:
    """`split`/<wnid>/**, if that folder has class folders."""
    folder, left_out = place / split, Counter[str]()
    wnids = subfolders(folder, left_out) if folder.is_dir() else []
    if not wnids:
        return None
    folders = {wnid: folder / wnid for wnid in wnids}
    return Images(str(folder), list(map(utf8_name, wnids)), lambda: class_folders(place, folders, left_out))


def _from_train_tar(tar: Path, inner: dict[str, Member], wnids: list[str]) -> FileSource:
    left_out: Counter[str] = Counter()
    members: list[str] = []
    names: list[str] = []
    where: list[tuple[int, int, int]] = []
    labels: list[int] = []
    for label, wnid in enumerate(wnids):
        here: Counter[str] = Counter()
        images = only_images(tar, index(tar, inner[wnid]), here)
        if not images:
            found = f" ({kinds(here)})" if kinds(here) else ""
            raise InputError(f"{tar}: {inner[wnid].name}: a class without images{found}: get it anew")
        for name in sorted(images, key=os.fsencode):
            members.append(f"{inner[wnid].name}: {name}")
            names.append(f"train/{wnid}/{name}")
            where.append((0, images[name].start, images[name].size))
        labels += [label] * len(images)
        left_out.update(here)
    storage = Members([str(tar)], np.array(where, np.int64), members)
    return FileSource(storage, names, np.array(labels, np.int64), list(map(utf8_name, wnids)), left_out)


def _validation(root: Path, place: Path) -> Images | None:
    if images := _class_folders(place, "val"):
        return images
    folder, tar = place / "val", place / VAL_TAR
    packed = tar if tar.is_file() else None
    if not folder.is_dir() and packed is None:
        return None
    # Kaggle's table lies at the top of what it ships, three folders above val/'s.
    above = place.resolve().parents[:3] if place.resolve().name == "CLS-LOC" else []
    labels = validation_labels([place, root, *above])
    if labels is None:
        raise InputError(
            f"{folder if folder.is_dir() else tar}: nothing says the classes of these images: put {WANTED} beside it"
        )
    found = folder if folder.is_dir() and any(folder.iterdir()) else packed or folder
    wnids = sorted(set(labels.wnids.values()))
    load = _from_val_tar if found == packed else _from_flat_val
    return Images(f"{found} and {labels.source}", wnids, lambda: load(found, labels, wnids))


def _from_flat_val(folder: Path, labels: ValidationLabels, wnids: list[str]) -> FileSource:
    left_out: Counter[str] = Counter()
    images = {path[len(str(folder)) + 1 :]: path for path in images_below(folder, {}, left_out)}
    chosen, classes = _in_order(folder, set(images), labels, wnids, left_out)
    names = [f"val/{labels.wnids[name]}/{name}" for name in chosen]
    return each_file_once([images[name] for name in chosen], names, classes, wnids, left_out)


def _from_val_tar(tar: Path, labels: ValidationLabels, wnids: list[str]) -> FileSource:
    left_out: Counter[str] = Counter()
    # The organisers' has them flat; some pack the folder.
    images = {PurePosixPath(name).name: each for name, each in only_images(tar, index(tar), left_out).items()}
    chosen, classes = _in_order(tar, set(images), labels, wnids, left_out)
    names = [f"val/{labels.wnids[name]}/{name}" for name in chosen]
    where = [(0, images[name].start, images[name].size) for name in chosen]
    storage = Members([str(tar)], np.array(where, np.int64), [images[name].name for name in chosen])
    return FileSource(storage, names, np.array(classes, np.int64), wnids, left_out)


def _in_order(
    found: Path, names: set[str], labels: ValidationLabels, wnids: list[str], left_out: Counter[str]
) -> tuple[list[str], list[int]]:
    """The images of `labels`, in the order of class folders, and the class of each. Counts others in `left_out`.

    Raises:
        InputError: one of them is not among the `names` that were found.
    """
    missing = sorted(labels.wnids.keys() - names)
    if missing:
        raise InputError(
            f"{found}: {len(missing):,} of the {len(labels.wnids):,} images that {labels.source} lists are not there, "
            f"e.g. {missing[0]}: get them anew"
        )
    if others := len(names - labels.wnids.keys()):
        left_out["images without a label"] += others
    number = {wnid: label for label, wnid in enumerate(wnids)}
    chosen = sorted(labels.wnids, key=lambda name: (number[labels.wnids[name]], os.fsencode(name)))
    return chosen, [number[labels.wnids[name]] for name in chosen]

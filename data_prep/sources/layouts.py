"""How datasets of image files lie in their folders: imagefolder, images without labels, and Tiny-ImageNet.

Each function takes the root folder and whether the training images are wanted, or the test images, and raises
`InputError` where the layout is another one.
"""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

from data_prep.errors import InputError
from data_prep.sources.encoded import FileSource
from data_prep.sources.files import class_folders, each_file_once, images_below, names_below, subfolders
from data_prep.sources.pictures import kinds, utf8_name


def imagefolder(root: Path, train: bool) -> FileSource:
    """All images of `root`/<class>/**, for training and for testing alike."""
    left_out: Counter[str] = Counter()
    classes = subfolders(root, left_out)
    if not classes:
        raise InputError(f"--root {root}: no class folders there; the layout is {root}/<class>/**/*.jpg")
    splits = {"train", "val", "valid", "validation", "test"}
    if set(classes) <= splits:
        raise InputError(
            f"--root {root}: its folders are splits, not classes ({', '.join(classes)}): "
            f"name one of them, e.g. --root {root / classes[0]}"
        )
    return class_folders(root, {name: root / name for name in classes}, left_out)


def images(root: Path, train: bool) -> FileSource:
    """All images below `root`, without labels, for training and for testing alike."""
    left_out: Counter[str] = Counter()
    paths = images_below(root, {}, left_out)
    if not paths:
        raise InputError(f"--root {root}: no images there (left out: {kinds(left_out) or 'nothing'}): add some")
    return each_file_once(paths, names_below(root, paths), [0] * len(paths), [], left_out)


def tiny_imagenet(root: Path, train: bool) -> FileSource:
    """`root`/train/<wnid>/images/**, or the validation images; classes have their names of words.txt, where it is."""
    # Sorted as torchvision's ImageFolder numbers them, since published weights do; wnids.txt is not sorted.
    wnids = sorted((line for line in _lines(root / "wnids.txt") if line), key=os.fsencode)
    if not wnids:
        raise InputError(f"{root / 'wnids.txt'}: names no class: get it anew")
    words = {}
    if (root / "words.txt").is_file():
        words = dict(line.split("\t", 1) for line in _lines(root / "words.txt") if "\t" in line)
    classes = [utf8_name(words.get(wnid, wnid)) for wnid in wnids]
    if train:
        source = class_folders(root, {wnid: root / "train" / wnid / "images" for wnid in wnids}, Counter())
        return replace(source, classes=classes)
    paths, labels = _tiny_imagenet_validation(root, wnids)
    return each_file_once(paths, names_below(root, paths), labels, classes, Counter())


def _tiny_imagenet_validation(root: Path, wnids: list[str]) -> tuple[list[str], list[int]]:
    """Paths of Tiny-ImageNet's validation images, which lie in one folder, and their labels, positions in `wnids`."""
    number = {wnid: label for label, wnid in enumerate(wnids)}
    annotations = root / "val" / "val_annotations.txt"
    paths, labels = [], []
    for line in _lines(annotations):
        if not line:
            continue
        name, wnid = [*line.split("\t"), ""][:2]
        if wnid not in number:
            raise InputError(f"{annotations}: no class of wnids.txt in the line {line!r}: get it anew")
        paths.append(str(root / "val" / "images" / name))
        labels.append(number[wnid])
    if len(set(labels)) < len(wnids):
        empty = next(wnid for wnid in wnids if number[wnid] not in set(labels))
        raise InputError(f"{annotations}: no image of class {empty}: get it anew")
    return paths, labels


def _lines(path: Path) -> list[str]:
    """Lines of a UTF-8 file, as names of files whatever the locale."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InputError(f"{path}: {reason}: it is part of Tiny-ImageNet's official layout") from error
    return [os.fsdecode(line.strip().encode()) for line in text.splitlines()]

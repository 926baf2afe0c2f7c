"""Makes the class indices of images, models and stores that are used together mean the same classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckd_dist.core.console import say
from ckd_dist.core.errors import UserError, require
from ckd_dist.data.dataset import DatasetInfo
from ckd_dist.data.options import MapClasses


def match(
    info: DatasetInfo, option: str, classes: Sequence[str], num_classes: int, reference: str, how: MapClasses | None
) -> DatasetInfo:
    """The images of `info`, given as `option`, with the class indices of `reference`: a model, a store or other images,
    of `num_classes` classes whose names are `classes`, empty where it is of an older version.

    Images without labels take the classes. With `how` by_name, data.map_classes, labels are mapped to the class of the
    same name. Raises `UserError` where names or their order differ and `how` does not say what to do.
    """
    own, expected = list(info.classes), list(classes)
    if not info.labelled:
        return replace(info, classes=tuple(expected), num_classes=num_classes)
    if not own or not expected:
        unnamed = reference if own else info.path
        require(how != "by_name", f"data.map_classes by_name: {unnamed} is of an older version and names no classes")
    elif how == "by_name":
        return _mapped(info, option, expected, reference)
    require(
        info.num_classes == num_classes,
        f"{option}: {info.path} has {info.num_classes} classes, {reference} has {num_classes}{_advice(own, expected)}",
    )
    if not own or not expected or how == "by_position":
        return info
    pairs = enumerate(zip(own, expected, strict=True))
    different = next(((place, *names) for place, names in pairs if _key(names[0]) != _key(names[1])), None)
    if different is None:
        return info
    place, mine, other = different
    raise UserError(
        f"{option}: class {place} of {info.path} is {mine}, of {reference} it is {other}{_advice(own, expected)}; if "
        "they are the same, under other names only, give --data.map_classes by_position"
    )


def match_model(
    info: DatasetInfo, option: str, metadata: Mapping[str, Any], reference: str, how: MapClasses | None
) -> DatasetInfo:
    """`match` with the classes in the `metadata` of a checkpoint, which the user gave as `reference`."""
    return match(info, option, metadata.get("classes", []), metadata["num_classes"], reference, how)


def require_labels(
    info: DatasetInfo, option: str, why: str = "what a model makes of them is compared with these"
) -> None:
    """Raise `UserError` where the images of `info`, given as `option`, have no labels, and say what needs them."""
    require(
        info.labelled,
        f"{option}: the images of {info.path} have no labels, and {why}: write a file of images that have, such as "
        "data_prep.write_beton --dataset imagefolder makes",
    )


def _advice(own: list[str], expected: list[str]) -> str:
    """End of the message for classes that differ: which option helps, or which class has no counterpart."""
    if not own or not expected:
        return ""
    known, named = {_key(name) for name in expected}, {_key(name) for name in own}
    for missing, which in (
        ([name for name in own if _key(name) not in known], "it alone has"),
        ([name for name in expected if _key(name) not in named], "it lacks"),
    ):
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            only = f" ({which} {missing[0]}{more})"
            return only if which == "it alone has" else f"{only}: give --data.map_classes by_name"
    return ": to map them by their names, give --data.map_classes by_name"


def _key(name: str) -> str | int:
    """Names that are whole numbers are the same when the numbers are, as 007 and 7."""
    return int(name) if name.isascii() and name.isdigit() else name


def _mapped(info: DatasetInfo, option: str, expected: list[str], reference: str) -> DatasetInfo:
    place = {_key(name): number for number, name in enumerate(expected)}
    unknown = [name for name in info.classes if _key(name) not in place]
    require(
        not unknown,
        f"{option}: {len(unknown)} classes of {info.path}, first {unknown[:1]}, are none of {reference}: "
        "write it without",
    )
    label_map = tuple(place[_key(name)] for name in info.classes)
    require(
        len(place) == len(expected) and len(set(label_map)) == len(label_map),
        f"data.map_classes: two classes of {reference} or of {info.path} have the same name",
    )
    if label_map == tuple(range(len(expected))):
        return info
    lacking = len(expected) - len(label_map)
    note = f"; {lacking} of its {len(expected)} classes have no images" if lacking else ""
    say(f"{option}: labels of {info.path} are mapped by name to those of {reference}{note}")
    before = range(info.num_classes) if info.label_map is None else info.label_map
    label_map = tuple(label_map[label] for label in before)
    return replace(info, classes=tuple(expected), num_classes=len(expected), label_map=label_map)

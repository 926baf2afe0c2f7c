"""A class has the same name and the same number in all that is trained, cached or evaluated together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckd_dist.core.console import say
from ckd_dist.core.errors import UserError, require
from ckd_dist.data.dataset import DatasetInfo
from ckd_dist.data.options import MapClasses


def match(
    info: DatasetInfo, option: str, classes: Sequence[str], num_classes: int, whose: str, how: MapClasses | None
) -> DatasetInfo:
    """The images of `info`, given as `option`, for what has `num_classes` classes, and calls them `classes` if it is
    not of an older version: with labels mapped to the class of the same name, if `how` asks for that.

    Raises `UserError` where a class has another name in the same place, or none, and `how` does not settle it.
    """
    ours, theirs = list(info.classes), list(classes)
    if not ours or not theirs:
        unnamed = whose if ours else info.path
        require(how != "by_name", f"data.map_classes by_name: {unnamed} is of an older version and names no classes")
    elif how == "by_name":
        return _mapped(info, option, theirs, whose)
    require(
        info.num_classes == num_classes,
        f"{option}: {info.path} has {info.num_classes} classes, {whose} has {num_classes}{_advice(ours, theirs)}",
    )
    if not ours or not theirs or how == "by_position":
        return info
    pairs = enumerate(zip(ours, theirs, strict=True))
    different = next(((place, *names) for place, names in pairs if _key(names[0]) != _key(names[1])), None)
    if different is None:
        return info
    place, mine, other = different
    raise UserError(
        f"{option}: class {place} of {info.path} is {mine}, of {whose} it is {other}{_advice(ours, theirs)}; if they "
        "are the same, under other names only, give --data.map_classes by_position"
    )


def match_model(
    info: DatasetInfo, option: str, metadata: Mapping[str, Any], whose: str, how: MapClasses | None
) -> DatasetInfo:
    """`match`, for a model by the metadata of its checkpoint, which the user gave as `whose`."""
    return match(info, option, metadata.get("classes", []), metadata["num_classes"], whose, how)


def _advice(ours: list[str], theirs: list[str]) -> str:
    """What may be done about classes that differ."""
    if not ours or not theirs:
        return ""
    known, named = {_key(name) for name in theirs}, {_key(name) for name in ours}
    for missing, which in (
        ([name for name in ours if _key(name) not in known], "it alone has"),
        ([name for name in theirs if _key(name) not in named], "it lacks"),
    ):
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            only = f" ({which} {missing[0]}{more})"
            return only if which == "it alone has" else f"{only}: give --data.map_classes by_name"
    return ": to map them by their names, give --data.map_classes by_name"


def _key(name: str) -> str | int:
    """Names that are whole numbers are the same when the numbers are, as 007 and 7."""
    return int(name) if name.isascii() and name.isdigit() else name


def _mapped(info: DatasetInfo, option: str, theirs: list[str], whose: str) -> DatasetInfo:
    place = {_key(name): number for number, name in enumerate(theirs)}
    unknown = [name for name in info.classes if _key(name) not in place]
    require(
        not unknown,
        f"{option}: {len(unknown)} classes of {info.path}, first {unknown[:1]}, are none of {whose}: write it without",
    )
    label_map = tuple(place[_key(name)] for name in info.classes)
    require(
        len(place) == len(theirs) and len(set(label_map)) == len(label_map),
        f"data.map_classes: two classes of {whose} or of {info.path} have the same name",
    )
    if label_map == tuple(range(len(theirs))):
        return info
    lacking = len(theirs) - len(label_map)
    note = f"; {lacking} of its {len(theirs)} classes have no images" if lacking else ""
    say(f"{option}: labels of {info.path} are mapped by name to those of {whose}{note}")
    before = range(info.num_classes) if info.label_map is None else info.label_map
    label_map = tuple(label_map[label] for label in before)
    return replace(info, classes=tuple(theirs), num_classes=len(theirs), label_map=label_map)

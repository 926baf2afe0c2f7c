"""A .beton file's description, and the view recipes for training and evaluation on it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ckd_dist.core.errors import require
from ckd_dist.core.files import read_json
from ckd_dist.core.identity import Input
from ckd_dist.data.options import ViewDataConfig
from ckd_dist.data.recipe import ViewRecipe

# ------------------------------------------------------------------------------------------- description


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The description of a .beton file, from the JSON file beside it."""

    path: Path
    dataset: str
    split: str
    count: int
    num_classes: int
    content_hash: str
    """sha256 of labels, sizes and stored image bytes in sample order."""
    mean: tuple[float, float, float]
    """Of pixels in [0, 1], for normalisation."""
    std: tuple[float, float, float]
    min_size: tuple[int, int]
    """Smallest (height, width) stored, in pixels."""
    max_size: tuple[int, int]
    labelled: bool = True
    """Whether the images have labels; without them num_classes is 1, until they take the classes of their teacher."""
    classes: tuple[str, ...] = ()
    """Name of each class; none in a file of an older version."""
    label_map: tuple[int, ...] | None = None
    """Stored label -> class, where data.map_classes by_name is given: see `classes.match`."""
    source_hash: str | None = None
    """Of the image set that the file is a part of; None in a file of an older version."""
    holdout: tuple[float, int] | None = None
    """Which part of the training images was held out: fraction and seed; None of test images."""

    def as_input(self) -> Input:
        """These images as an input that the identity of a result depends on."""
        holds: dict[str, Any] = {key: getattr(self, key) for key in ("content_hash", "count", "num_classes")}
        holds.update(mean=list(self.mean), std=list(self.std))
        if self.label_map is not None:
            holds["label_map"] = list(self.label_map)
        return Input.of("images", self.path, holds)

    @property
    def small(self) -> bool:
        """Whether the images are of one size, up to 64 px, as CIFAR's are."""
        return self.min_size == self.max_size and max(self.max_size) <= 64

    def image_size(self, requested: int | None) -> int:
        """Side of a model's input images in pixels: `requested`, else the stored size of small images, else 224."""
        return requested or (max(self.max_size) if self.small else 224)


_Count = Annotated[int, Field(ge=1, lt=2**31)]
_Mean = Annotated[float, Field(ge=0, le=1)]
_Deviation = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class _Sizes:
    min: tuple[_Count, _Count]
    max: tuple[_Count, _Count]


@dataclass(frozen=True)
class _Normalization:
    mean: tuple[_Mean, _Mean, _Mean]
    std: tuple[_Deviation, _Deviation, _Deviation]


@dataclass(frozen=True)
class _Source:
    hash: str


@dataclass(frozen=True)
class _Recipe:
    holdout: float | None = None
    holdout_seed: int | None = None


@dataclass(frozen=True)
class _Description:
    """The fields of the JSON that are used here."""

    format: Literal[1]
    dataset: str
    split: str
    count: _Count
    num_classes: _Count
    content_hash: str
    beton_bytes: int
    image_size: _Sizes
    normalization: _Normalization
    labels: bool = True
    classes: list[str] = field(default_factory=list)
    source: _Source | None = None
    recipe: _Recipe = field(default_factory=_Recipe)


def read_info(path: str | Path, option: str) -> DatasetInfo:
    """Read the description beside the .beton file `path`, which the user gave as `option`.

    Raises `UserError` where either file is missing or damaged, or they do not belong together.
    """
    path = Path(path)
    description = Path(f"{path}.json")
    require(path.is_file(), f"{option}: no such file: {path} (write it with python -m data_prep.write_beton)")
    require(description.is_file(), f"{option}: {description} is missing: write {path} anew with data_prep.write_beton")
    values = read_json(description, _Description, option, f"write {path} anew")
    stored = path.stat().st_size
    require(
        stored == values.beton_bytes,
        f"{option}: {path} has {stored} bytes, {description} says {values.beton_bytes}: write it anew",
    )
    require(
        len(values.classes) in (0, values.num_classes),
        f"{option}: {description} names {len(values.classes)} classes of {values.num_classes}: write {path} anew",
    )
    part = values.recipe
    return DatasetInfo(
        path=path,
        dataset=values.dataset,
        split=values.split,
        count=values.count,
        num_classes=values.num_classes,
        content_hash=values.content_hash,
        mean=values.normalization.mean,
        std=values.normalization.std,
        min_size=values.image_size.min,
        max_size=values.image_size.max,
        labelled=values.labels,
        classes=tuple(values.classes),
        source_hash=values.source.hash if values.source else None,
        holdout=None if part.holdout is None else (part.holdout, part.holdout_seed or 0),
    )


def train_recipe(
    config: ViewDataConfig, info: DatasetInfo, cached: ViewRecipe | None = None, crop_share: float | None = None
) -> ViewRecipe:
    """The recipe of the training views: from the options, else the `cached` recipe, else a default for the images.
    `crop_share`: of center_crop, as in `eval_recipe`.

    Raises `UserError` where an option contradicts `cached` or the images.
    """
    kind = config.augment or (cached.kind if cached else "pad_crop" if info.small else "random_resized_crop")
    require(
        kind != "pad_crop" or info.min_size == info.max_size,
        "data.augment pad_crop needs images of one size: use random_resized_crop",
    )
    options = {
        "kind": kind,
        "scale": config.crop_scale_min and (config.crop_scale_min, 1.0),
        "flip": None if config.flip is None else 0.5 * config.flip,
        **{name: getattr(config, name) for name in _SAME_IN_BOTH},
    }
    selected = {name: value for name, value in options.items() if value is not None}
    if cached is not None:
        for name, value in selected.items():
            option = {"kind": "augment", "scale": "crop_scale_min"}.get(name, name)
            held = getattr(cached, name)
            message = f"data.{option}: the store holds views with {name} {held}, not {value}: leave it out"
            require(value == held, message)
    default = cached or (eval_recipe(info, kind, crop_share) if kind == "center_crop" else ViewRecipe(kind=kind))
    recipe = replace(default, **selected)
    for name in ("operations", "magnitude"):
        used = name not in selected or recipe.policy == "rand_augment"
        require(used, f"data.{name} is for data.policy rand_augment, and this is {recipe.policy}: leave it out")
    used = config.mix is None or recipe.mixes
    require(used, "data.mix is the share of images that data.mixup or data.cutmix mix: give one too, or leave it out")
    return recipe


def view_options(recipe: ViewRecipe) -> dict[str, Any]:
    """The value of every option of `ViewDataConfig` that selects the views of `recipe`: inverse of `train_recipe`. None
    where the recipe's dict leaves a field out, so that a run of an older version goes on with the options it had."""
    held = recipe.to_dict()
    return {
        "augment": recipe.kind,
        "crop_scale_min": recipe.scale[0],
        "flip": recipe.flip > 0,
        **{name: held.get(name) for name in _SAME_IN_BOTH},
    }


_OPTIONS = {each.name for each in fields(ViewDataConfig)} - {"flip"}  # true or false there, a probability here
_SAME_IN_BOTH = tuple(each.name for each in fields(ViewRecipe) if each.name in _OPTIONS)
"""Options of `ViewDataConfig` that a `ViewRecipe` has under the same name."""


def eval_recipe(info: DatasetInfo, augment: str | None, crop_share: float | None = None) -> ViewRecipe:
    """The recipe of evaluation. Of small images the whole, resized to a square as pad_crop does in training, or, where
    `augment`, the kind of the training views, is another, the central square; of photographs the central square of
    `crop_share`, by default 224/256, of the shorter side."""
    if info.small and augment in (None, "pad_crop"):
        return ViewRecipe(kind="pad_crop", padding=0, flip=0.0)
    return ViewRecipe(kind="center_crop", center_share=1.0 if info.small else crop_share or 224 / 256, flip=0.0)

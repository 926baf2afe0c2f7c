"""A recipe of views and the options that ask for it."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from ckd_dist.core.errors import UserError
from ckd_dist.data import dataset
from ckd_dist.data.options import LoaderConfig, ViewDataConfig
from ckd_dist.data.recipe import ViewRecipe


def test_the_options_of_a_recipe_ask_for_it_and_name_all_that_training_can_vary(fashion):
    info = dataset.read_info(fashion["train"], "data.train")
    varied = {"scale": (0.3, 1.0), "flip": 0.0, "color_jitter": 0.1, "erase": 0.2, "mixup": 0.3, "cutmix": 0.4}
    varied |= {"policy": "rand_augment", "operations": 3, "magnitude": 5, "grayscale": 0.5, "blur": 0.6, "mix": 0.7}
    varied |= {"solarize": 0.8}
    recipe = ViewRecipe(kind="random_resized_crop", **varied)
    options = dataset.view_options(recipe)
    assert dataset.train_recipe(ViewDataConfig(train="", **options), info) == recipe
    views, elsewhere = ({field.name for field in fields(cls)} for cls in (ViewDataConfig, LoaderConfig))
    assert options.keys() == views - elsewhere - {"train"}
    assert {field.name for field in fields(ViewRecipe)} == {"kind", *varied, "ratio", "padding", "center_share"}


def test_views_may_be_what_is_evaluated(fashion):
    info = dataset.read_info(fashion["train"], "data.train")
    recipe = dataset.train_recipe(ViewDataConfig(train="", augment="center_crop"), info)
    assert recipe == ViewRecipe(kind="center_crop", center_share=1.0, flip=0.0)
    assert dataset.train_recipe(ViewDataConfig(train="", **dataset.view_options(recipe)), info) == recipe
    assert dataset.train_recipe(ViewDataConfig(train=""), info, recipe) == recipe
    photographs = replace(info, max_size=500)
    assert dataset.train_recipe(ViewDataConfig(train="", augment="center_crop"), photographs).center_share == 224 / 256


OLD = {
    "kind": "random_resized_crop",
    "scale": [0.08, 1.0],
    "ratio": [3 / 4, 4 / 3],
    "padding": 4,
    "center_share": 1.0,
    "flip": 0.5,
    "color_jitter": 0.0,
    "erase": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
}
"""A recipe in a manifest of a version that knew no policies."""


def test_a_recipe_of_an_older_version_has_the_text_that_it_had():
    recipe = ViewRecipe(kind="random_resized_crop")
    assert recipe.to_dict() == OLD and list(recipe.to_dict()) == list(OLD)
    assert ViewRecipe.from_dict(OLD) == recipe


@pytest.mark.parametrize(
    "newer",
    [
        {"policy": "trivial_augment"},
        {"policy": "rand_augment", "operations": 3, "magnitude": 0},
        {"grayscale": 0.2, "blur": 0.5},
        {"solarize": 0.2},
        {"mix": 0.8, "mixup": 0.2},
    ],
)
def test_what_is_newer_stands_in_a_manifest_where_it_is_drawn(newer):
    recipe = ViewRecipe(kind="random_resized_crop", **newer)
    assert recipe.to_dict() == {**OLD, **newer}
    assert ViewRecipe.from_dict(recipe.to_dict()) == recipe


def test_options_have_the_views_of_a_store_and_refuse_others(fashion):
    info = dataset.read_info(fashion["train"], "data.train")
    cached = ViewRecipe(kind="pad_crop", policy="rand_augment", magnitude=12, mixup=0.2, mix=0.5)
    for own in ({}, {"policy": "rand_augment"}, {"magnitude": 12, "operations": 2, "mix": 0.5}, {"blur": 0.0}):
        assert dataset.train_recipe(ViewDataConfig(train="", **own), info, cached) == cached
    for name, value, held in (
        ("policy", "trivial_augment", "rand_augment"),
        ("operations", 3, 2),
        ("magnitude", 9, 12),
        ("mix", 1.0, 0.5),
        ("blur", 0.1, 0.0),
    ):
        with pytest.raises(UserError, match=rf"^data\.{name}: the store holds views with {name} {held}, not {value}"):
            dataset.train_recipe(ViewDataConfig(train="", **{name: value}), info, cached)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operations": 2}, r"data\.operations is for data\.policy rand_augment, and this is None: leave it out"),
        ({"magnitude": 9, "policy": "trivial_augment"}, r"data\.magnitude is for .* and this is trivial_augment"),
        ({"mix": 0.5}, r"data\.mix is the share of images that data\.mixup or data\.cutmix mix"),
    ],
)
def test_options_that_have_no_part_in_the_views_are_refused(fashion, options, message):
    info = dataset.read_info(fashion["train"], "data.train")
    with pytest.raises(UserError, match=message):
        dataset.train_recipe(ViewDataConfig(train="", **options), info)


@pytest.mark.parametrize(
    ("name", "value", "given"),
    [
        ("operations", 0, "1 to 16"),
        ("operations", 17, "1 to 16"),
        ("magnitude", -1, "0 to 30"),
        ("magnitude", 31, "0 to 30"),
        ("grayscale", 1.1, "0 to 1"),
        ("blur", -0.1, "0 to 1"),
        ("solarize", 2, "0 to 1"),
        ("mix", 0, "1e-06 to 1"),
        ("mix", 1.5, "1e-06 to 1"),
    ],
)
def test_values_out_of_range_are_refused(name, value, given):
    with pytest.raises(UserError, match=rf"^data\.{name} is {value}: give {given}$"):
        ViewDataConfig(train="", **{name: value})
    if name in ("operations", "magnitude"):  # where no option was read, compiled code would read beyond a table
        with pytest.raises(UserError, match=rf"^recipe: {name} is {value}: give {given}$"):
            ViewRecipe(kind="pad_crop", policy="rand_augment", **{name: value})

"""A recipe of views and the options that ask for it."""

from __future__ import annotations

from dataclasses import fields, replace

from ckd_dist.data import dataset
from ckd_dist.data.options import LoaderConfig, ViewDataConfig
from ckd_dist.data.recipe import ViewRecipe


def test_the_options_of_a_recipe_ask_for_it_and_name_all_that_training_can_vary(fashion):
    info = dataset.read_info(fashion["train"], "data.train")
    varied = {"scale": (0.3, 1.0), "flip": 0.0, "color_jitter": 0.1, "erase": 0.2, "mixup": 0.3, "cutmix": 0.4}
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

"""Any models fill a store, and it is the one of cache_logits where they and the images are the same."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torchvision.transforms import v2

import ckd_dist
from ckd_dist.core.errors import UserError
from ckd_dist.data import dataset
from ckd_dist.nn.models import load_model
from tests.helpers.commands import run
from tests.helpers.here import cache_here, run_here, store_here
from tests.helpers.stores import cache_options, contents
from tests.helpers.views import PAD


class Network(nn.Module):
    """Somebody's own, with dropout, which must not reach the store."""

    def __init__(self, classes=10):
        super().__init__()
        self.layers = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(147, classes))

    def forward(self, x):
        return self.layers(x)


@pytest.fixture
def views(fashion):
    return ckd_dist.Views(ckd_dist.BetonImages(fashion["holdout"]), PAD, seed=0, size=28)


def fill(models, views, store, **more):
    options = {"mean": [0.3] * 3, "std": [0.3] * 3, "amp": "off", "shard_size": 100, "batch_size": 50, **more}
    return ckd_dist.cache(models, views, store, **options)


def test_a_store_of_the_same_models_and_images_is_that_of_cache_logits(fashion, teacher, tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    cache_here(*cache_options(fashion, teacher, theirs, "--amp", "off", "--data.mixup", 1, "--views", 1))
    info = dataset.read_info(fashion["train"], "")
    found = {}
    for epoch in (1, 2, 3):
        found[epoch], _ = load_model(teacher / "checkpoints" / f"epoch_{epoch:04d}.pt", "")
    recipe = ckd_dist.open_store(theirs).recipe
    views = ckd_dist.Views(ckd_dist.BetonImages(fashion["train"]), recipe, seed=0, size=28)
    store = fill(found, views, ours, mean=info.mean, std=info.std, shard_size=250, batch_size=64, workers=1)
    a, b = contents(theirs), contents(ours)
    assert {name for name in {**a, **b} if a.get(name) != b.get(name)} == {"manifest.json"}  # names of the networks
    store.require_views(views)
    assert store_here("verify", ours) == 0


def test_what_is_missing_is_written_and_models_stay_as_they_were(views, tmp_path):
    torch.manual_seed(0)
    models = {1: Network(), "other/2": Network()}
    store = fill(models, views, tmp_path / "store", num_views=2)
    assert models[1].training and all(p.requires_grad for p in models[1].parameters())
    expected = copy.deepcopy(models[1]).eval()(
        ((torch.stack([views[1, i]["image"] for i in range(301)]).float() / 255) - 0.3) / 0.3
    )
    # Records are float16, of 11 bits.
    torch.testing.assert_close(store.logits(range(301), 1)[:, 0], expected, rtol=1e-3, atol=1e-3)
    before = contents(tmp_path / "store")
    for path in (tmp_path / "store" / "epoch_0001" / "view_0001").glob("*"):
        path.unlink()
    fill(models, views, tmp_path / "store", num_views=2)
    assert contents(tmp_path / "store") == before
    fill({3: Network()}, views, tmp_path / "store", num_views=1)
    grown = contents(tmp_path / "store")
    assert len(grown) == len(before) + 8
    assert all(grown[name] == before[name] for name in before if name != "manifest.json")


def test_a_codec_is_fitted_to_any_models(views, tmp_path):
    torch.manual_seed(0)
    models = {1: Network(), 2: Network()}
    dense = fill(models, views, tmp_path / "dense")
    codec = ckd_dist.CodecConfig(codec="transform", bytes=8)
    store = fill(models, views, tmp_path / "store", codec=codec)
    exact = dense.logits(range(301), 0)
    exact = exact - exact.mean(dim=2, keepdim=True)  # what a softmax sees
    assert (store.logits(range(301), 0) - exact).norm() < 0.1 * exact.norm()
    found = pickle.loads(pickle.dumps(store))
    labels, student = torch.zeros(301, dtype=torch.int64), torch.randn(301, 10)
    losses = [each.loss(student, range(301), 0, labels, temperature=4) for each in (found, dense)]
    torch.testing.assert_close(*losses, rtol=0.1, atol=0.02)


def test_sparse_codecs_and_stores_of_any_images(tmp_path):
    images = [(torch.randint(256, (3, 30, 40), dtype=torch.uint8), i % 10) for i in range(40)]
    views = ckd_dist.Views(images, ckd_dist.ViewRecipe(kind="random_resized_crop"), seed=3, size=28)
    codec = ckd_dist.CodecConfig(codec="topk", k=3)
    store = fill({5: Network()}, views, tmp_path / "store", codec=codec)
    store.require_views(views)
    assert store.logits([0, 39], 0).shape == (2, 1, 10) and store.reader.codec.k == 3
    others = ckd_dist.Views(images[::-1], views.recipe, seed=3, size=28)
    with pytest.raises(UserError, match="another one than the store's"):
        store.require_views(others)
    with pytest.raises(UserError, match=r"dataset\.content_hash"):
        fill({6: Network()}, others, tmp_path / "store", codec=codec)


def test_a_named_transform_belongs_to_the_store(fashion, tmp_path):
    images = ckd_dist.BetonImages(fashion["holdout"])

    def views(**more):
        return ckd_dist.Views(images, PAD, seed=0, size=28, **more)

    augment = {"transform": v2.RandAugment(1, 5), "transform_name": "randaugment 1 5"}
    store = fill({1: Network()}, views(**augment), tmp_path / "store")
    assert ckd_dist.open_store(tmp_path / "store").transform == "randaugment 1 5"
    store.require_views(views(**augment))
    with pytest.raises(UserError, match="with transform randaugment 1 5, these are with None"):
        store.require_views(views())
    with pytest.raises(UserError, match=r"forward\.transform randaugment 1 5, this command has None"):
        fill({1: Network()}, views(), tmp_path / "store")
    with pytest.raises(UserError, match="randaugment 1 5, which this command does not know"):
        ckd_dist.Loader(fashion["holdout"], store, batch_size=10)
    student = ("--data.train", fashion["holdout"], "--model.name", "resnet8", "--run_dir", tmp_path / "run")
    with pytest.raises(UserError, match=r"teacher\.store: the teacher of .* saw views with the transform"):
        run_here("distill", *student, "--teacher.store", tmp_path / "store")


def test_models_that_do_not_fit_are_refused_and_nothing_is_written(views, tmp_path):
    store = tmp_path / "store"
    for models, options, message in (
        ({}, {}, "models: none is given"),
        ({"../1": Network()}, {}, r"models: \.\./1 is no name of a checkpoint"),
        ({1: Network(7)}, {}, "logits of 7 classes, .* has 10"),
        ({1: Network(), 2: Network(7)}, {}, r"logits of \[7, 10\] classes"),
        ({1: nn.Identity()}, {}, r"gives \[1, 3, 28, 28\] for one image"),
        ({1: Network()}, {"std": [0, 1, 1]}, "those of std above 0"),
        ({1: Network()}, {"num_views": 0}, "give 1 at least"),
        ({1: Network()}, {"codec": ckd_dist.CodecConfig(codec="topk", k=11)}, "k is 11, the images have 10 classes"),
    ):
        with pytest.raises(UserError, match=message):
            fill(models, views, store, **options)
    assert not store.exists()


RANKS = """
import sys
sys.modules["ffcv"] = None
import torch, ckd_dist
from ckd_dist.core import dist
with dist.process_group():
    views = ckd_dist.Views(
        ckd_dist.BetonImages(sys.argv[1]), ckd_dist.ViewRecipe(kind="pad_crop"), seed=0, size=28
    )
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2352, 10))
    half = [0.5] * 3
    ckd_dist.cache({1: model}, views, sys.argv[2], mean=half, std=half, amp="off", shard_size=50, batch_size=50)
"""


def test_ranks_share_the_work_without_ffcv(fashion, tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    for name, nproc in (("one", 0), ("two", 2)):
        run(str(tmp_path / "ranks.py"), fashion["holdout"], tmp_path / name, nproc=nproc)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")

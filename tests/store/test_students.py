"""Students that learn from stores of every codec: as near to one another as the codecs are."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from ckd_dist import distill
from ckd_dist.core.errors import UserError
from ckd_dist.core.options import load_config
from ckd_dist.data import dataset
from ckd_dist.data.options import LoaderConfig
from ckd_dist.search import trials
from ckd_dist.search.options import SearchConfig
from ckd_dist.store import verify
from ckd_dist.store.manifest import Manifest
from ckd_dist.train.options import DistillConfig
from tests.helpers.here import cache_here, store_here
from tests.helpers.stores import VIEWS, cache_options


def distill_here(fashion, run_dir, store, *more):
    images = ["--data.train", fashion["train"], "--data.val", fashion["holdout"], "--data.batch_size", 64]
    model = ["--model.name", "resnet8", "--epochs", 2, "--optim.lr", 0.05, "--log_every", 1]
    words = [*images, *model, "--teacher.store", store, "--run_dir", run_dir, *more]
    distill.main(load_config(DistillConfig, [str(word) for word in words]))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "train"]


def test_views_belong_to_a_checkpoint(copy, store, fashion, teacher, tmp_path, capsys):
    cache_here(*cache_options(fashion, teacher, copy, "--teacher.checkpoints", "[3]", "--views", 3))
    assert store_here("verify", copy) == 0 and store_here("info", copy, "--json") == 0
    out = capsys.readouterr().out
    assert "35 of 35 shards are good" in out
    assert [each["views"] for each in json.loads(out[out.index("\n{") :])["checkpoints"]] == [2, 2, 3]
    few = ["--teacher.checkpoints", "[2]", "--epochs", 1]
    extended, before = (distill_here(fashion, tmp_path / of.parent.name, of, *few) for of in (copy, store))
    assert [line["loss"] for line in extended] == [line["loss"] for line in before]
    for names, views, fewest in (
        ("[2]", 3, "2 views of epoch 2"),
        ("[3,1]", 3, "2 views of epoch 1"),
        ("[3]", 4, "3 v"),
    ):
        more = ["--teacher.checkpoints", names, "--data.views", views]
        with pytest.raises(UserError, match=rf"data\.views is {views}, .* holds {fewest}"):
            distill_here(fashion, tmp_path / "none", copy, *more)
    searched = ["--data.train", fashion["train"], "--data.val", fashion["holdout"], "--model.name", "resnet8"]
    searched += ["--teacher.store", copy, "--run_dir", tmp_path / "search", "--grid.teachers"]
    for teachers, views in (("[[3]]", 3), ("[[3],[],[1,3]]", 2)):
        config = load_config(SearchConfig, [str(word) for word in [*searched, teachers]])
        assert {trial.config.data.views for trial in trials.prepare(config).trials} == {views}
    # While views are being added, those that were there go on teaching.
    shutil.rmtree(copy / "epoch_0003" / "view_0002")
    assert distill_here(fashion, tmp_path / "meanwhile", copy, "--data.views", 2, "--epochs", 1)
    with pytest.raises(UserError, match=r"view_0002/.* is missing"):
        distill_here(fashion, tmp_path / "none", copy)
    mend = ["repair", copy, "--teacher.run", teacher, "--data.train", fashion["train"], "--data.batch_size", 64]
    assert store_here(*mend) == 0 and store_here("verify", copy) == 0
    words = ["--data.train", fashion["train"], "--codec", "topk", "--k", 4]
    assert store_here("convert", copy, tmp_path / "topk", *words) == 0
    assert len(list((tmp_path / "topk").rglob("*.npy"))) == 35


@pytest.mark.parametrize("loss", ["kd", "standardized"])
def test_a_student_of_topk_is_that_of_dense_within_the_codecs_error(store, topk, fashion, tmp_path, loss, capsys):
    more = ["--kd.loss", loss, "--kd.temperature", 4]
    dense = distill_here(fashion, tmp_path / "dense", store, *more)
    capsys.readouterr()
    sparse = distill_here(fashion, tmp_path / "topk", topk, *more)
    assert "warning" not in capsys.readouterr().out
    assert dense[0]["ce"] == sparse[0]["ce"]  # the same images
    # The six classes left out count as one, so the divergence is smaller, not larger.
    assert 0.4 * dense[0]["kd"] < sparse[0]["kd"] < 1.02 * dense[0]["kd"]
    assert sparse[-1]["kd"] < 0.8 * sparse[0]["kd"] and sparse[-1]["top1"] > 20


def test_a_temperature_at_which_topk_kept_little_is_said(topk, fashion, tmp_path, capsys):
    distill_here(fashion, tmp_path / "run", topk, "--kd.temperature", 100, "--epochs", 1)
    assert "warning: at kd.temperature 100 the 4 classes kept hold 4" in capsys.readouterr().out


def test_a_student_learns_from_sampled_classes(from_dense, fashion, tmp_path):
    store = from_dense("--codec", "sampled", "--k", 3, "--sample_temperature", 2)
    lines = distill_here(fashion, tmp_path / "run", store, "--kd.temperature", 2)
    assert lines[-1]["kd"] < 0.9 * lines[0]["kd"] and lines[-1]["top1"] > 20


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            ["--kd.loss", "mse"],
            "kd.loss mse needs the logits of all 10 classes, and 4 are kept; a store of codec dense or transform can",
        ),
        (["--kd.loss", "dist"], "a store of codec dense or transform can serve it"),
        (
            ["--kd.loss", "standardized", "--teacher.checkpoints", "[1,3]"],
            "a store of codec dense or transform can serve it",
        ),
    ],
)
def test_a_loss_that_the_store_cannot_serve_is_refused_before_the_first_step(topk, fashion, tmp_path, more, expected):
    with pytest.raises(UserError, match=f"teacher.store: its codec is topk: .*{expected}"):
        distill_here(fashion, tmp_path / "run", topk, *more)
    assert not (tmp_path / "run").exists()


def test_checkpoints_teach_one_after_another(store, fashion, tmp_path, capsys):
    order = ["--teacher.checkpoints", "[3,1]", "--teacher.combine", "sequence"]
    sequence = distill_here(fashion, tmp_path / "sequence", store, *order)
    assert "teachers in sequence: epochs 3, 1" in capsys.readouterr().out
    first = distill_here(fashion, tmp_path / "first", store, "--teacher.checkpoints", "[3]")
    steps = len(first) // 2
    assert [line["loss"] for line in sequence[:steps]] == [line["loss"] for line in first[:steps]]
    assert sequence[steps]["loss"] != first[steps]["loss"] and sequence[steps]["ce"] == first[steps]["ce"]
    more = ["--teacher.checkpoints", "[1,2,3]", "--teacher.combine", "sequence"]
    with pytest.raises(UserError, match=r"3 checkpoints cannot all have a share of 2 epochs"):
        distill_here(fashion, tmp_path / "short", store, *more)


def test_cached_and_online_ensembles_by_probability_and_weight_are_the_same(store, teacher, fashion, tmp_path):
    mix = ["--teacher.checkpoints", "[1,3]", "--teacher.combine", "probabilities", "--teacher.weights", "[3,1]"]
    cached = distill_here(fashion, tmp_path / "cached", store, *mix, "--epochs", 1)
    online = ["--teacher.store", "null", "--teacher.run", teacher, "--data.views", VIEWS]
    online = distill_here(fashion, tmp_path / "online", store, *mix, *online, "--epochs", 1)
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(cached, online, strict=True)) < 2e-3
    plain = distill_here(fashion, tmp_path / "plain", store, *mix[:2], "--epochs", 1)
    assert plain[0]["kd"] != cached[0]["kd"]


def test_images_that_decode_differently_are_noticed_and_said(copy, fashion, teacher, tmp_path, capsys):
    manifest = Manifest.load(copy, "")
    assert len(manifest.images) == 4 and set(manifest.images) == {"0", "400", "800", "1200"}
    manifest.images["400"] = "0" * 64
    manifest.save(copy)
    distill_here(fashion, tmp_path / "run", copy, "--epochs", 1)
    said = "warning: image 400 decodes here to other pixels than when the store was written"
    assert capsys.readouterr().out.count(said) == 1
    cache_here(*cache_options(fashion, teacher, copy))
    assert capsys.readouterr().out.count(said) == 1
    info = dataset.read_info(fashion["train"], "")
    assert verify.recompute(copy, info, str(teacher), manifest.members, LoaderConfig(), torch.device("cpu"), 8) == []
    assert capsys.readouterr().out.count(said) == 1

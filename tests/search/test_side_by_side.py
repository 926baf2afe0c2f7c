"""Students that train side by side are those of separate runs, bit for bit."""

from __future__ import annotations

import json

import pytest

from ckd_dist import cache_logits, distill
from ckd_dist.core.options import load_config
from ckd_dist.search.options import SearchConfig
from ckd_dist.search.trials import prepare, side_by_side
from ckd_dist.store.manifest import Manifest
from ckd_dist.store.options import CacheConfig
from ckd_dist.train.options import DistillConfig
from tests.helpers.here import here
from tests.helpers.search import options, same, search_here, weights
from tests.helpers.stores import VIEWS, cache_options


def test_students_side_by_side_are_those_of_separate_runs_bit_for_bit(fashion, two_runs, tmp_path):
    # No teacher, one checkpoint, an ensemble of two runs; two models; one after another where the group is full.
    grid = ["--grid.teachers", "[[],[2],[3,other/1]]", "--grid.models", "[resnet8,resnet20]", "--kd.temperature", 4]
    once = ["--epochs", 1]
    rows = search_here(*options(fashion, two_runs, tmp_path / "search", *grid, *once, "--students_at_once", 6))
    assert [(row["teacher"], row["model"]) for row in rows] == [
        (teacher, model) for teacher in ("none", "2", "3+other/1") for model in ("resnet8", "resnet20")
    ]
    assert {row["side_by_side"] for row in rows} == {6} and all(row["test_top1"] is None for row in rows)
    known = Manifest.load(two_runs, "").checkpoints
    hashes = [known[name]["weights_sha256"] for name in ("epoch_0002", "epoch_0003", "other/epoch_0001")]
    assert [row["weights_sha256"] for row in rows[::2]] == [None, hashes[0], f"{hashes[1]}+{hashes[2]}"]
    for row in rows:
        student = tmp_path / "search" / "students" / row["student"]
        alone = tmp_path / "alone" / row["student"]
        here(distill, DistillConfig, "--config", student / "config.yaml", "--run_dir", alone)
        assert same(weights(student, 1), weights(alone, 1)), row["student"]
        assert json.loads((alone / "summary.json").read_text())["top1"] == row["val_top1"]
    plain = options(fashion, two_runs, tmp_path / "plain", *once, "--teacher.store", "null", "--data.views", VIEWS)
    distill.main(load_config(DistillConfig, plain))
    assert same(weights(tmp_path / "plain", 1), weights(tmp_path / "search" / "students" / rows[0]["student"], 1))


def test_a_plain_student_sees_what_the_taught_ones_see_whatever_its_group(fashion, teacher, tmp_path):
    views = ["--data.mixup", 0.4, "--data.cutmix", 1, "--data.erase", 0.5, "--data.color_jitter", 0.4, "--views", 1]
    cache = cache_options(fashion, teacher, tmp_path / "store", "--teacher.checkpoints", "[3]", *views)
    here(cache_logits, CacheConfig, *cache)
    grid = ["--grid.teachers", "[[],[3]]", "--epochs", 1]
    search_here(*options(fashion, tmp_path / "store", tmp_path / "alone", *grid, "--part", "1/2"))
    rows = search_here(*options(fashion, tmp_path / "store", tmp_path / "beside", *grid))
    assert [path.name for path in (tmp_path / "alone" / "students").iterdir()] == [rows[0]["student"]]
    assert rows[0]["teacher"] == "none" and rows[0]["side_by_side"] == 2
    a, b = (tmp_path / name / "students" / rows[0]["student"] for name in ("alone", "beside"))
    assert same(weights(a, 1), weights(b, 1))


@pytest.mark.parametrize("combine", ["sequence", "probabilities"])
def test_an_ensemble_is_taught_beside_others_as_it_is_alone(fashion, two_runs, tmp_path, combine):
    mix = ["--teacher.combine", combine]
    rows = search_here(*options(fashion, two_runs, tmp_path / "search", *mix, "--grid.teachers", "[[2],[3,1]]"))
    alone = options(fashion, two_runs, tmp_path / "alone", *mix, "--teacher.checkpoints", "[3,1]")
    here(distill, DistillConfig, *alone)
    assert same(weights(tmp_path / "alone"), weights(tmp_path / "search" / "students" / rows[1]["student"]))


def test_groups_are_of_one_seed_and_fill_the_parts(fashion, two_runs, tmp_path):
    grid = ["--grid.alphas", "[0.1,0.3,0.5,0.7,0.9]", "--grid.seeds", "[0,1,2]"]
    trials = prepare(load_config(SearchConfig, options(fashion, two_runs, tmp_path / "run", *grid))).trials
    for at_once, parts, expected in ((8, 1, 3), (2, 1, 9), (8, 2, 4), (5, 4, 4), (5, 64, 15)):
        groups = side_by_side(trials, at_once, parts)
        assert len(groups) == expected and max(map(len, groups)) <= at_once
        assert all(len({trial.config.seed for trial in group}) == 1 for group in groups)
        assert sorted(t.name for group in groups for t in group) == sorted(t.name for t in trials)

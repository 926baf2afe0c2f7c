"""The search: settings are chosen on held-out images, and only the chosen are tested."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ckd_dist import evaluate
from ckd_dist.core.errors import UserError
from ckd_dist.core.options import load_config
from ckd_dist.search.options import SearchConfig
from ckd_dist.search.trials import prepare
from ckd_dist.train.options import EvaluateConfig
from tests.helpers.here import here
from tests.helpers.search import options, search_here


def test_settings_are_chosen_on_held_out_images_and_only_those_are_tested(
    fashion, two_runs, tmp_path, capsys, monkeypatch
):
    grid = ["--grid.teachers", "[[],[1],[3]]", "--grid.alphas", "[0.1,1]", "--grid.seeds", "[0,1]", "--epochs", 1]
    words = options(fashion, two_runs, tmp_path / "search", *grid, "--data.test", fashion["test"])
    rows = search_here(*words)
    assert len(rows) == 2 * (1 + 2 * 2)
    means = {}
    for row in rows:
        key = row["teacher"], row["alpha"], row["temperature"]
        means.setdefault(key, []).append(np.array([row["val_top1"], -row["val_loss"]]))
    for teacher in ("none", "1", "3"):
        mean = {k: tuple(np.mean(values, axis=0)) for k, values in means.items() if k[0] == teacher}
        chosen = {(r["teacher"], r["alpha"], r["temperature"]) for r in rows if r["teacher"] == teacher and r["chosen"]}
        assert chosen == {max(mean, key=lambda k: mean[k])}
    assert all((row["test_top1"] is not None) == bool(row["chosen"]) for row in rows)
    row = next(row for row in rows if row["chosen"])
    path = tmp_path / "search" / "students" / row["student"] / "checkpoints" / "epoch_0001.pt"
    capsys.readouterr()
    here(evaluate, EvaluateConfig, "--data.val", fashion["test"], "--checkpoint", path, "--data.batch_size", 64)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["top1"] == pytest.approx(row["test_top1"])
    # Again: nothing is trained, nothing is tested.
    monkeypatch.setattr("ckd_dist.search.__main__.test", None)
    assert search_here(*words) == rows
    assert "group" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"run_dir: .* holds a run with grid\.alphas \[0\.1, 1\.0\], not \[0\.1\]"):
        search_here(*words, "--grid.alphas", "[0.1]")


def test_a_random_part_of_the_grid_is_the_same_for_every_teacher(fashion, two_runs, tmp_path):
    grid = ["--grid.teachers", "[[1],[2],[3]]", "--grid.alphas", "[0.1,0.5,0.9]", "--grid.temperatures", "[1,2,4,8]"]
    config = load_config(SearchConfig, options(fashion, two_runs, tmp_path / "run", *grid, "--grid.trials", "5"))
    settings = {}
    for trial in prepare(config).trials:
        settings.setdefault(trial.teacher, []).append((trial.setting.alpha, trial.setting.temperature))
    assert len(settings) == 3 and all(len(set(each)) == 5 for each in settings.values())
    assert settings["1"] == settings["2"] == settings["3"]
    losses = ["--grid.losses", "[kd,mse]", "--grid.temperatures", "[2,4]"]
    config = load_config(SearchConfig, options(fashion, two_runs, tmp_path / "run", *losses))
    assert len(prepare(config).trials) == 3  # mse has no temperature
    assert prepare(config).trials[0].teacher == "3"  # the default: the last


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--grid.teachers", "[[1],[9]]"], r"grid\.teachers: no checkpoint of epoch 9; there are 1, 2, 3, other/1"),
        (["--grid.teachers", "[[1],[1]]"], r"grid\.teachers names \[\[1\]\] twice"),
        (["--data.val", "null"], r"data\.val is missing"),
        (["--teacher.store", "null"], r"teacher\.store is missing"),
        (["--part", "3/2"], r"part is 3/2: give"),
        (["--part", "1/2", "--processes", "2"], r"part and processes do not go together"),
        (["--grid.temperatures", "[0]"], r"grid\.temperatures is 0"),
        (["--students_at_once", "0"], r"students_at_once is 0"),
        (
            ["--teacher.combine", "probabilities", "--grid.teachers", "[[1],[2]]"],
            r"teacher\.combine probabilities is for several checkpoints: name them in .*--grid\.teachers",
        ),
    ],
)
def test_a_search_that_cannot_be_is_refused(fashion, two_runs, tmp_path, more, expected):
    with pytest.raises(UserError, match=expected):
        search_here(*options(fashion, two_runs, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()

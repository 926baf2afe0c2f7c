"""The search: students side by side are those of separate runs, choices are made on held-out images."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from dataclasses import fields

import numpy as np
import psutil
import pytest
import yaml

from ckd_dist import cache_logits, distill, evaluate
from ckd_dist.core import checkpoint
from ckd_dist.core.errors import UserError
from ckd_dist.core.options import load_config
from ckd_dist.core.results import read_table
from ckd_dist.data import dataset
from ckd_dist.data.options import LoaderConfig, ViewDataConfig
from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.search import choice
from ckd_dist.search.options import SearchConfig
from ckd_dist.search.trials import prepare, side_by_side
from ckd_dist.store.manifest import Manifest
from ckd_dist.store.options import CacheConfig
from ckd_dist.train.options import DistillConfig, EvaluateConfig
from tests.helpers.commands import ENVIRONMENT, ROOT, command_line, count_lines
from tests.helpers.here import here, store_here
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


def test_the_options_of_a_recipe_ask_for_it_and_name_all_that_training_can_vary(fashion):
    info = dataset.read_info(fashion["train"], "data.train")
    varied = {"scale": (0.3, 1.0), "flip": 0.0, "color_jitter": 0.1, "erase": 0.2, "mixup": 0.3, "cutmix": 0.4}
    recipe = ViewRecipe(kind="random_resized_crop", **varied)
    options = dataset.view_options(recipe)
    assert dataset.train_recipe(ViewDataConfig(train="", **options), info) == recipe
    views, elsewhere = ({field.name for field in fields(cls)} for cls in (ViewDataConfig, LoaderConfig))
    assert options.keys() == views - elsewhere - {"train"}
    assert {field.name for field in fields(ViewRecipe)} == {"kind", *varied, "ratio", "padding", "center_share"}


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
    monkeypatch.setattr(choice, "test", None)
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


def test_groups_are_of_one_seed_and_fill_the_parts(fashion, two_runs, tmp_path):
    grid = ["--grid.alphas", "[0.1,0.3,0.5,0.7,0.9]", "--grid.seeds", "[0,1,2]"]
    trials = prepare(load_config(SearchConfig, options(fashion, two_runs, tmp_path / "run", *grid))).trials
    for at_once, parts, expected in ((8, 1, 3), (2, 1, 9), (8, 2, 4), (5, 4, 4), (5, 64, 15)):
        groups = side_by_side(trials, at_once, parts)
        assert len(groups) == expected and max(map(len, groups)) <= at_once
        assert all(len({trial.config.seed for trial in group}) == 1 for group in groups)
        assert sorted(t.name for group in groups for t in group) == sorted(t.name for t in trials)


def start(command, **more):
    return subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL, **more)


def test_a_killed_search_of_two_processes_leaves_nobody_and_then_ends_as_one_that_never_was(
    fashion, two_runs, tmp_path, monkeypatch
):
    monkeypatch.setitem(ENVIRONMENT, "CKD_DIST_CORES", "2")  # of a job, that the processes share
    grid = ["--grid.teachers", "[[],[1],[2,3]]", "--grid.seeds", "[0,1]", "--save_last_every", 5, "--log_every", 1]
    whole = search_here(*options(fashion, two_runs, tmp_path / "whole", *grid))
    killed = tmp_path / "killed"
    command = command_line("ckd_dist.search", *options(fashion, two_runs, killed, *grid, "--processes", 2))
    process = start(command)
    while sum(path.read_bytes().count(b"\n") for path in killed.glob("students/*/metrics.jsonl")) < 130:
        assert process.poll() is None
        time.sleep(0.01)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert len(family) == 2 and not alive and process.wait(timeout=10) == -signal.SIGKILL
    again = start(command, stderr=subprocess.PIPE, text=True)
    assert again.communicate(timeout=300)[1] == "" and again.returncode == 0
    rows = read_table(killed / "results.csv", "run_dir")
    for a, b in zip(whole, rows, strict=True):
        differ = {"train_seconds", "side_by_side"}
        assert {k: v for k, v in a.items() if k not in differ} == {k: v for k, v in b.items() if k not in differ}
        folders = [path / "students" / a["student"] for path in (tmp_path / "whole", killed)]
        assert same(*map(weights, folders))
        assert json.loads((folders[1] / "env.json").read_text())["threads"] == 1
        lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in folders]
        first, second = ([(x["split"], x["step"], x["loss"]) for x in map(json.loads, each)] for each in lines)
        assert first == second


def test_parts_of_a_job_array_and_a_last_command_make_the_whole(fashion, two_runs, tmp_path, capsys):
    words = options(fashion, two_runs, tmp_path / "run", "--grid.teachers", "[[1],[2],[3]]", "--epochs", 1)
    for part in ("1/2", "2/2"):
        search_here(*words, "--part", part)
        assert not (tmp_path / "run" / "results.csv").exists()
    capsys.readouterr()
    search_here(*words)
    out = capsys.readouterr().out.replace("\n", "")
    assert "side by side" not in out and "results.csv: 3 students" in out
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["grid"]["teachers"] == [[1], [2], [3]] and "part" not in saved


def test_a_part_that_fails_ends_the_search_ctrl_c_saves_in_all_parts_and_a_killed_one_leaves_nobody(
    fashion, two_runs, tmp_path
):
    words = options(fashion, two_runs, tmp_path / "run", "--grid.seeds", "[0,1]", "--epochs", 500, "--processes", 2)
    command = command_line("ckd_dist.search", *words, "--log_every", 1)

    def start():
        before = [count_lines(path) for path in records()]
        process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        while len(records()) < 2 or any(count_lines(p) <= n for p, n in zip(records(), before or [0, 0], strict=True)):
            assert process.poll() is None
            time.sleep(0.1)
        return process, psutil.Process(process.pid).children(recursive=True)

    def records():
        return sorted(tmp_path.glob("run/students/*/metrics.jsonl"))

    process, family = start()
    family[0].send_signal(signal.SIGKILL)
    assert process.wait(timeout=20) == 1
    assert not psutil.wait_procs(family, timeout=10)[1]
    process, family = start()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0].count("stopped by SIGUSR2 and saved") == 2 and process.returncode == 130
    for record in records():
        last = checkpoint.load(record.with_name("checkpoints") / "last.pt", "")
        assert last["step"] == json.loads(record.read_text().splitlines()[-1])["step"]
    process, family = start()
    process.kill()
    assert not psutil.wait_procs(family, timeout=20)[1] and process.wait(timeout=10) == -signal.SIGKILL


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


def test_a_store_of_two_runs_is_verified_and_repaired_run_by_run(fashion, teacher, two_runs, tmp_path, capsys):
    store = shutil.copytree(two_runs, tmp_path / "store")
    manifest = Manifest.load(store, "")
    assert list(manifest.members) == [1, 2, 3, "other/1"]
    shard = manifest.shards("other/epoch_0001", 1)[0]
    before = shard.path(store).read_bytes()
    shard.path(store).unlink()
    base = [store, "--data.train", fashion["train"], "--teacher.run"]
    assert store_here("repair", *base, teacher) == 0
    assert "nothing to repair" in capsys.readouterr().out and not shard.path(store).exists()
    with pytest.raises(UserError, match=r"the store's other/epoch_0001 is of weights"):
        store_here("repair", *base, teacher, "--teacher.name", "other")
    assert store_here("repair", *base, two_runs.parent / "run", "--teacher.name", "other") == 0
    assert shard.path(store).read_bytes() == before
    words = [*base, two_runs.parent / "run", "--records", 16]
    assert store_here("verify", *words, "--teacher.name", "other") == 0
    assert "16 of 16 records are the teacher's" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"teacher\.name: the store holds no such run; named runs are other"):
        store_here("verify", *words, "--teacher.name", "third")

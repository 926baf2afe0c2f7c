"""A race of real students: the same end whoever trains them and however often they are killed, and a choice that
`distill` takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ckd_dist import distill
from ckd_dist.core.errors import UserError
from ckd_dist.core.options import load_config
from ckd_dist.data.beton import open_beton
from ckd_dist.data.loader import BetonLoader
from ckd_dist.data.options import LoaderConfig
from ckd_dist.nn import forward, models
from ckd_dist.search import __main__ as command
from ckd_dist.search import prior, racing
from ckd_dist.search.held_out import read_answers
from ckd_dist.search.options import SearchConfig
from ckd_dist.train.options import DistillConfig
from tests.helpers.commands import ENVIRONMENT, ROOT, command_line, kill_tree
from tests.helpers.here import cache_here
from tests.helpers.search import options, same, weights
from tests.helpers.stores import cache_options
from tests.helpers.training import summary

GRID = ["--race", "--grid.teachers", "[[1],[2],[3],[1,3]]", "--epochs", 4, "--race_budget", 6, "--log_every", 1]


def race_here(*words):
    config = load_config(SearchConfig, [str(word) for word in words])
    command.main(config)
    return end(Path(config.run_dir))


def end(folder):
    """What race.json says, but for the seconds in its words."""
    values = json.loads((folder / "race.json").read_text())
    words = values.pop("verdict")
    return values, [line for line in words if "more students" not in line]


@pytest.fixture(scope="module")
def whole(fashion, two_runs, tmp_path_factory):
    """A race in one process that nobody disturbed, its folder and its end."""
    folder = tmp_path_factory.mktemp("whole") / "race"
    return folder, race_here(*options(fashion, two_runs, folder, *GRID))


def test_a_race_ends_with_a_choice_that_distill_takes(whole, fashion, two_runs, tmp_path, capsys):
    folder, (values, words) = whole
    assert values["cost"] <= 6 and values["leader"] in values["standing"]
    names = ["1", "2", "3", "1+3"]
    assert list(values["choice"]) == names[values["leader"]].split("+")
    assert any("of trying all 4 with three seeds" in line for line in words)
    students = sorted(folder.glob("students/*"))
    cost = sum(json.loads((each / "summary.json").read_text())["epochs"] / 4 for each in students)
    assert cost == pytest.approx(values["cost"])
    before = {each: (each / "summary.json").stat().st_mtime_ns for each in students}
    again = race_here(*options(fashion, two_runs, folder, *GRID))
    assert again == (values, words)
    assert {each: (each / "summary.json").stat().st_mtime_ns for each in sorted(folder.glob("students/*"))} == before
    capsys.readouterr()
    student = ["--data.train", fashion["train"], "--data.val", fashion["holdout"], "--data.batch_size", 64]
    student += ["--model.name", "resnet8", "--epochs", 1, "--teacher.store", two_runs, "--teacher.selection", folder]
    student += ["--run_dir", tmp_path / "student"]
    distill.main(load_config(DistillConfig, [str(word) for word in student]))
    taught = " ".join(capsys.readouterr().out.split())
    assert f"cached logits of {', '.join(f'epoch {name}' for name in values['choice'])} " in taught
    (folder.parent / "other").mkdir()
    wrong = {**json.loads((folder / "race.json").read_text()), "choice": {"3": "0" * 64}}
    (folder.parent / "other" / "race.json").write_text(json.dumps(wrong))
    with pytest.raises(UserError, match=r"teacher\.selection: it chose epoch 3 with weights 000000000000, .* has"):
        distill.main(
            load_config(DistillConfig, [*map(str, student), "--teacher.selection", str(folder.parent / "other")])
        )


def test_answers_are_those_of_the_evaluation(whole, fashion, two_runs):
    folder, _ = whole
    config = load_config(SearchConfig, options(fashion, two_runs, folder, *GRID))
    entered = racing.prepare(command.prepare(config))
    trial = racing.student_of(entered, racing.Student(2, 1, 1))
    answers = read_answers(trial)
    assert 100 * answers.correct.mean() == pytest.approx(summary(Path(trial.config.run_dir))["top1"])
    assert 0 < answers.loss.mean() <= summary(Path(trial.config.run_dir))["loss"] + 1e-3
    assert trial.config.epochs == 1 and trial.config.optim.warmup_epochs == pytest.approx(0.25)


def test_a_race_that_is_killed_again_and_again_in_two_processes_ends_as_one_that_never_was(
    whole, fashion, two_runs, tmp_path, monkeypatch
):
    folder = tmp_path / "race"
    line = command_line("ckd_dist.search", *options(fashion, two_runs, folder, *GRID, "--processes", 2))
    for lines in (10, 60, 150):
        process = subprocess.Popen(line, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL)
        while sum(path.read_bytes().count(b"\n") for path in folder.glob("students/*/metrics.jsonl")) < lines:
            assert process.poll() is None
            time.sleep(0.01)
        kill_tree(process)
    done = subprocess.run(line, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert end(folder) == whole[1]
    for path in sorted(whole[0].glob("students/*")):
        epochs = summary(path)["epochs"]
        assert same(*(weights(each / "students" / path.name, epochs) for each in (whole[0], folder)))


def test_parts_of_a_job_array_run_a_race_together(whole, fashion, two_runs, tmp_path):
    words = options(fashion, two_runs, tmp_path / "race", *GRID)
    parts = [
        subprocess.Popen(command_line("ckd_dist.search", *words, "--part", f"{n}/2"), env=ENVIRONMENT, cwd=ROOT)
        for n in (1, 2)
    ]
    assert [each.wait(300) for each in parts] == [0, 0]
    assert end(tmp_path / "race") == whole[1]


def test_a_part_that_is_left_alone_does_what_the_others_do_not(whole, fashion, two_runs, tmp_path):
    words = options(fashion, two_runs, tmp_path / "race", *GRID, "--race_budget", 3)
    command.main(load_config(SearchConfig, [*words, "--part", "2/3"]))
    assert not (tmp_path / "race" / "race.json").exists()  # the first part's, or that of a last command
    students = sorted(path.name for path in tmp_path.glob("race/students/*"))
    values, _ = race_here(*words)
    assert sorted(path.name for path in tmp_path.glob("race/students/*")) == students and values["cost"] <= 3
    assert not list(tmp_path.glob("race/.look*"))


def test_the_same_teacher_under_several_names_is_not_told_apart_from_itself(fashion, teacher, store, tmp_path):
    copy = shutil.copytree(store, tmp_path / "store")
    for name in ("a", "b"):
        cache_here(*cache_options(fashion, teacher, copy, "--teacher.name", name, "--teacher.checkpoints", "[3]"))
    grid = [*GRID, "--grid.teachers", "[[3],[a/3],[b/3]]", "--race_budget", 4, "--epochs", 2]
    values, words = race_here(*options(fashion, copy, tmp_path / "race", *grid))
    assert len(values["standing"]) == 3 and words[0].startswith("these 3 cannot be told apart at this budget")
    assert "the last checkpoint is one of them" in words[2]


def test_a_race_and_a_search_may_share_a_folder(fashion, two_runs, tmp_path):
    grid = ["--grid.teachers", "[[1],[3]]", "--epochs", 1]
    words = options(fashion, two_runs, tmp_path / "run", *grid)
    command.main(load_config(SearchConfig, words))
    table = (tmp_path / "run" / "results.csv").read_bytes()
    before = sorted(path.name for path in tmp_path.glob("run/students/*"))
    values, _ = race_here(*words, "--race", "--race_budget", 4)
    assert (tmp_path / "run" / "results.csv").read_bytes() == table and values["seeds"] == 2
    assert set(before) < {path.name for path in tmp_path.glob("run/students/*")}  # their first seed was trained already


def test_a_budget_in_hours_is_kept_to(whole, fashion, two_runs):
    folder, (values, _) = whole
    config = load_config(SearchConfig, options(fashion, two_runs, folder, *GRID, "--race_budget", "null"))
    entered = racing.prepare(command.prepare(replace(config, race_hours=1.0)))
    first = [racing.Student(candidate, 1, seed) for candidate in range(4) for seed in (0, 1)]
    hours = sum(racing.seconds(entered, each) for each in first) / len(first) / 3600
    assert racing.budget(entered) == pytest.approx(1 / hours)
    words = options(fashion, two_runs, folder, *GRID, "--race_budget", "null", "--race_hours", 6 * hours)
    again, _ = race_here(*words)  # the same students, bought by the hour
    assert again["budget"] == pytest.approx(6) and again["drops"] == values["drops"]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--grid.seeds", "[0,1]"], r"grid\.seeds is not for a race"),
        (["--grid.models", "[resnet8,resnet20]"], r"grid\.models: a race is for one student"),
        (["--grid.teachers", "[[],[1]]"], r"grid\.teachers: \[\], no teacher, is not for a race"),
        (["--race_error", 0], r"race_error is 0"),
        (["--race", "false"], r"race_budget goes with --race"),
        (["--race_hours", 2], r"race_budget and race_hours are both given"),
    ],
)
def test_what_is_no_race_is_refused(fashion, two_runs, tmp_path, more, expected):
    with pytest.raises(UserError, match=expected):
        race_here(*options(fashion, two_runs, tmp_path / "race", *GRID, *more))
    assert not (tmp_path / "race").exists()


@pytest.fixture(scope="module")
def own_answers(fashion, teacher, tmp_path_factory):
    """A store of what the teacher's checkpoints answer to the held-out images."""
    store = tmp_path_factory.mktemp("prior") / "held_out"
    words = cache_options(fashion, teacher, store, "--data.train", fashion["holdout"], "--data.augment", "center_crop")
    cache_here(*words, "--views", 1)
    return store


def test_a_race_begins_with_those_whose_own_answers_are_best(fashion, store, teacher, own_answers, tmp_path):
    grid = [*GRID, "--grid.teachers", "[[1],[2],[3],[1,3]]", "--epochs", 2, "--race_budget", 6]
    words = options(fashion, store, tmp_path / "race", *grid, "--race_prior", own_answers)
    values, said = race_here(*words)
    search = command.prepare(load_config(SearchConfig, [str(word) for word in words]))
    found = prior.top1(search, [trial.config.teacher.checkpoints for trial in search.trials])
    for number, epoch in enumerate((1, 2, 3)):
        logits, labels = answers_of(teacher, epoch, fashion["holdout"])
        assert found[number] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item(), abs=0.5)
    begun = sorted(range(4), key=lambda number: -found[number])[:3]
    assert {drop["candidate"] for drop in values["drops"] if drop["behind"] is None} == {*range(4)} - {*begun}
    students = [path.name for path in (tmp_path / "race" / "students").iterdir()]
    assert len(students) == values["cost"] == 6 and not any("epochs" in name for name in students)
    assert "1 were not begun: their own answers to held-out images are worse" in said
    again = racing.prepare(replace_config(search, race_prior=str(own_answers), race_budget=None, race_hours=1.0))
    assert [each.candidate for each in again.first] == [begun[0], begun[0], begun[1], begun[1]]


def answers_of(run, epoch, beton):
    """(Logits, labels) of a teacher's checkpoint, as it is evaluated."""
    info = open_beton(beton, "images")
    model, metadata = models.load_model(run / "checkpoints" / f"epoch_{epoch:04d}.pt", "")
    loader = BetonLoader.for_evaluation(info, LoaderConfig(), metadata, torch.device("cpu"))
    network = forward.to_device(model, torch.device("cpu"))
    batches = list(loader.batches(np.arange(info.count)))
    logits = torch.cat([forward.forward_logits(network, batch.images, "off") for batch in batches])
    return logits, torch.cat([batch.labels for batch in batches])


def replace_config(search, **values):
    return replace(search, config=replace(search.config, **values))


def test_a_prior_of_other_images_or_checkpoints_is_refused(fashion, two_runs, store, own_answers, tmp_path):
    grid = [*GRID, "--grid.teachers", "[[1],[3]]"]
    words = options(fashion, store, tmp_path / "race", *grid)
    with pytest.raises(UserError, match=r"race_prior: .* is of images with content_hash"):
        race_here(*words, "--race_prior", store)
    with pytest.raises(UserError, match=r"race_prior: .*no checkpoint of epoch other/1"):
        more = ["--grid.teachers", "[[1],[other/1]]", "--race_prior", own_answers]
        race_here(*options(fashion, two_runs, tmp_path / "race", *GRID, *more))
    with pytest.raises(UserError, match=r"race_prior goes with --race"):
        race_here(*options(fashion, store, tmp_path / "race", "--race_prior", own_answers))

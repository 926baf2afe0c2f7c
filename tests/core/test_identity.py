"""Every result knows what it was made of: an input replaced in place is refused, a moved one is not."""

from __future__ import annotations

import csv
import io
import itertools
import json
import pkgutil
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from ckd_dist.core import checkpoint, identity
from ckd_dist.core.errors import UserError
from tests.helpers.commands import run
from tests.helpers.data_prep import write
from tests.helpers.here import run_here
from tests.helpers.shared import make_once
from tests.helpers.stores import contents

# ------------------------------------------------------------------------------------------- two worlds


def training(folder: Path, *more: object) -> list[object]:
    """Options of a training of two epochs of two steps."""
    data = ["--data.train", folder / "train.beton", "--data.val", folder / "val.beton", "--data.batch_size", 100]
    options = ["--model.name", "resnet8", "--epochs", 2, "--optim.lr", 0.05, "--amp", "off", "--save_last_every", 1]
    return [*data, *options, *more]


def options(command: str, folder: Path) -> list[object]:
    """The command line of a command whose inputs and result lie in `folder`."""
    result, data = folder / "result", ["--data.train", folder / "train.beton", "--data.batch_size", 100, "--amp", "off"]
    weights = ["--model.weights", folder / "init.pt"]
    store = ["--teacher.store", folder / "store", "--teacher.selection", folder / "selection"]
    online = ["--teacher.run", folder / "teacher", "--teacher.selection", folder / "selection"]
    return {
        "train_teacher": training(folder, *weights, "--run_dir", result),
        "adopt": [
            "--data.val", folder / "val.beton", "--files", f"[{folder / 'init.pt'}]", "--model.name", "resnet8",
            "--amp", "off", "--run_dir", result,
        ],
        "distill": training(folder, *weights, *store, "--run_dir", result),
        "distill online": training(folder, *weights, *online, "--run_dir", result),
        "cache_logits": [*data, "--teacher.run", folder / "teacher", "--store", result, "--views", 2],
        "select_teacher": [
            *data, "--data.val", folder / "val.beton", "--teacher.run", folder / "teacher", "--run_dir", result,
            "--probe.steps", 4, "--probe.repeats", 1, "--student", "resnet8",
        ],
        "search": training(
            folder, *weights, "--data.test", folder / "test.beton", "--teacher.store", folder / "store",
            "--grid.teachers", "[[],[1],[2]]", "--run_dir", result,
        ),
        "convert": [
            folder / "store", result, "--codec", "topk", "--k", 4, "--data.train", folder / "train.beton",
        ],
    }[command]  # fmt: skip


INPUTS = {
    "train_teacher": ("train.beton", "val.beton", "init.pt"),
    "adopt": ("val.beton", "init.pt"),
    "distill": ("train.beton", "val.beton", "init.pt", "store", "selection"),
    "distill online": ("train.beton", "val.beton", "init.pt", "teacher", "selection"),
    "cache_logits": ("train.beton", "teacher"),
    "select_teacher": ("train.beton", "val.beton", "teacher"),
    "search": ("train.beton", "val.beton", "test.beton", "init.pt", "store"),
    "convert": ("train.beton", "store"),
}
"""Command -> its inputs: every kind of them, of every command that goes on in what it left."""


def write_world(folder: Path, number: int, images: Path) -> None:
    """Everything that commands take, of the one or the other content; teachers and stores of the `images`."""
    more = 10 * number
    for name, split, count in (("train", "train", 200), ("val", "holdout", 50), ("test", "test", 50)):
        part = ["--split", split, "--subset", count + more, "--out", folder / f"{name}.beton", "--workers", 1]
        assert write("--dataset", "fashion_mnist", *part).status == 0
    run_here("train_teacher", *training(images, "--seed", number, "--save_every", 1, "--run_dir", folder / "teacher"))
    shutil.copy(checkpoint.checkpoint_path(folder / "teacher", 1), folder / "init.pt")
    data = ["--data.train", images / "train.beton", "--data.batch_size", 100, "--amp", "off"]
    run_here("cache_logits", *data, "--teacher.run", folder / "teacher", "--store", folder / "store", "--views", 2)


class Stopped(Exception):
    """In the middle of a command."""


STOPS = {
    "adopt": ("ckd_dist.core.run_folder:RunFolder.write_summary", 0),
    "cache_logits": ("ckd_dist.store.background:BackgroundWriter.commit", 3),
    "convert": ("ckd_dist.store.writer:ShardWriter.commit", 3),
    "select_teacher": ("ckd_dist.selection.choice:estimate", 0),
    "search": ("ckd_dist.train.learner:Learner.write_summary", 1),
}
"""Command -> the call at which it is to stop, and how many of them go well before; the others: the third step."""


def stop(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Have the command end in its middle."""
    target, count = STOPS.get(command, ("ckd_dist.train.learner:Learner.train_step", 2))
    original, calls = pkgutil.resolve_name(target), itertools.count()

    def until(*arguments, **named):
        if next(calls) == count:
            raise Stopped
        return original(*arguments, **named)

    monkeypatch.setattr(target.replace(":", "."), until)
    monkeypatch.setattr("ckd_dist.selection.probes.SAVE_EVERY", 2)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> Path:
    """Folders `ours` and `others` of inputs, and for every command `stopped COMMAND` and `complete COMMAND`."""

    def make(folder: Path) -> None:
        for number, name in enumerate(("ours", "others")):
            (folder / name).mkdir()
            write_world(folder / name, number, folder / "ours")
        run_here("select_teacher", *options("select_teacher", folder / "ours"))
        for name, choice in (("ours", 1), ("others", 2)):
            selection = Path(shutil.copytree(folder / "ours" / "result", folder / name / "selection"))
            values = json.loads((selection / "selection.json").read_text())
            weights = {each["epoch"]: each["weights_sha256"] for each in values["checkpoints"]}
            values.update(choice=choice, weights_sha256=weights[choice])
            (selection / "selection.json").write_text(json.dumps(values))
        shutil.rmtree(folder / "ours" / "result")
        for command in INPUTS:
            with pytest.MonkeyPatch.context() as monkeypatch:
                stop(monkeypatch, command)
                with pytest.raises(Stopped):
                    run_here(command.split()[0], *options(command, folder / "ours"))
            shutil.copytree(folder / "ours" / "result", folder / f"stopped {command}")
            run_here(command.split()[0], *options(command, folder / "ours"))
            (folder / "ours" / "result").rename(folder / f"complete {command}")

    return make_once(tmp_path_factory, "worlds", make)


def place(worlds: Path, tmp_path: Path, state: str, command: str) -> Path:
    """A copy of our world with what the command left in it, at another place."""
    folder = Path(shutil.copytree(worlds / "ours", tmp_path / "world"))
    shutil.copytree(worlds / f"{state} {command}", folder / "result")
    return folder


def replace(worlds: Path, folder: Path, name: str) -> None:
    """Put the other world's input in the place of ours."""
    there = worlds / "others" / name
    if there.is_dir():
        shutil.rmtree(folder / name)
        shutil.copytree(there, folder / name)
        return
    for path in there.parent.glob(f"{name}*"):
        (folder / path.name).unlink(missing_ok=True)
        shutil.copy(path, folder / path.name)


# ------------------------------------------------------------------------------------------- the matrix

CELLS = [
    (command, name, state) for command, names in INPUTS.items() for name in names for state in ("stopped", "complete")
]


@pytest.mark.parametrize(("command", "name", "state"), CELLS)
def test_an_input_that_is_replaced_in_place_is_refused_and_nothing_is_changed(command, name, state, worlds, tmp_path):
    folder = place(worlds, tmp_path, state, command)
    replace(worlds, folder, name)
    before = contents(folder / "result")
    with pytest.raises(UserError) as refusal:
        run_here(command.split()[0], *options(command, folder))
    assert contents(folder / "result") == before
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("command", INPUTS)
def test_what_was_moved_copied_or_touched_goes_on_and_ends_as_if_it_never_was(command, worlds, tmp_path, capsys):
    folder = place(worlds, tmp_path, "stopped", command)
    for path in folder.rglob("*"):
        path.touch()
    run_here(command.split()[0], *options(command, folder))
    complete = worlds / f"complete {command}"
    for path in complete.rglob("epoch_*.pt"):
        ours = folder / "result" / path.relative_to(complete)
        assert same(*(checkpoint.load(each, "")["weights"] for each in (path, ours)))
    for path in complete.rglob("*.npy"):
        assert (folder / "result" / path.relative_to(complete)).read_bytes() == path.read_bytes()
    before = {path: path.stat().st_mtime_ns for path in (folder / "result").rglob("*") if path.name != ".lock"}
    run_here(command.split()[0], *options(command, folder))
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "result").rglob("*") if path.name != ".lock"}


def weights_of(run_dir, epoch):
    return checkpoint.load(checkpoint.checkpoint_path(run_dir, epoch), "")["weights"]


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------------------------------- stores that grow


def test_a_student_goes_on_with_the_views_that_it_began_with(worlds, tmp_path):
    """Four epochs on a store of two views, which has four when the student goes on."""
    folder = Path(shutil.copytree(worlds / "ours", tmp_path / "world"))
    words = training(folder, "--epochs", 4, "--teacher.store", folder / "store")
    run_here("distill", *words, "--run_dir", folder / "whole")
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Stopped):
        stop(monkeypatch, "distill")
        run_here("distill", *words, "--run_dir", folder / "result")
    more = ["--data.train", folder / "train.beton", "--teacher.run", folder / "teacher", "--store", folder / "store"]
    run_here("cache_logits", *more, "--views", 4)
    run_here("distill", *words, "--run_dir", folder / "result")
    run_here("distill", *words, "--run_dir", folder / "new")
    whole, resumed, new = (weights_of(folder / name, 4) for name in ("whole", "result", "new"))
    assert same(whole, resumed) and not same(whole, new)
    with pytest.raises(UserError, match=r"holds a run with data\.views 2, not 4"):
        run_here("distill", *words, "--data.views", 4, "--run_dir", folder / "result")


def test_a_table_of_students_that_are_gone_is_made_anew(worlds, tmp_path):
    folder = place(worlds, tmp_path, "complete", "search")
    table = folder / "result" / "results.csv"
    before = table.read_text()
    run_here("search", *options("search", folder))
    assert table.read_text() == before
    shutil.rmtree(next((folder / "result" / "students").glob("*teacher_2*")))
    run_here("search", *options("search", folder))
    first, second = (
        [without_time(row) for row in csv.DictReader(io.StringIO(text))] for text in (before, table.read_text())
    )
    assert first == second and table.read_text() != before


def without_time(row):
    return {key: value for key, value in row.items() if key not in ("train_seconds", "side_by_side")}


# ------------------------------------------------------------------------------------------- older versions


@pytest.mark.parametrize("command", ["distill", "search", "select_teacher"])
@pytest.mark.parametrize("state", ["stopped", "complete"])
def test_a_result_of_an_older_version_is_taken_as_it_is_and_that_is_said_once(
    command, state, worlds, tmp_path, capsys, monkeypatch
):
    """An older version wrote the options as they were resolved into config.yaml, and nothing beside it."""
    result = Path(shutil.copytree(worlds / f"{state} {command}", tmp_path / "result"))
    for folder in [result, *result.glob("students/*")]:
        nested: dict = {}
        for key, value in identity.saved_options(folder).items():
            section, _, name = key.rpartition(".")
            (nested.setdefault(section, {}) if section else nested)[name] = value
        if command == "distill":
            nested["data"]["views"] = None
        (folder / "config.yaml").write_text(yaml.safe_dump(nested))
        (folder / "lineage.json").unlink()
    monkeypatch.setattr("ckd_dist.core.run_folder._older", [])
    words = options(command, worlds / "ours")
    run_here(command, *words[: words.index("--run_dir") + 1], result, *words[words.index("--run_dir") + 2 :])
    assert capsys.readouterr().out.count("of an older version") == 1


def test_options_that_came_later_are_as_if_they_had_always_been(tmp_path):
    older = identity.Origin(requested={"lr": 1}, resolved={"lr": 1})
    newer, other = (
        identity.Origin(requested=each, resolved=each) for each in ({"lr": 1, "accumulate": n} for n in (1, 2))
    )
    assert older.identity == newer.identity != other.identity
    older.write(tmp_path)
    (tmp_path / "summary.json").touch()
    assert identity.require_same(tmp_path, newer)
    with pytest.raises(UserError, match="a run with accumulate 1, not 2"):
        identity.require_same(tmp_path, other)


# ------------------------------------------------------------------------------------------- parts of one set


def test_parts_of_one_set_that_overlap_are_refused(worlds, tmp_path):
    ours, loose = worlds / "ours", tmp_path / "loose.beton"
    part = ["--split", "holdout", "--holdout", 0.2, "--subset", 50]
    assert write("--dataset", "fashion_mnist", *part, "--out", loose).status == 0
    data = ["--data.train", ours / "train.beton", "--data.batch_size", 50]
    common = [*data, "--model.name", "resnet8", "--run_dir", tmp_path / "run"]
    searched = [*common, "--data.val", ours / "val.beton", "--teacher.store", ours / "store"]
    overlap = r"overlap \(holdout with --holdout 0\.2; train with --holdout 0\.1\): write both parts with the same"
    for command, words, expected in (
        ("train_teacher", [*common, "--data.val", loose], overlap),
        ("distill", [*common, "--data.val", loose, "--teacher.store", ours / "store"], overlap),
        ("select_teacher", [*data, "--data.val", loose, "--teacher.run", ours / "teacher", "--run_dir", "x"], overlap),
        ("search", [*searched, "--data.test", loose], r"data\.test: " + ".*" + overlap),
        ("search", [*searched, "--data.test", ours / "val.beton"], r"data\.test: .* and data\.val .* the same images"),
    ):
        with pytest.raises(UserError, match=expected):
            run_here(command, *words)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------- the tree


def lineage_of(path, status=0):
    return " ".join(run("ckd_dist.lineage", path, status=status).stdout.split())


def test_lineage_shows_where_a_result_comes_from_and_what_of_it_has_changed_or_is_gone(worlds, tmp_path):
    folder = place(worlds, tmp_path, "complete", "distill")
    found = lineage_of(folder / "result")
    for option in ("data.train", "data.val", "teacher.store", "teacher.selection", "model.weights"):
        assert f"{option}: {worlds / 'ours'}" in found
    store = found[found.index("teacher.store") :]
    assert "200 images of fashion_mnist train, --holdout 0.1, sha256:" in found
    assert "teacher.run: " in store and "checkpoint 1 of logits of 200 images, checkpoints 1, 2" in store
    assert "resnet8 after epoch 2, weights" in lineage_of(folder / "result" / "checkpoints" / "epoch_0002.pt")
    (worlds / "ours").rename(worlds / "hidden")  # so that only what was moved along is found
    try:
        assert str(folder / "store") in lineage_of(folder / "result")
        replace(worlds, folder, "init.pt")
        shutil.rmtree(folder / "selection")
        found = lineage_of(folder / "result", status=1)
        assert "weights_sha256 was" in found and found.count(" gone") == 1
    finally:
        (worlds / "hidden").rename(worlds / "ours")


def test_lineage_of_nothing_is_one_line(tmp_path):
    for path, expected in (
        (tmp_path, "is nothing that this system leaves"),
        (tmp_path / "x", "no such file or folder"),
    ):
        assert expected in run("ckd_dist.lineage", path, status=2).stderr

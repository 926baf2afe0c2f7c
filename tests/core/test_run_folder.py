"""The folder of a run: one command at a time, other options, more epochs, damage, a full disk."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from ckd_dist.core import checkpoint, identity
from ckd_dist.core.errors import TrainingError, UserError
from ckd_dist.core.run_folder import RunFolder, read_summary
from ckd_dist.train.learner import Learner
from tests.helpers.training import metrics, options, same_weights, train_here

FEW = ("--epochs", 2, "--amp", "off", "--log_every", 1, "--optim.schedule", "constant")
"""Six steps of 100 held-out images."""


def words(fashion, run_dir, *more):
    return options({**fashion, "train": fashion["holdout"], "holdout": fashion["test"]}, run_dir, *FEW, *more)


def of(options):
    """The origin of a run with these options, and no inputs."""
    return identity.Origin(requested=options, resolved=options)


@pytest.fixture(scope="module")
def complete(fashion, tmp_path_factory):
    """A run of two epochs."""
    path = tmp_path_factory.mktemp("runs") / "complete"
    train_here(*words(fashion, path))
    return path


@pytest.fixture
def run_dir(complete, tmp_path):
    """A copy of it, to be changed."""
    path = Path(shutil.copytree(complete, tmp_path / "run"))
    options = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(options.replace(f"run_dir: {complete}", f"run_dir: {path}"))
    return path


# ------------------------------------------------------------------------------------------- one at a time


def test_a_run_folder_in_which_another_process_works_is_refused_until_that_one_is_gone(tmp_path):
    run_dir, (told, tell) = tmp_path / "run", os.pipe()
    other = os.fork()
    if not other:
        RunFolder(str(run_dir), of({"epochs": 1}))
        os.write(tell, b"locked")
        signal.pause()
    os.read(told, 9)
    for _ in range(2):
        with pytest.raises(
            UserError, match=rf"run_dir: {run_dir} is in use by process {other} on \S+: wait until it ends"
        ):
            RunFolder(str(run_dir), of({"epochs": 2}))
    assert "epochs: 1" in (run_dir / "config.yaml").read_text()
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    RunFolder(str(run_dir), of({"epochs": 2}))


def test_a_complete_run_is_looked_at_while_somebody_works_in_it_and_needs_no_place_to_write(fashion, run_dir, capsys):
    (run_dir / ".lock").unlink()
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    train_here(*words(fashion, run_dir))
    assert "complete already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}


# ------------------------------------------------------------------------------------------- other options


def test_a_folder_without_a_saved_step_takes_other_options(fashion, tmp_path):
    run_dir = tmp_path / "run"
    with pytest.raises(TrainingError):
        train_here(*words(fashion, run_dir, "--optim.lr", 1000, "--optim.weight_decay", 10))
    assert (run_dir / "config.yaml").exists()
    train_here(*words(fashion, run_dir, "--optim.lr", 0.01, "--epochs", 1))
    assert identity.saved_options(run_dir)["optim.lr"] == 0.01
    assert [line["step"] for line in metrics(run_dir)] == [1, 2, 3]
    with pytest.raises(UserError, match=r"holds a run with optim\.lr 0\.01, not 0\.02: repeat its options to go on"):
        train_here(*words(fashion, run_dir, "--optim.lr", 0.02, "--epochs", 1))


def test_a_finished_run_with_more_epochs_ends_with_the_weights_of_the_longer_run(fashion, run_dir, tmp_path):
    longer = ("--epochs", 3)
    train_here(*words(fashion, run_dir, *longer))
    train_here(*words(fashion, tmp_path / "whole", *longer))
    for epoch in (1, 2, 3):
        assert same_weights(*(checkpoint.checkpoint_path(run, epoch) for run in (run_dir, tmp_path / "whole")))
    found = [[(line["step"], line["loss"]) for line in metrics(run)] for run in (run_dir, tmp_path / "whole")]
    assert found[0] == found[1] and len(found[0]) == 9
    summary = read_summary(run_dir)
    assert summary is not None and summary.epochs == 3 and identity.saved_options(run_dir)["epochs"] == 3


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"optim.schedule": "cosine"}, "optim.schedule cosine"),
        ({"optim.schedule": "linear"}, "optim.schedule linear"),
        ({"data.start_image_size": 16}, "data.start_image_size"),
        ({"teacher.combine": "sequence"}, "teacher.combine sequence"),
        ({"optim.schedule": "step"}, None),
        ({"optim.schedule": "multistep"}, None),
    ],
)
def test_more_epochs_are_refused_where_the_first_ones_depend_on_their_number(more, why, run_dir):
    options = {"epochs": 2, "optim.schedule": "constant", "data.start_image_size": None, "teacher.combine": "logits"}
    options.update(more)

    def nested(epochs):
        config: dict = {"epochs": epochs}
        for key, value in options.items():
            section, _, name = key.partition(".")
            if name:
                config.setdefault(section, {})[name] = value
        return config

    (run_dir / "config.yaml").write_text(json.dumps(nested(2)))
    if why is None:
        identity.require_same(run_dir, of(nested(3)))
    else:
        with pytest.raises(UserError, match=f"epochs 2, not 3, and {why} depends on their number: repeat"):
            identity.require_same(run_dir, of(nested(3)))
    with pytest.raises(UserError, match="holds a run with epochs 2, not 1: repeat its options"):
        identity.require_same(run_dir, of(nested(1)))


# ------------------------------------------------------------------------------------------- damage


def replace_by_fifo(path):
    path.unlink()
    os.mkfifo(path)


def change_state(path, change):
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
DAMAGE = {
    "config.yaml": {
        "not UTF-8": lambda path: path.write_bytes(b"epochs: \xff\xfe"),
        "a list": lambda path: path.write_text("- 1\n"),
        "a bomb": lambda path: path.write_text(BOMB),
        "endless": lambda path: path.write_text("a: &a\n  b: *a\n"),
        "deep": lambda path: path.write_text("[" * 5000 + "]" * 5000),
        "a FIFO": replace_by_fifo,
    },
    "summary.json": {
        "cut short": lambda path: path.write_bytes(path.read_bytes()[:40]),
        "a list": lambda path: path.write_text("[]"),
        "a word for a number": lambda path: path.write_text(path.read_text().replace('"epochs": 2', '"epochs": "two"')),
        "without steps": lambda path: path.write_text(path.read_text().replace('"steps"', '"stairs"')),
        "deep": lambda path: path.write_text("[" * 100000),
        "a FIFO": replace_by_fifo,
    },
    "metrics.jsonl": {
        "not UTF-8": lambda path: path.write_bytes(b'{"\xff": 1}\n' + path.read_bytes()),
        "a list": lambda path: path.write_text("[1]\n" + path.read_text()),
        "a word for a step": lambda path: path.write_text('{"step": "one"}\n' + path.read_text()),
        "a FIFO": replace_by_fifo,
    },
    "checkpoints/last.pt": {
        "empty": lambda path: path.write_bytes(b""),
        "cut short": lambda path: path.write_bytes(path.read_bytes()[:5000]),
        "without a step": lambda path: change_state(path, lambda state: state.pop("step")),
        "a word for a step": lambda path: change_state(path, lambda state: state.update(step="one")),
        "a step that is none": lambda path: change_state(path, lambda state: state.update(step=-1)),
        "a list of weights": lambda path: change_state(path, lambda state: state.update(weights=[1])),
        "another model's": lambda path: change_state(path, lambda state: state["weights"].pop("fc.weight")),
        "another optimiser's": lambda path: change_state(path, lambda state: state.update(optimizer={"state": {}})),
        "of a longer run": lambda path: change_state(path, lambda state: state.update(step=7)),
        "objects": lambda path: torch.save({"arguments": argparse.Namespace(x=1)}, path),
        "a FIFO": replace_by_fifo,
    },
}


@pytest.mark.parametrize(
    ("name", "how"), [(name, how) for name in DAMAGE for how in DAMAGE[name]], ids=lambda text: text.replace(" ", "_")
)
def test_damage_to_a_run_folder_is_one_line_that_names_the_file_and_the_mend(fashion, run_dir, name, how):
    DAMAGE[name][how](run_dir / name)
    if name in ("metrics.jsonl", "checkpoints/last.pt"):  # a complete run needs them no more
        (run_dir / "summary.json").unlink()
    with pytest.raises(UserError) as error:
        train_here(*words(fashion, run_dir))
    message = str(error.value)
    assert message.startswith(f"run_dir: {run_dir / name} ") and message.isprintable(), message
    assert how == "a FIFO" or any(word in message for word in ("restore it", "remove it")), message
    assert "weights_only" not in message and len(message) < 600


def test_a_metrics_line_that_was_cut_short_is_forgotten(fashion, run_dir):
    (run_dir / "summary.json").unlink()
    record = run_dir / "metrics.jsonl"
    before = record.read_bytes()
    record.write_bytes(before + b'{"split": "tr')
    train_here(*words(fashion, run_dir))
    assert record.read_bytes() == before


# ------------------------------------------------------------------------------------------- a full disk


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints/last.pt", "events.out.tfevents"])
def test_a_full_disk_is_told_by_the_name_of_the_file_and_the_run_goes_on_when_there_is_room(
    fashion, complete, tmp_path, monkeypatch, name, capfd
):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=True)
    try:
        run_dir, train_step = disk / "run", Learner.train_step
        filler = disk / "filler"

        def fill_and_step(learner, batch):
            train_step(learner, batch)
            with pytest.raises(OSError) as full, open(filler, "wb") as file:
                file.write(bytes(8 << 20))
            assert full.value.errno == errno.ENOSPC
            for _ in range(100 if name == "events.out.tfevents" else 0):  # more than what is left of its page
                with suppress(OSError):
                    learner.run._writer.add_scalar("more", 0.0, 0)

        monkeypatch.setattr(Learner, "train_step", fill_and_step)
        saves = 1 if name == "checkpoints/last.pt" else 1000
        board = str(name == "events.out.tfevents").lower()
        more = ("--save_last_every", saves, "--tensorboard", board, "--epochs", 2)
        run_dir.mkdir()
        # The disk is full from the first step on; the first page of this file, 4096 bytes, is there, and taken or not.
        filled = {"step": 0, "filler": "x" * (3900 if name == "metrics.jsonl" else 0)}
        (run_dir / "metrics.jsonl").write_text(json.dumps(filled) + "\n")
        with pytest.raises(OSError) as error:
            train_here(*words(fashion, run_dir, *more))
        assert error.value.errno == errno.ENOSPC and error.value.filename.startswith(str(run_dir / name))
        assert "Traceback" not in capfd.readouterr().err
        filler.unlink()
        assert not list(disk.rglob("*.tmp"))
        monkeypatch.setattr(Learner, "train_step", train_step)
        train_here(*words(fashion, run_dir, *more))
        assert same_weights(*(checkpoint.checkpoint_path(run, 2) for run in (run_dir, complete)))
        lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        assert [line["step"] for line in lines if line.get("split") == "train"] == [1, 2, 3, 4, 5, 6]
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_tensorboard_forgets_the_steps_that_a_resumed_run_takes_again(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, steps in ((0, (1, 2, 3)), (1, (2,))):
        folder = RunFolder(str(tmp_path / "run"), of({"epochs": 1}), tensorboard=True)
        folder.rewind(start)
        for step in steps:
            folder.log("train", step, 0, loss=1.0)
        del folder
    found = events.EventAccumulator(str(tmp_path / "run"))
    found.Reload()
    assert [scalar.step for scalar in found.Scalars("train/loss")] == [1, 2]

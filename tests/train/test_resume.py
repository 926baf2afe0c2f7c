"""A training goes on where it was interrupted, to the bit, and only with the options that it began with."""

from __future__ import annotations

import pytest

from ckd_dist.core.checkpoint import load
from ckd_dist.core.errors import UserError
from tests.helpers.commands import command_line, count_lines, kill_and_repeat, run
from tests.helpers.training import metrics, options, same_weights, train_here


@pytest.mark.parametrize(
    "more",
    [
        ["--ema_decay", 0.9],
        [
            *("--optim.name", "lamb", "--optim.cycles", 3, "--accumulate", 3),
            *("--label_loss", "binary_cross_entropy", "--label_smoothing", 0.1),
        ],
        ["--data.batch_size", 96, "--data.repeats", 2, "--data.pair_mixup", 0.4, "--data.pair_cutmix", 1],
    ],
    ids=["average", "lamb in cycles", "views side by side and mixed"],
)
def test_a_killed_run_ends_with_the_weights_of_one_that_never_was(fashion, tmp_path, more):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ["--log_every", 1, "--save_last_every", 5, *more]
    run("ckd_dist.train_teacher", *options(fashion, whole, *more), nproc=2)
    free = ["--recompute"] if "lamb" in more else []  # which the weights are to be the same with
    command = command_line("ckd_dist.train_teacher", *options(fashion, killed, *more, *free), nproc=2)
    record = killed / "metrics.jsonl"
    kill_and_repeat(command, lambda: count_lines(record), kills=[3, 26], seed=1)
    for name in ("epoch_0001.pt", "epoch_0002.pt", "epoch_0003.pt", "last.pt"):
        assert same_weights(whole / "checkpoints" / name, killed / "checkpoints" / name), name
    losses = [[(line["step"], line["loss"], line["lr"]) for line in metrics(path)] for path in (whole, killed)]
    assert losses[0] == losses[1] and len(losses[0]) == 36
    assert metrics(whole, "val") == metrics(killed, "val")


def test_epochs_between_evaluations_change_nothing_but_what_is_known(fashion, tmp_path):
    every, last = tmp_path / "every", tmp_path / "last"
    train_here(*options(fashion, every))
    train_here(*options(fashion, last, "--val_every", 2))
    assert metrics(last, "val") == [metrics(every, "val")[epoch] for epoch in (1, 2)]
    for name in ("epoch_0001.pt", "epoch_0002.pt", "epoch_0003.pt"):
        assert same_weights(every / "checkpoints" / name, last / "checkpoints" / name), name
    first, *others = (load(last / "checkpoints" / f"epoch_000{epoch}.pt", "")["metadata"] for epoch in (1, 2, 3))
    assert first["evaluation"] == {}  # not that of other weights
    assert [each["evaluation"]["top1"] for each in others] == [line["top1"] for line in metrics(last, "val")]


def test_a_complete_run_is_left_alone_and_another_configuration_is_refused(fashion, tmp_path, capsys):
    arguments = options(fashion, tmp_path / "run", "--epochs", 1)
    train_here(*arguments)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").iterdir()}
    capsys.readouterr()
    train_here(*arguments, "--log_every", 7, "--data.workers", 2)
    assert "complete already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").iterdir()}
    with pytest.raises(UserError, match=r"run_dir: .* holds a run with optim\.lr 0\.05, not 0\.06"):
        train_here(*arguments, "--optim.lr", 0.06)

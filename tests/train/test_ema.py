"""An average of the weights, evaluated and kept instead of the last ones."""

from __future__ import annotations

import json

import pytest
import torch

from ckd_dist.core import checkpoint
from ckd_dist.train import learner
from tests.helpers.commands import run
from tests.helpers.training import metrics, options, train_here


def test_an_average_of_the_weights_is_what_is_evaluated_and_kept(fashion, tmp_path, monkeypatch):
    seen, train_step = [], learner.Learner.train_step

    def watched_step(self, batch):
        train_step(self, batch)
        seen.append({name: value.clone() for name, value in self.model.state_dict().items()})

    monkeypatch.setattr(learner.Learner, "train_step", watched_step)
    few = ["--data.train", fashion["holdout"], "--data.val", fashion["test"], "--epochs", 1, "--amp", "off"]
    train_here(*options(fashion, tmp_path / "run", *few, "--ema_decay", 0.4))
    path = tmp_path / "run" / "checkpoints" / "epoch_0001.pt"
    kept = checkpoint.load(path, "")["weights"]
    assert len(seen) == 3
    decay = 1 - 2 ** (-2 / 3)  # of the second step, on the way up to 0.4
    for name, value in kept.items():
        if value.is_floating_point():
            expected = 0.4 * (decay * seen[0][name] + (1 - decay) * seen[1][name]) + 0.6 * seen[2][name]
            torch.testing.assert_close(value, expected)
    done = run("ckd_dist.evaluate", "--data.val", fashion["test"], "--checkpoint", path, "--amp", "off")
    found, logged = json.loads(done.stdout.splitlines()[-1]), metrics(tmp_path / "run", "val")[-1]
    assert found["loss"] == pytest.approx(logged["loss"], rel=1e-5)
    assert logged["raw_loss"] != pytest.approx(logged["loss"], rel=1e-5)


def test_an_average_of_high_decay_over_few_steps_is_not_the_initial_weights(fashion, tmp_path):
    few = ["--data.train", fashion["train"], "--epochs", 2, "--optim.lr", 0.1]
    train_here(*options(fashion, tmp_path / "run", *few, "--ema_decay", 0.9999))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["top1"] > 0.8 * summary["raw_top1"] and summary["raw_top1"] > 30

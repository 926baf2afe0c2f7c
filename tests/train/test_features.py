"""Students that learn from the online teacher's feature maps too."""

from __future__ import annotations

import json

import pytest
import torch

from ckd_dist import distill
from ckd_dist.core import checkpoint
from ckd_dist.core.errors import UserError
from ckd_dist.nn.review import warm_up
from ckd_dist.train.learner import Learner
from ckd_dist.train.options import DistillConfig
from tests.helpers.commands import run
from tests.helpers.here import here, run_here
from tests.helpers.training import metrics, same_weights


def options(fashion, run_dir, *more):
    """Two epochs of three steps."""
    data = ["--data.train", fashion["test"], "--data.val", fashion["holdout"], "--data.batch_size", 64]
    model = ["--model.name", "resnet8", "--epochs", 2, "--optim.lr", 0.02, "--val_every", 2, "--log_every", 1]
    return [*data, *model, "--kd.feature_weight", 0.5, "--run_dir", run_dir, *more]


class Killed(Exception):
    """At some step."""


def test_a_run_that_was_killed_ends_with_the_weights_of_one_that_never_was(fashion, teacher, tmp_path, monkeypatch):
    train_step = Learner.train_step
    more = ["--teacher.run", teacher, "--save_last_every", 2, "--accumulate", 2, "--ema_decay", 0.5]
    more += ["--optim.clip_grad_norm", 1, "--optim.decay_norm_and_bias", "false", "--save_every", 1]

    def killed_step(self, batch):
        if self.step == 5:  # step 4 is saved
            raise Killed
        train_step(self, batch)

    here(distill, DistillConfig, *options(fashion, tmp_path / "whole", *more))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Learner, "train_step", killed_step)
        here(distill, DistillConfig, *options(fashion, tmp_path / "killed", *more))
    here(distill, DistillConfig, *options(fashion, tmp_path / "killed", *more, "--recompute"))
    whole, killed = tmp_path / "whole" / "checkpoints", tmp_path / "killed" / "checkpoints"
    for name in ("epoch_0001.pt", "epoch_0002.pt", "last.pt"):
        assert same_weights(whole / name, killed / name), name
    last = [checkpoint.load(folder / "last.pt", "")["connectors"] for folder in (whole, killed)]
    assert last[0].keys() == last[1].keys()
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])
    lines = [[(each["step"], each["loss"], each["feature"]) for each in metrics(p.parent)] for p in (whole, killed)]
    assert lines[0] == lines[1] and len(lines[0]) == 6
    for each in metrics(whole.parent):
        assert warm_up(each["epoch"], 2) == 1
        assert each["loss"] == pytest.approx(0.5 * each["ce"] + 0.5 * each["kd"] + 0.5 * each["feature"], rel=1e-5)
    kept = checkpoint.load(whole / "epoch_0002.pt", "")["weights"]
    assert not any("connectors" in name for name in kept) and "fc.weight" in kept


def test_ranks_train_a_student_that_evaluate_takes(fashion, teacher, tmp_path, capsys):
    more = ["--teacher.run", teacher, "--epochs", 1, "--amp", "off"]
    run("ckd_dist.distill", *options(fashion, tmp_path / "two", *more), nproc=2)
    path = tmp_path / "two" / "checkpoints" / "epoch_0001.pt"
    run_here("evaluate", "--data.val", fashion["holdout"], "--checkpoint", path, "--amp", "off")
    logged = metrics(tmp_path / "two", "val")[-1]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["loss"] == pytest.approx(logged["loss"], rel=1e-5)
    here(distill, DistillConfig, *options(fashion, tmp_path / "one", *more))
    # The same but for batch norm, that of the connectors too, which sees each rank's images alone.
    one, two = (metrics(tmp_path / name)[0] for name in ("one", "two"))
    assert two["feature"] == pytest.approx(one["feature"], rel=0.1) and one["feature"] > 0
    assert two["teacher_top1"] == one["teacher_top1"]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            ["--teacher.store", "S"],
            r"kd\.feature_weight compares feature maps, which no store holds: give distill --teac",
        ),
        ([], r"kd\.feature_weight compares feature maps, which no store holds"),
        (
            ["--teacher.run", "T", "--teacher.checkpoints", "[1,3]"],
            r"kd\.feature_weight .* of one checkpoint: name one",
        ),
        (["--teacher.run", "T", "--compile"], r"compile is not for kd\.feature_weight"),
        (["--teacher.run", "T", "--accumulate", 64], r"kd\.feature_weight: its layers normalise .* --data\.batch_size"),
        (
            ["--teacher.run", "T", "--model.name", "N"],
            r"kd\.feature_weight: \S*:flat has square feature maps of no resol",
        ),
    ],
)
def test_what_has_no_maps_to_compare_is_refused(fashion, teacher, tmp_path, more, expected):
    own = tmp_path / "own.py"
    own.write_text(
        "from torch import nn\n\ndef flat():\n    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 10))\n"
    )
    more = [{"T": teacher, "N": f"{own}:flat"}.get(word, word) for word in more]
    with pytest.raises(UserError, match=expected):
        here(distill, DistillConfig, *options(fashion, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()

"""Short trainings of teachers, and what any training leaves in its folder."""

from __future__ import annotations

import json

import torch

from ckd_dist import train_teacher
from ckd_dist.core import checkpoint
from ckd_dist.core.options import load_config
from ckd_dist.train.options import TrainTeacherConfig


def options(fashion, run_dir, *more):
    """The command line of train_teacher for three epochs, later options winning."""
    data = ["--data.train", fashion["train"], "--data.val", fashion["holdout"], "--data.batch_size", 100]
    model = ["--model.name", "resnet8", "--epochs", 3, "--optim.lr", 0.05, "--save_every", 1, "--run_dir", run_dir]
    return [str(word) for word in [*data, *model, *more]]


def train_here(*arguments):
    """`python -m ckd_dist.train_teacher` in this process."""
    train_teacher.main(load_config(TrainTeacherConfig, [str(word) for word in arguments]))


def metrics(run_dir, split="train"):
    """The lines of metrics.jsonl that are of `split`."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def summary(run_dir):
    """What summary.json holds."""
    return json.loads((run_dir / "summary.json").read_text())


def same_weights(a, b):
    """Whether two checkpoint files hold the same weights, bit for bit."""
    first, second = (checkpoint.load(path, "")["weights"] for path in (a, b))
    return all(torch.equal(first[name], second[name]) for name in first)

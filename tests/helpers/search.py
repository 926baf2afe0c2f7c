"""Short searches."""

from __future__ import annotations

import torch

from ckd_dist.core import checkpoint
from ckd_dist.core.options import load_config
from ckd_dist.core.results import read_table
from ckd_dist.search import __main__ as search
from ckd_dist.search.options import SearchConfig


def options(fashion, store, run_dir, *more):
    """The command line of a search among students of two epochs, later options winning."""
    images = ["--data.train", fashion["train"], "--data.val", fashion["holdout"], "--data.batch_size", 64]
    student = ["--model.name", "resnet8", "--epochs", 2, "--optim.lr", 0.05, "--optim.warmup_epochs", 1]
    return [str(word) for word in [*images, *student, "--teacher.store", store, "--run_dir", run_dir, *more]]


def search_here(*words):
    """`python -m ckd_dist.search` in this process; the rows of results.csv, none of a part."""
    config = load_config(SearchConfig, list(words))
    search.main(config)
    return read_table(search.Path(config.run_dir) / "results.csv", "run_dir") if config.part is None else []


def weights(run_dir, epoch=2):
    """Weights after an epoch, by name."""
    return checkpoint.load(checkpoint.checkpoint_path(run_dir, epoch), "")["weights"]


def same(a, b):
    """Whether weights are equal, bit for bit."""
    return all(torch.equal(a[name], b[name]) for name in a)

"""Several processes of the examples train the student that as many processes of distill train."""

from __future__ import annotations

import torch

from ckd_dist.core import checkpoint
from tests.helpers.commands import run
from tests.helpers.examples import distilling, example


def test_two_processes_train_the_student_of_distill_in_two_processes(fashion, store, tmp_path):
    run("ckd_dist.distill", *distilling(fashion, store, tmp_path / "run"), nproc=2)
    theirs = checkpoint.load(tmp_path / "run" / "checkpoints" / "epoch_0002.pt", "")["weights"]
    example("hf_trainer", fashion, store, tmp_path / "hf.pt", "--workers", 0, nproc=2)
    example("lightning_module", fashion, store, tmp_path / "lightning.pt", "--workers", 0, "--devices", 2)
    for name in ("hf", "lightning"):
        ours = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert all(torch.equal(ours[key], theirs[key]) for key in {**ours, **theirs})

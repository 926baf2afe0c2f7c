"""Trainings and evaluations of several processes: the same numbers as of one, and one end for all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import numpy as np
import psutil
import pytest
import torch

from ckd_dist.data.beton import open_beton
from ckd_dist.data.loader import BetonLoader
from ckd_dist.data.options import LoaderConfig
from ckd_dist.nn.models import load_model
from tests.helpers.commands import ENVIRONMENT, ROOT, command_line, count_lines, run
from tests.helpers.training import metrics, options


def test_evaluation_counts_each_image_once_whatever_the_world_size(fashion, teacher):
    arguments = ("--data.val", fashion["holdout"], "--checkpoint", teacher / "checkpoints" / "epoch_0003.pt")
    found = []
    for nproc, batch_size in ((0, 64), (3, 7)):
        done = run("ckd_dist.evaluate", *arguments, "--data.batch_size", batch_size, "--amp", "off", nproc=nproc)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert found[0]["images"] == 301
    for other in found[1:]:
        assert (other["top1"], other["top5"]) == (found[0]["top1"], found[0]["top5"])
        assert other["loss"] == pytest.approx(found[0]["loss"], rel=1e-6)
    correct = found[0]["top1"] * 3.01
    assert correct == pytest.approx(round(correct))


def test_evaluation_may_look_at_mirror_images_too(fashion, teacher):
    path = teacher / "checkpoints" / "epoch_0003.pt"
    arguments = ("--data.val", fashion["holdout"], "--checkpoint", path, "--amp", "off", "--mirror")
    found = json.loads(run("ckd_dist.evaluate", *arguments).stdout.splitlines()[-1])
    model, metadata = load_model(path, "checkpoint")
    info = open_beton(fashion["holdout"], "data.val")
    right, loader = [], BetonLoader.for_evaluation(info, LoaderConfig(), metadata, torch.device("cpu"))
    for batch in loader.batches(np.arange(info.count)):
        both = [model.eval()(images).detach() for images in (batch.images, batch.images.flip(3))]
        right += [batch.top1((both[0] + both[1]).argmax(dim=1))]
    assert found["top1"] == pytest.approx(float(torch.cat(right).mean()), abs=1e-4)
    assert found["top1"] != json.loads(run("ckd_dist.evaluate", *arguments[:-1]).stdout.splitlines()[-1])["top1"]


@pytest.mark.parametrize(
    ("cases", "more"),
    [
        ([(0, 1), (0, 4), (3, 1), (3, 5)], []),  # 3 does not divide the batch of 100
        ([(0, 1), (2, 1), (3, 5)], ["--data.batch_size", 96, "--data.repeats", 2, "--data.pair_cutmix", 1]),
    ],
    ids=["plain", "pairs of repeated images"],
)
def test_the_numbers_depend_neither_on_the_world_size_nor_on_the_parts_of_a_batch(fashion, tmp_path, cases, more):
    losses = {}
    for nproc, accumulate in cases:
        path = tmp_path / f"{nproc}_{accumulate}"
        common = ["--model.name", "linear", "--amp", "off", "--log_every", 1, "--epochs", 2, "--optim.lr", 0.01]
        common += ["--accumulate", accumulate]
        run(str(ROOT / "tests/programs/train_linear.py"), *options(fashion, path, *common, *more), nproc=nproc)
        losses[nproc, accumulate] = [line["loss"] for line in metrics(path)]
    one, *others = losses.values()
    for other in others:
        assert other == pytest.approx(one, rel=1e-4)


def test_a_rank_that_dies_takes_the_others_down(fashion, tmp_path):
    command = command_line("ckd_dist.train_teacher", *options(fashion, tmp_path / "run", "--epochs", 1000), nproc=2)
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while count_lines(tmp_path / "run" / "metrics.jsonl") < 2:
        assert process.poll() is None
        time.sleep(0.05)
    ranks = psutil.Process(process.pid).children(recursive=True)
    victim = next(rank for rank in ranks if "ckd_dist.train_teacher" in " ".join(rank.cmdline()))
    os.kill(victim.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert psutil.wait_procs(ranks, timeout=1)[1] == []

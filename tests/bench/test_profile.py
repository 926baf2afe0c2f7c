"""Shares of a device's time, of spans whose shares are known, and of a training."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ckd_dist.bench.profile import Span, on_device, shares
from tests.helpers.commands import ENVIRONMENT, ROOT


def test_overlapping_kernels_count_once_and_copies_only_where_no_kernel_runs():
    warm_up = [Span("kernel a", 0, 100)]
    spans = [Span("kernel a", 100, 130), Span("kernel b", 120, 150), Span("Memcpy HtoD", 140, 160)]
    spans += [Span("Memset", 170, 180), Span("kernel a", 190, 200)]
    found = shares([*spans, *warm_up])
    assert found["seconds"] == pytest.approx(100 / 1e6)
    assert found["kernels"] == pytest.approx(60) and found["copies alone"] == pytest.approx(20)
    assert found["gaps"] == pytest.approx(20)
    assert found["most"] == pytest.approx({"kernel a": 40, "kernel b": 30, "Memcpy HtoD": 20, "Memset": 10})
    assert shares([]) == {"seconds": 0.0}


def test_a_training_is_profiled(fashion, tmp_path):
    words = ["--data.train", fashion["holdout"], "--model.name", "resnet8", "--epochs", "2", "--amp", "off"]
    command = [sys.executable, "-m", "ckd_dist.bench.profile", tmp_path, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert 0 < found["kernels"] <= 100 and found["kernels"] + found["gaps"] == pytest.approx(100)
    names = {span.name for span in on_device(tmp_path / "trace.json")}
    assert any("convolution" in name or "conv2d" in name for name in names)

"""What only a GPU can show; on a machine with one, the other tests too run on it, since commands take what is there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import run
from test_training import metrics
from test_views import EVERYTHING, RRC

from ckd_dist import data, engine, models
from ckd_dist.config import LoaderConfig
from ckd_dist.loader import BetonLoader

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def batches(path, device, ids):
    """The batches of a mixing loader with rows, as lists of tensors on the CPU."""
    info = data.read_info(path, "")
    loader = BetonLoader(
        info, LoaderConfig(), replace(RRC, **EVERYTHING), batch_size=16, image_size=48, device=torch.device(device)
    )

    def rows(samples, view):
        return np.repeat(samples.astype(np.uint8)[:, None, None], 4, axis=2)

    for batch in loader.batches(ids, 1, rows):
        if device == "cuda":
            torch.cuda._sleep(10_000_000)  # the device lags behind: buffers that were reused too early would show
        yield [t.cpu() for t in (batch.images, batch.labels, batch.ids, *batch.mixed, batch.teacher_records)]


def test_a_batch_on_the_gpu_is_that_of_the_cpu(photographs):
    ids = np.tile(np.arange(101), 10)
    for ours, theirs in zip(batches(photographs, "cuda", ids), batches(photographs, "cpu", ids), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_batch_is_copied_before_its_buffers_are_written_again(photographs, monkeypatch):
    start_copy = BetonLoader._start_copy

    def late_copy(self, arrays):
        with torch.cuda.stream(self._copy_stream):
            torch.cuda._sleep(50_000_000)
        return start_copy(self, arrays)

    ids = np.tile(np.arange(101), 10)
    expected = list(batches(photographs, "cpu", ids))
    monkeypatch.setattr(BetonLoader, "_start_copy", late_copy)
    for ours, theirs in zip(batches(photographs, "cuda", ids), expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_logits_on_the_gpu_are_near_those_of_the_cpu():
    torch.manual_seed(0)
    model, images = models.build_model("resnet18", 100), torch.randn(32, 3, 64, 64)
    found = {}
    for device in ("cpu", "cuda"):
        on_device = engine.to_device(model, torch.device(device))
        found[device] = engine.forward_logits(on_device, images.to(device), "bfloat16").cpu()
    error = (found["cuda"] - found["cpu"]).norm() / found["cpu"].norm()
    assert error < 2e-2  # bfloat16


def test_two_ranks_that_share_a_gpu_train(photographs, tmp_path):
    options = ["--data.train", photographs, "--data.image_size", 32, "--data.batch_size", 20, "--model.name", "resnet8"]
    run("ckd_dist.train_teacher", *options, "--epochs", 2, "--log_every", 1, "--run_dir", tmp_path / "run", nproc=2)
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert len(losses) == 10 and np.isfinite(losses).all()

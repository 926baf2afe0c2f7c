"""What only a GPU can show; on a machine with one, the other tests too run on it, since commands take what is there."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch

from ckd_dist.data import dataset
from ckd_dist.data.loader import BetonLoader
from ckd_dist.data.options import LoaderConfig
from ckd_dist.nn import forward, models
from tests.helpers.commands import ENVIRONMENT, ROOT, command_line, count_lines, run
from tests.helpers.training import metrics
from tests.helpers.views import EVERYTHING, RRC

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def batches(path, device, ids):
    """The batches of a mixing loader with rows, as lists of tensors on the CPU."""
    info = dataset.read_info(path, "")
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
        on_device = forward.to_device(model, torch.device(device))
        found[device] = forward.forward_logits(on_device, images.to(device), "bfloat16").cpu()
    error = (found["cuda"] - found["cpu"]).norm() / found["cpu"].norm()
    assert error < 2e-2  # bfloat16


def test_two_ranks_that_share_a_gpu_train(photographs, tmp_path):
    options = ["--data.train", photographs, "--data.image_size", 32, "--data.batch_size", 20, "--model.name", "resnet8"]
    more = ["--epochs", 2, "--log_every", 1, "--run_dir", tmp_path / "run"]
    done = run("ckd_dist.train_teacher", *options, *more, nproc=2)
    assert "gloo instead of nccl, which is faster: ranks 0 and 1 share a GPU" in done.stdout
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert len(losses) == 10 and np.isfinite(losses).all()


def test_a_rank_that_leaves_alone_ends_a_job_of_ranks_that_see_one_gpu_each(photographs, tmp_path):
    options = ["--data.train", photographs, "--data.image_size", 32, "--data.batch_size", 20, "--model.name", "resnet8"]
    words = [*options, "--epochs", 100_000, "--log_every", 1, "--run_dir", tmp_path / "run"]
    command = command_line("ckd_dist.train_teacher", *words, nproc=min(2, torch.cuda.device_count()))
    at = command.index("-m", 2)
    command[at:at] = ["--no-python", "sh", "-c", 'CUDA_VISIBLE_DEVICES=$LOCAL_RANK exec "$@"', "sh", sys.executable]
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while count_lines(tmp_path / "run" / "metrics.jsonl") < 2:
        assert process.poll() is None
        time.sleep(0.1)
    ranks = psutil.Process(process.pid).children(recursive=True)
    next(rank for rank in ranks if rank.environ().get("RANK") == "0").send_signal(signal.SIGUSR2)
    out, _ = process.communicate(timeout=60)
    assert "stopped by SIGUSR2 and saved" in out and "gloo" not in out
    assert not psutil.wait_procs(ranks, timeout=10)[1]

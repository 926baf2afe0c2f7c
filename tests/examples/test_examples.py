"""The examples of other people's loops run, and train the student that distill trains."""

from __future__ import annotations

import pytest
import torch

from ckd_dist import distill
from ckd_dist.core import checkpoint
from ckd_dist.train.options import DistillConfig
from tests.helpers.commands import ROOT, run
from tests.helpers.examples import distilling, example
from tests.helpers.here import here
from tests.helpers.shared import make_once
from tests.helpers.training import metrics


@pytest.fixture(scope="session")
def reference(tmp_path_factory, fashion, store):
    """The run that the examples are to repeat."""

    def make(folder):
        here(distill, DistillConfig, *distilling(fashion, store, folder / "run"))

    return make_once(tmp_path_factory, "reference", make) / "run"


@pytest.mark.parametrize("name", ["plain_pytorch", "timm_loop", "lightning_module", "hf_trainer"])
def test_an_example_has_the_loss_of_distill_at_every_step(name, fashion, store, reference, tmp_path):
    found = example(name, fashion, store, tmp_path / "student.pt", "--workers", 1)
    expected = [line["loss"] for line in metrics(reference)]
    assert len(found) == len(expected) == 36
    # distill divides a sum in float64 where the loop takes a mean in float32, and seven digits are printed.
    assert found == pytest.approx(expected, rel=1e-6)
    ours = torch.load(tmp_path / "student.pt", weights_only=True)
    theirs = checkpoint.load(reference / "checkpoints" / "epoch_0002.pt", "")["weights"]
    if name != "timm_loop":  # which keeps a moving average
        assert all(torch.equal(ours[name], theirs[name]) for name in {**ours, **theirs})


def test_a_network_of_timm_learns(fashion, store, tmp_path):
    found = example("timm_loop", fashion, store, tmp_path / "student.pt", "--workers", 0, "--model", "test_resnet")
    assert len(found) == 36 and sum(found[-9:]) < 0.7 * sum(found[:9])


def test_an_example_refuses_other_images_in_its_last_line(fashion, store, tmp_path):
    options = ("--images", fashion["holdout"], "--store", store, "--out", tmp_path / "student.pt")
    done = run(str(ROOT / "examples" / "plain_pytorch.py"), *options, status=1)
    assert done.stderr.splitlines()[-1].endswith("UserError: views: the store has 1201 images, these are 301")

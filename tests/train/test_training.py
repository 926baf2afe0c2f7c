"""Training a teacher: what it leaves, every kind of it, and what ends it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from ckd_dist import evaluate, train_teacher
from ckd_dist.core import checkpoint
from ckd_dist.core.errors import TrainingError
from ckd_dist.core.options import load_config
from ckd_dist.data import dataset, order
from ckd_dist.data.loader import BetonLoader
from ckd_dist.data.options import LoaderConfig, TrainDataConfig
from ckd_dist.nn import losses, models
from ckd_dist.train.options import EvaluateConfig
from tests.helpers.training import metrics, options, train_here


def test_a_run_leaves_its_record(teacher):
    assert sorted(path.name for path in teacher.iterdir()) == [
        ".lock", "checkpoints", "config.yaml", "env.json", "lineage.json", "metrics.jsonl", "summary.json",
    ]  # fmt: skip
    names = sorted(path.name for path in (teacher / "checkpoints").iterdir())
    assert names == ["epoch_0001.pt", "epoch_0002.pt", "epoch_0003.pt", "last.pt"]
    summary = json.loads((teacher / "summary.json").read_text())
    assert {
        "top1",
        "top5",
        "train_seconds",
        "images_per_s",
        "peak_memory_bytes",
        "data_wait_fraction",
    } <= summary.keys()
    assert summary["top1"] == metrics(teacher, "val")[-1]["top1"] > 50  # five times chance
    env = json.loads((teacher / "env.json").read_text())
    assert env["world_size"] == 2 and env["versions"]["torch"] and "ckd_dist.train_teacher" in " ".join(env["command"])
    loaded = torch.load(teacher / "checkpoints" / "epoch_0002.pt", weights_only=True)
    assert loaded["metadata"]["epoch"] == 2 and loaded["metadata"]["model"] == "resnet8"


def test_a_logit_that_is_not_a_number_is_refused_not_counted_as_the_largest(fashion, teacher, tmp_path):
    state = checkpoint.load(teacher / "checkpoints" / "epoch_0003.pt", "")
    state["weights"]["fc.bias"][4] = float("nan")
    checkpoint.save(tmp_path / "epoch_0003.pt", state)
    words = ["--data.val", fashion["holdout"], "--checkpoint", tmp_path / "epoch_0003.pt"]
    with pytest.raises(TrainingError, match=r"epoch_0003\.pt: its logits of .*holdout\.beton are not finite"):
        evaluate.main(load_config(EvaluateConfig, [str(word) for word in words]))


def test_quasi_random_order_trains_and_warns_of_classes_that_lie_together(
    photographs, other_photographs, fashion, tmp_path, capsys
):
    few = ["--epochs", 1, "--log_every", 1, "--data.order", "quasi_random", "--data.image_size", 28]
    train_here(*options({"train": photographs, "holdout": other_photographs}, tmp_path / "sorted", *few))
    assert "images of a class lie together" in capsys.readouterr().out
    train_here(*options(fashion, tmp_path / "run", *few))
    assert "lie together" not in capsys.readouterr().out and len(metrics(tmp_path / "run")) == 12


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_checkpoint(fashion, tmp_path):
    explosive = ("--optim.lr", 1000, "--optim.weight_decay", 10)  # each step multiplies the weights by -9999
    with pytest.raises(TrainingError, match=r"not finite at step \d+: .* no checkpoint was saved yet"):
        train_here(*options(fashion, tmp_path / "first", *explosive))
    steep = ("--optim.schedule", "multistep", "--optim.milestones", str(30 * [1]), "--optim.gamma", 10)
    arguments = options(fashion, tmp_path / "later", *steep)
    with pytest.raises(TrainingError, match=r"not finite at step 1[2-9]: .* checkpoint is .*(last|epoch_0001)\.pt"):
        train_here(*arguments)
    for path in (tmp_path / "later" / "checkpoints").iterdir():
        assert all(torch.isfinite(v).all() for v in checkpoint.load(path, "")["weights"].values())


@pytest.mark.parametrize(
    "more",
    [
        ["--amp", "float16", "--optim.clip_grad_norm", "1"],
        ["--amp", "off", "--optim.name", "lamb", "--label_loss", "binary_cross_entropy", "--optim.cycles", "2"],
        ["--amp", "off", "--optim.name", "adamw", "--optim.lr", "0.002", "--optim.decay_norm_and_bias", "false"],
        [
            "--optim.schedule",
            "linear",
            "--optim.warmup_epochs",
            "0.5",
            "--label_smoothing",
            "0.1",
            "--tensorboard",
            "true",
        ],
    ],
    ids=["float16", "lamb", "adamw", "smoothing"],
)
def test_every_kind_of_training_learns(fashion, tmp_path, more):
    if "--tensorboard" in more:
        pytest.importorskip("tensorboard")
    images = ["--data.train", fashion["holdout"], "--data.val", fashion["test"]]  # few: float16 is slow on a CPU
    train_here(*options(fashion, tmp_path / "run", *images, "--data.batch_size", 50, "--epochs", 4, *more))
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert losses[-1] < 0.85 * losses[0]
    if "--tensorboard" in more:
        assert list((tmp_path / "run").glob("events.out.tfevents.*"))


def test_a_compiled_model_trains(fashion, tmp_path, monkeypatch):
    # What was compiled for another instruction set of this processor is not for a torch that is told to use less.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    losses = {}
    for compiled in ("true", "false"):
        images = ["--data.train", fashion["holdout"], "--data.val", fashion["test"]]
        more = [*images, "--epochs", 1, "--log_every", 1, "--amp", "off"]
        train_here(*options(fashion, tmp_path / compiled, *more, "--compile", compiled))
        losses[compiled] = [line["loss"] for line in metrics(tmp_path / compiled)]
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-3)


def test_a_teacher_learns_both_labels_of_a_mixed_image(fashion, tmp_path):
    images = ["--data.train", fashion["holdout"], "--data.val", fashion["test"]]
    more = [*images, "--data.mixup", 1, "--epochs", 1, "--log_every", 1, "--amp", "off"]
    train_here(*options(fashion, tmp_path / "run", *more))
    info, device = dataset.read_info(fashion["holdout"], ""), torch.device("cpu")
    recipe = replace(dataset.train_recipe(TrainDataConfig(train=""), info), mixup=1.0)
    loader = BetonLoader(info, LoaderConfig(), recipe, batch_size=100, image_size=28, device=device)
    first = order.train_ids(order.shuffled_ids(info.count, 0, 0), 100)[:100]
    (batch,) = loader.batches(first, train_teacher.FIRST_VIEW)
    torch.manual_seed(0)
    logits = models.build_model("resnet8", 10)(batch.images)
    expected = losses.cross_entropy(logits, batch.labels, mixed=batch.mixed).mean().item()
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert losses.cross_entropy(logits, batch.labels).mean().item() != pytest.approx(expected, rel=1e-3)

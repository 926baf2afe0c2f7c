"""The train loop: exact resume after any kill, exact evaluation, the same numbers for any world size."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import replace

import psutil
import pytest
import torch

from ckd_dist import evaluate, train_teacher
from ckd_dist.core import checkpoint
from ckd_dist.core.errors import TrainingError, UserError
from ckd_dist.core.options import load_config
from ckd_dist.data import dataset, order
from ckd_dist.data.loader import BetonLoader
from ckd_dist.data.options import LoaderConfig, TrainDataConfig
from ckd_dist.nn import losses, models
from ckd_dist.train import learner
from ckd_dist.train.options import EvaluateConfig
from tests.helpers.commands import ENVIRONMENT, ROOT, command_line, count_lines, kill_and_repeat, run
from tests.helpers.training import metrics, options, same_weights, train_here


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


def test_a_killed_run_ends_with_the_weights_of_one_that_never_was(fashion, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ["--log_every", 1, "--save_last_every", 5, "--ema_decay", 0.9]
    run("ckd_dist.train_teacher", *options(fashion, whole, *more), nproc=2)
    command = command_line("ckd_dist.train_teacher", *options(fashion, killed, *more), nproc=2)
    record = killed / "metrics.jsonl"
    kill_and_repeat(command, lambda: count_lines(record), kills=[3, 26], seed=1)
    for name in ("epoch_0001.pt", "epoch_0002.pt", "epoch_0003.pt", "last.pt"):
        assert same_weights(whole / "checkpoints" / name, killed / "checkpoints" / name), name
    losses = [[(line["step"], line["loss"], line["lr"]) for line in metrics(path)] for path in (whole, killed)]
    assert losses[0] == losses[1] and len(losses[0]) == 36
    assert metrics(whole, "val") == metrics(killed, "val")


def test_an_average_of_the_weights_is_what_is_evaluated_and_kept(fashion, tmp_path, monkeypatch):
    seen, train_step = [], learner.Learner.train_step

    def watched_step(self, batch):
        train_step(self, batch)
        seen.append({name: value.clone() for name, value in self.model.state_dict().items()})

    monkeypatch.setattr(learner.Learner, "train_step", watched_step)
    few = ["--data.train", fashion["holdout"], "--data.val", fashion["test"], "--epochs", 1, "--amp", "off"]
    train_here(*options(fashion, tmp_path / "run", *few, "--ema_decay", 0.4))
    path = tmp_path / "run" / "checkpoints" / "epoch_0001.pt"
    kept = checkpoint.load(path, "")["weights"]
    assert len(seen) == 3
    decay = 1 - 2 ** (-2 / 3)  # of the second step, on the way up to 0.4
    for name, value in kept.items():
        if value.is_floating_point():
            expected = 0.4 * (decay * seen[0][name] + (1 - decay) * seen[1][name]) + 0.6 * seen[2][name]
            torch.testing.assert_close(value, expected)
    done = run("ckd_dist.evaluate", "--data.val", fashion["test"], "--checkpoint", path, "--amp", "off")
    found, logged = json.loads(done.stdout.splitlines()[-1]), metrics(tmp_path / "run", "val")[-1]
    assert found["loss"] == pytest.approx(logged["loss"], rel=1e-5)
    assert logged["raw_loss"] != pytest.approx(logged["loss"], rel=1e-5)


def test_an_average_of_high_decay_over_few_steps_is_not_the_initial_weights(fashion, tmp_path):
    few = ["--data.train", fashion["train"], "--epochs", 2, "--optim.lr", 0.1]
    train_here(*options(fashion, tmp_path / "run", *few, "--ema_decay", 0.9999))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["top1"] > 0.8 * summary["raw_top1"] and summary["raw_top1"] > 30


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


def test_a_complete_run_is_left_alone_and_another_configuration_is_refused(fashion, tmp_path, capsys):
    arguments = options(fashion, tmp_path / "run", "--epochs", 1)
    train_here(*arguments)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").iterdir()}
    capsys.readouterr()
    train_here(*arguments, "--log_every", 7, "--data.workers", 2)
    assert "complete already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").iterdir()}
    with pytest.raises(UserError, match=r"run_dir: .* holds a run with optim\.lr 0\.05, not 0\.06"):
        train_here(*arguments, "--optim.lr", 0.06)


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


def test_the_numbers_do_not_depend_on_the_world_size(fashion, tmp_path):
    losses = {}
    for nproc in (0, 3):  # 3 does not divide the batch of 100
        path = tmp_path / str(nproc)
        more = ["--model.name", "linear", "--amp", "off", "--log_every", 1, "--epochs", 2, "--optim.lr", 0.01]
        run(str(ROOT / "tests/programs/train_linear.py"), *options(fashion, path, *more), nproc=nproc)
        losses[nproc] = [line["loss"] for line in metrics(path)]
    assert losses[3] == pytest.approx(losses[0], rel=1e-4)


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


@pytest.mark.parametrize(
    "more",
    [
        ["--amp", "float16", "--optim.clip_grad_norm", "1"],
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
    ids=["float16", "adamw", "smoothing"],
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

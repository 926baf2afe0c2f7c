"""Distillation: cached and online teachers give the same student; killed runs resume; photographs work."""

from __future__ import annotations

import json

import pytest
import torch

from ckd_dist import cache_logits, distill, train_teacher
from ckd_dist.core import checkpoint
from ckd_dist.core.errors import UserError
from ckd_dist.store.options import CacheConfig
from ckd_dist.train.options import DistillConfig, TrainTeacherConfig
from tests.helpers.commands import command_line, count_lines, kill_and_repeat, run
from tests.helpers.here import here
from tests.helpers.stores import VIEWS
from tests.helpers.training import metrics, summary


def options(fashion, run_dir, *more):
    data = ["--data.train", fashion["train"], "--data.val", fashion["holdout"], "--data.batch_size", 64]
    model = ["--model.name", "resnet8", "--epochs", 3, "--optim.lr", 0.05, "--optim.warmup_epochs", 1]
    loss = ["--kd.alpha", 0.5, "--kd.temperature", 4, "--log_every", 1]
    return [str(word) for word in [*data, *model, *loss, "--run_dir", run_dir, *more]]


def test_cached_and_online_teachers_give_the_same_student(fashion, teacher, store, tmp_path):
    cached, online = tmp_path / "cached", tmp_path / "online"
    run(
        "ckd_dist.distill",
        *options(fashion, cached, "--teacher.store", store, "--teacher.checkpoints", "[1,3]"),
        nproc=2,
    )
    more = ["--teacher.run", teacher, "--teacher.checkpoints", "[1,3]", "--data.views", VIEWS]
    run("ckd_dist.distill", *options(fashion, online, *more), nproc=2)
    a, b = metrics(cached), metrics(online)
    assert len(a) == len(b) == 3 * 18 and a[0]["step"] == 1
    assert max(abs(x["loss"] - y["loss"]) for x, y in zip(a[:50], b[:50], strict=True)) < 2e-3
    assert abs(summary(cached)["top1"] - summary(online)["top1"]) < 0.5
    # The loss is the paper's, and the teacher answers for the images that the student sees.
    assert all(line["loss"] == pytest.approx(0.5 * line["ce"] + 0.5 * line["kd"], rel=1e-5) for line in a)
    teacher_top1 = sum(line["teacher_top1"] for line in a) / len(a)
    assert teacher_top1 > summary(teacher)["top1"] - 10


def test_cached_and_online_teachers_agree_on_mixed_images(fashion, teacher, tmp_path):
    views = ["--data.mixup", 0.4, "--data.cutmix", 1, "--data.erase", 0.3, "--data.color_jitter", 0.3]
    cache = ["--data.train", fashion["train"], "--teacher.run", teacher, "--teacher.checkpoints", "[3]"]
    here(cache_logits, CacheConfig, *cache, "--store", tmp_path / "store", *views)
    cached = ["--teacher.store", tmp_path / "store"]  # the views are the store's, unasked
    online = ["--teacher.run", teacher, "--data.views", 1, *views]
    for name, more in (("cached", cached), ("online", online)):
        here(distill, DistillConfig, *options(fashion, tmp_path / name, *more, "--epochs", 1, "--kd.loss", "dkd"))
    a, b = (metrics(tmp_path / name) for name in ("cached", "online"))
    for key in ("loss", "ce", "kd", "top1", "teacher_top1"):
        assert [line[key] for line in a] == pytest.approx([line[key] for line in b], abs=5e-3), key
    assert 0 < a[0]["teacher_top1"] < 100 and a[0]["ce"] > 0
    with pytest.raises(UserError, match=r"data\.mixup: the store holds views with mixup 0\.4, not 0\.0"):
        here(distill, DistillConfig, *options(fashion, tmp_path / "none", *cached, "--data.mixup", 0))


@pytest.mark.slow  # as test_resume.py, of the same loop
def test_a_killed_distillation_ends_with_the_weights_of_one_that_never_was(fashion, store, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ["--teacher.store", store, "--teacher.checkpoints", "[2]", "--save_last_every", 7]
    run("ckd_dist.distill", *options(fashion, whole, *more))
    command = command_line("ckd_dist.distill", *options(fashion, killed, *more))
    kill_and_repeat(command, lambda: count_lines(killed / "metrics.jsonl"), kills=[33], seed=3)
    first, second = (checkpoint.load(p / "checkpoints" / "epoch_0003.pt", "")["weights"] for p in (whole, killed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [line["loss"] for line in metrics(whole)] == [line["loss"] for line in metrics(killed)]


def test_views_beyond_the_cached_ones_wrap_around_and_the_log_says_so_once(fashion, store, tmp_path, capsys):
    here(distill, DistillConfig, *options(fashion, tmp_path / "run", "--teacher.store", store))
    out = capsys.readouterr().out
    assert out.count("2 views for 3 epochs: epoch 3 sees the first view again") == 1
    assert "teacher: cached logits of epoch 3" in out


@pytest.mark.parametrize("kind", ["dkd", "dist", "standardized"])
def test_students_learn_by_other_losses_too(fashion, store, tmp_path, kind):
    more = ["--teacher.store", store, "--kd.loss", kind, "--epochs", 2]
    here(distill, DistillConfig, *options(fashion, tmp_path / "run", *more))
    lines = metrics(tmp_path / "run")
    assert lines[-1]["kd"] < 0.8 * lines[0]["kd"] and lines[-1]["top1"] > 20


def test_a_plain_student_needs_no_teacher(fashion, tmp_path):
    here(distill, DistillConfig, *options(fashion, tmp_path / "run", "--epochs", 1))
    assert "kd" not in metrics(tmp_path / "run")[0] and summary(tmp_path / "run")["top1"] > 10
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["epoch_0001.pt", "last.pt"]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--data.view_seed", 3], r"data\.view_seed is 3, the store holds views of seed 0"),
        (["--data.views", 5], r"data\.views is 5, .* holds 2 views"),
        (["--data.flip", "false"], r"data\.flip: the store holds views with flip 0\.5, not 0\.0: leave it out"),
        (["--teacher.checkpoints", "[4]"], r"teacher\.checkpoints: no checkpoint of epoch 4; there are 1, 2, 3"),
    ],
)
def test_options_that_contradict_the_store_are_refused(fashion, store, tmp_path, more, expected):
    with pytest.raises(UserError, match=expected):
        here(distill, DistillConfig, *options(fashion, tmp_path / "run", "--teacher.store", store, *more))
    assert not (tmp_path / "run").exists()


def test_an_online_teacher_of_another_resolution_is_refused(fashion, teacher, tmp_path):
    with pytest.raises(UserError, match=r"teacher\.run: .* image_size 28, the student gets 40: cache"):
        here(
            distill,
            DistillConfig,
            *options(fashion, tmp_path / "run", "--teacher.run", teacher, "--data.image_size", 40),
        )


def test_an_online_teacher_is_not_shown_small_images(fashion, teacher, tmp_path):
    more = ["--teacher.run", teacher, "--data.start_image_size", 20]
    with pytest.raises(UserError, match=r"data\.start_image_size is not for an online teacher"):
        here(distill, DistillConfig, *options(fashion, tmp_path / "run", *more))


def test_photographs_of_different_sizes_work_from_teacher_to_student(photographs, other_photographs, tmp_path):
    data = ["--data.train", photographs, "--data.val", other_photographs, "--data.batch_size", 16]
    common = [*data, "--epochs", 2, "--optim.lr", 0.02, "--amp", "off"]
    run_dir, store, student = tmp_path / "teacher", tmp_path / "store", tmp_path / "student"
    here(
        train_teacher,
        TrainTeacherConfig,
        *common,
        "--data.image_size",
        64,
        "--data.val_image_size",
        72,
        "--model.name",
        "resnet18",
        "--run_dir",
        run_dir,
    )
    here(
        cache_logits, CacheConfig, "--data.train", photographs, "--teacher.run", run_dir, "--store", store, "--views", 2
    )
    # The student trains at 32, 36 and 48 px, from what the teacher said of the same crops at 64 px.
    sizes = ["--data.start_image_size", 32, "--data.image_size", 48, "--data.val_image_size", 56]
    more = ["--teacher.store", store, "--teacher.checkpoints", "[1,2]", *sizes, "--run_dir", student]
    here(distill, DistillConfig, *common, "--model.name", "mobilenet_v2", *more, "--epochs", 8)
    assert summary(student)["steps"] == 48  # 101 images, batches of 16
    last = student / "checkpoints" / "epoch_0008.pt"
    done = run("ckd_dist.evaluate", "--data.val", other_photographs, "--checkpoint", last, "--amp", "off")
    assert json.loads(done.stdout)["loss"] == pytest.approx(summary(student)["loss"], abs=1e-4)  # at 56 px too
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in metrics(student))
    manifest = json.loads((store / "manifest.json").read_text())
    assert manifest["recipe"]["kind"] == "random_resized_crop" and manifest["forward"]["image_size"] == 64

"""A teacher calibrated by held-out answers: the factors are the best there are, every codec's loss has them, and what
does not fit is refused."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ckd_dist import distill
from ckd_dist.bench.step import memory_batch
from ckd_dist.core.errors import UserError
from ckd_dist.core.options import load_config
from ckd_dist.nn import losses
from ckd_dist.nn.options import KDConfig, LossName
from ckd_dist.search import __main__ as search
from ckd_dist.search.options import SearchConfig
from ckd_dist.store.codecs import Dense, TopK
from ckd_dist.store.codecs.targets import compared_logits, teacher_logits
from ckd_dist.store.manifest import Manifest
from ckd_dist.train.calibration import fit
from ckd_dist.train.learner import Learner
from ckd_dist.train.objective import DistillationLoss
from ckd_dist.train.options import DistillConfig, TeacherConfig
from ckd_dist.train.schedule import TeacherSchedule
from tests.helpers.commands import run
from tests.helpers.data_prep import idx_images, save, write
from tests.helpers.here import cache_here, here, store_here
from tests.helpers.search import options as search_options
from tests.helpers.shared import make_once
from tests.helpers.stores import cache_options
from tests.helpers.training import metrics, same_weights

# ------------------------------------------------------------------------------------------- the fit


def answers(seed=0, count=600, classes=7):
    """Logits of two members that know the same labels, each a part of it, and the labels."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=draw)
    noise = torch.randn(2, count, classes, generator=draw)
    first, second = 1.5 * F.one_hot(labels, classes) + noise
    return 2.0 * first, 0.7 * second, labels


def cross_entropy(factors, members, labels):
    together = sum(factor * each.double() for factor, each in zip(factors, members, strict=True))
    return F.cross_entropy(together, labels).item()


@pytest.mark.parametrize("number", [1, 2])
def test_no_factors_on_a_grid_are_better(number):
    *members, labels = answers()
    members = members[:number]
    found = fit(members, labels)
    assert found.after == pytest.approx(cross_entropy(found.factors, members, labels), abs=1e-9)
    assert found.before == pytest.approx(cross_entropy([1 / number] * number, members, labels))
    grid = itertools.product([0.05 * step for step in range(61)], repeat=number)
    best = min(grid, key=lambda factors: cross_entropy(factors, members, labels))
    assert found.after <= cross_entropy(best, members, labels) + 1e-9
    assert found.factors == pytest.approx(best, abs=0.06)
    assert found == fit(members, labels)


def test_what_was_planted_is_found():
    first, second, labels = answers()
    one, three = (fit([scale * first], labels).factors[0] for scale in (1.0, 3.0))
    assert three == pytest.approx(one / 3, rel=1e-4)
    both, tripled = fit([first, second], labels), fit([first, 3 * second], labels)
    assert tripled.factors == pytest.approx([both.factors[0], both.factors[1] / 3], rel=1e-3)
    assert tripled.after == pytest.approx(both.after, abs=1e-8)
    draw = torch.Generator().manual_seed(1)
    told = fit([first, torch.randn(first.shape, generator=draw)], labels)
    assert told.factors[1] < 0.05 * told.factors[0] and told.factors[0] == pytest.approx(one, rel=0.05)
    assert fit([first, -second], labels).factors == pytest.approx([one, 0], rel=1e-3)  # none is below 0


def test_weights_are_the_best_of_a_teacher_whose_probabilities_are_known():
    """Labels drawn from softmax(z1 + 0.5 z2)."""
    draw = torch.Generator().manual_seed(2)
    members = torch.randn(2, 100_000, 5, generator=draw) * 2
    labels = torch.multinomial((members[0] + 0.5 * members[1]).softmax(1), 1, generator=draw)[:, 0]
    assert fit([*members], labels).factors == pytest.approx([1.0, 0.5], abs=0.03)


def test_factors_become_weights_and_a_scale_for_each_epoch():
    teacher = TeacherConfig(store="s", checkpoints=[1, 2], calibration="c")
    both = TeacherSchedule.of(teacher, [1, 2], 2, [0.3, 0.9])
    assert both.weights == pytest.approx([0.25, 0.75]) and both.scales == pytest.approx([1.2, 1.2])
    teacher = TeacherConfig(store="s", checkpoints=[2, 1], calibration="c", combine="sequence")
    turns = TeacherSchedule.of(teacher, [1, 2], 4, [0.3, 0.9])
    assert turns.checkpoints == [[1], [1], [0], [0]] and turns.scales == [0.3, 0.3, 0.9, 0.9]
    assert TeacherSchedule.of(TeacherConfig(store="s", checkpoints=[2]), [2], 1).scales == [1.0]


# ------------------------------------------------------------------------------------------- the loss

CLASSES, COUNT = 11, 16


CODECS = [Dense(CLASSES), TopK(CLASSES, CLASSES)]
"""This topk keeps all classes, so it knows what dense knows."""
CASES = [
    (codec, KDConfig(loss=loss, temperature=3.0), number)
    for codec, loss, number in itertools.product(CODECS, get_args(LossName), (1, 2))
    if codec.unsupported(KDConfig(loss=loss), "logits" if number > 1 else None) is None
]


@pytest.mark.parametrize(("codec", "kd", "number"), CASES)
def test_the_loss_is_that_of_the_logits_times_the_factors(codec, kd, number):
    torch.manual_seed(0)
    logits = (torch.randn(number, COUNT, CLASSES) * 4).half().float()
    labels, factors = torch.randint(CLASSES, (COUNT,)), [0.4, 1.1][:number]
    weights, scale = [each / sum(factors) for each in factors], sum(factors)
    records = torch.stack([codec.encode(each, labels) for each in logits], dim=1)
    wanted = sum(factor * each for factor, each in zip(factors, logits, strict=True))
    values, gradients = [], []
    for way in ("by hand", "read"):
        student = torch.randn(COUNT, CLASSES, generator=torch.Generator().manual_seed(1)).requires_grad_()
        if way == "by hand":
            ours, teacher, top1 = student, losses.standardize(wanted) if kd.loss == "standardized" else wanted, None
        else:
            ours, teacher, top1 = compared_logits([codec] * number, records, kd, student, weights=weights, scale=scale)
            assert torch.equal(top1, wanted.argmax(dim=1))
        value = losses.distillation(student, teacher, labels, kd, compared=ours)["loss"]
        value.sum().backward()
        values.append(value.detach())
        gradients.append(student.grad)
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", ["kd", "soft_target"])
def test_topk_has_the_kept_classes_and_the_rest_of_the_calibrated_softmax(loss):
    """One checkpoint of few classes kept: by hand from its decoded logits at T / a, all of them and as groups."""
    torch.manual_seed(0)
    codec, kd, scale = TopK(50, 6), KDConfig(loss=loss, temperature=4.0), 0.6
    logits, labels = torch.randn(COUNT, 50) * 4, torch.randint(50, (COUNT,))
    records, student = codec.encode(logits, labels)[:, None], torch.randn(COUNT, 50, requires_grad=True)
    ours, teacher, _ = compared_logits([codec], records, kd, student, scale=scale)
    assert ours.shape == teacher.shape == (COUNT, 7)
    grouped = losses.distillation(student, teacher, labels, kd, compared=ours)["kd"]
    whole = scale * codec.decode(records[:, 0], kd.temperature / scale, student / scale)
    torch.testing.assert_close(whole, teacher_logits([codec], records, kd, student, scale=scale))
    by_hand = losses.distillation(student, whole, labels, kd)["kd"]
    ((first,), (second,)) = (torch.autograd.grad(each.sum(), student, retain_graph=True) for each in (grouped, by_hand))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)
    if loss == "kd":
        torch.testing.assert_close(grouped, by_hand, rtol=1e-4, atol=1e-5)
    exact, kept = (scale * logits / kd.temperature).softmax(dim=1), logits.topk(5).indices
    found = (whole / kd.temperature).softmax(dim=1)
    torch.testing.assert_close(found.gather(1, kept), exact.gather(1, kept), rtol=0.05, atol=2e-3)


def test_each_epoch_has_its_own_scale():
    teacher, batch = Dense(CLASSES), memory_batch(COUNT, 8, torch.device("cpu"))
    batch.labels = batch.labels % CLASSES
    logits, student = torch.randn(COUNT, CLASSES).half().float(), torch.randn(COUNT, CLASSES)
    batch.teacher_records = teacher.encode(logits)[:, None]
    words = ["--data.train=-", "--model.name=resnet8", "--run_dir=-", "--teacher.store=-", "--teacher.checkpoints=[1]"]
    config = load_config(DistillConfig, words)
    function = DistillationLoss(config, [[teacher]] * 2, [[0]] * 2, [1.0], [0.5, 1.0])
    for epoch, scale in enumerate((0.5, 1.0)):
        wanted = losses.soft_target_divergence(student, scale * logits, config.kd.temperature)
        torch.testing.assert_close(function(student, batch, epoch)["kd"], wanted, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------- a student


@pytest.fixture(scope="module")
def held_out(fashion, teacher, tmp_path_factory):
    """A store of what the teacher's checkpoints answer to the held-out images."""

    def make(folder):
        words = ["--data.train", fashion["holdout"], "--data.augment", "center_crop", "--views", 1]
        cache_here(*cache_options(fashion, teacher, folder / "store", *words))

    return make_once(tmp_path_factory, "held_out", make) / "store"


def options(fashion, store, run_dir, *more):
    data = ["--data.train", fashion["train"], "--data.batch_size", 100, "--model.name", "resnet8", "--epochs", 2]
    words = [*data, "--optim.lr", 0.05, "--log_every", 1, "--teacher.store", store, "--run_dir", run_dir, *more]
    return [str(word) for word in words]


def distill_here(fashion, store, run_dir, *more):
    distill.main(load_config(DistillConfig, options(fashion, store, run_dir, *more)))
    return metrics(run_dir)


def factors_said(out):
    """(Weights, temperature) in the lines that tell of them."""
    return [
        ([*map(float, weights.split(", "))], float(T))
        for weights, T in re.findall(r"weighed (.*) \(temp\w+ (.*)\)", out)
    ]


def test_a_student_learns_from_the_calibrated_ensemble_and_goes_on_bitwise(
    fashion, store, held_out, tmp_path, capsys, monkeypatch
):
    more = ["--teacher.checkpoints", "[1,3]", "--teacher.calibration", held_out, "--save_last_every", 3]
    whole = tmp_path / "whole"
    lines = distill_here(fashion, store, whole, *more)
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "weighed" in line]
    ((weights, temperature),) = factors_said(said)
    assert said.startswith("teacher: epochs 1, 3 weighed") and "by 301 held-out images: cross entropy" in said
    before, after = map(float, re.search(r"cross entropy (.*) to (.*)$", said).groups())
    assert after < before and temperature == pytest.approx(1 / sum(weights), rel=0.01)
    # The same logits by the weights alone, and no factor: other targets.
    plain = distill_here(fashion, store, tmp_path / "plain", "--teacher.checkpoints", "[1,3]", "--epochs", 1)
    assert plain[0]["ce"] == lines[0]["ce"] and plain[0]["kd"] != lines[0]["kd"]
    made_of = json.loads((whole / "lineage.json").read_text())["inputs"]["teacher.calibration"]
    assert made_of["holds"]["checkpoint 1"] == Manifest.load(held_out, "").checkpoints["epoch_0001"]["weights_sha256"]
    stopped, steps, step = tmp_path / "stopped", itertools.count(), Learner.train_step

    def until(learner, batch):
        if next(steps) == 14:
            raise InterruptedError
        step(learner, batch)

    monkeypatch.setattr(Learner, "train_step", until)
    with pytest.raises(InterruptedError):
        distill_here(fashion, store, stopped, *more)
    resumed = shutil.copytree(stopped, tmp_path / "resumed")  # this process has a lock on the other
    done = run("ckd_dist.distill", *options(fashion, store, resumed, *more))
    assert said in done.stdout and "going on after step 12" in done.stdout
    assert same_weights(*(each / "checkpoints" / "epoch_0002.pt" for each in (whole, resumed)))
    with pytest.raises(UserError, match=r"holds a run with teacher\.calibration .*, not None"):
        distill_here(fashion, store, whole, "--teacher.checkpoints", "[1,3]")


def test_online_and_cached_teachers_are_calibrated_alike(fashion, store, teacher, held_out, tmp_path, capsys):
    more = ["--teacher.checkpoints", "[3]", "--teacher.calibration", held_out, "--epochs", 1]
    cached = distill_here(fashion, store, tmp_path / "cached", *more)
    online = ["--teacher.store", "null", "--teacher.run", teacher, "--data.views", 2]
    online = distill_here(fashion, store, tmp_path / "online", *more, *online)
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(cached, online, strict=True)) < 2e-3
    said = re.findall(r"teacher: epoch 3 at temperature .*", capsys.readouterr().out)
    assert len(said) == 2 and said[0] == said[1]


def test_checkpoints_in_sequence_have_each_its_own_temperature(fashion, store, held_out, tmp_path, capsys):
    more = ["--teacher.checkpoints", "[3,1]", "--teacher.combine", "sequence", "--teacher.calibration", held_out]
    assert distill_here(fashion, store, tmp_path / "run", *more)
    found = dict(re.findall(r"teacher: epoch (\d) at temperature (.*) by", capsys.readouterr().out))
    assert found.keys() == {"1", "3"} and found["1"] != found["3"]


def test_students_of_a_search_are_calibrated_each_by_its_own_checkpoints(fashion, store, held_out, tmp_path, capsys):
    grid = ["--grid.teachers", "[[],[3],[1,3]]", "--teacher.calibration", held_out, "--epochs", 1]
    here(search, SearchConfig, *search_options(fashion, store, tmp_path / "search", *grid, "--optim.warmup_epochs", 0))
    out = capsys.readouterr().out
    assert "teacher: epoch 3 at temperature" in out and len(factors_said(out)) == 1
    distilled = [*grid[2:], "--teacher.checkpoints", "[1,3]"]
    words = [*search_options(fashion, store, tmp_path / "alone", "--optim.warmup_epochs", 0), *map(str, distilled)]
    distill.main(load_config(DistillConfig, words))
    (student,) = (tmp_path / "search" / "students").glob("*1+3*")
    assert same_weights(*(each / "checkpoints" / "epoch_0001.pt" for each in (student, tmp_path / "alone")))


# ------------------------------------------------------------------------------------------- refusals


def refused(expected, fashion, store, run_dir, *more):
    with pytest.raises(UserError, match=expected) as refusal:
        distill.main(load_config(DistillConfig, options(fashion, store, run_dir, *more)))
    assert "\n" not in str(refusal.value) and not run_dir.exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--teacher.weights", "[1,1]"], r"teacher\.calibration finds weights, and teacher\.weights gives some"),
        (["--teacher.combine", "probabilities"], r"teacher\.calibration is for logits: give --teacher\.combine logits"),
        (["--teacher.store", "null", "--teacher.checkpoints", "[]"], r"calibration is given without a teacher"),
    ],
)
def test_options_that_contradict_it_are_refused(fashion, store, held_out, tmp_path, more, expected):
    words = ["--teacher.checkpoints", "[1,3]", "--teacher.calibration", held_out, *more]
    refused(expected, fashion, store, tmp_path / "run", *words)


def test_answers_of_others_are_refused(fashion, store, held_out, tmp_path):
    run_dir = tmp_path / "run"
    refused(r"teacher\.calibration: .* is of the very images of data\.train: give answers to others",
            fashion, store, run_dir, "--teacher.calibration", store)  # fmt: skip
    refused(
        r"teacher\.calibration: .* is not a logit store", fashion, store, run_dir, "--teacher.calibration", tmp_path
    )
    copy = shutil.copytree(held_out, tmp_path / "copy")
    manifest = Manifest.load(copy, "")
    manifest.checkpoints["epoch_0003"]["weights_sha256"] = "0" * 64
    manifest.save(copy)
    refused(r"teacher\.calibration: checkpoint 3 of .*copy is another than that of .*: write one of the two anew",
            fashion, store, run_dir, "--teacher.calibration", copy)  # fmt: skip
    searched = search_options(fashion, store, tmp_path / "search", "--teacher.calibration", copy)
    with pytest.raises(UserError, match=r"teacher\.calibration: checkpoint 3"):
        here(search, SearchConfig, *searched)
    assert not (tmp_path / "search").exists()
    del manifest.checkpoints["epoch_0003"]
    manifest.save(copy)
    refused(r"teacher\.calibration: .* has no checkpoint of epoch 3; there are 1, 2: add to it by cache_logits",
            fashion, store, run_dir, "--teacher.calibration", copy)  # fmt: skip


def test_answers_that_tell_too_little_are_refused(fashion, store, teacher, held_out, tmp_path):
    run_dir = tmp_path / "run"
    unlabelled, sparse, mixed, drawn = (tmp_path / name for name in ("unlabelled", "sparse", "mixed", "drawn"))
    part = ["--split", "holdout", "--subset", 40, "--workers", 1, "--out", tmp_path / "images.beton"]
    assert write("--dataset", "fashion_mnist", *part).status == 0
    data = ["--data.train", tmp_path / "images.beton", "--data.augment", "center_crop", "--views", 1]
    cache_here(*cache_options(fashion, teacher, sparse, *data, "--codec", "topk", "--k", 4))
    refused(r"teacher\.calibration: .* is of codec topk, .*: write it with --codec dense",
            fashion, store, run_dir, "--teacher.calibration", sparse)  # fmt: skip
    cache_here(*cache_options(fashion, teacher, mixed, *data, "--data.augment", "pad_crop", "--data.mixup", 1))
    refused(r"the images of .* are mixed of two", fashion, store, run_dir, "--teacher.calibration", mixed)
    (tmp_path / "images.beton").unlink()
    refused(r"the images of .* are not where they were, at .*images\.beton: put them back, or name them as --data\.val",
            fashion, store, run_dir, "--teacher.calibration", sparse)  # fmt: skip
    assert store_here("convert", store, drawn, "--codec", "sampled", "--k", 3, "--data.train", fashion["train"]) == 0
    refused(r"teacher\.calibration is for logits, and .* keeps probabilities",
            fashion, drawn, run_dir, "--teacher.calibration", held_out, "--kd.temperature", 1)  # fmt: skip
    for number, picture in enumerate(idx_images("t10k")[0][:20]):
        save(tmp_path / "pictures" / f"{number:02}.png", np.repeat(picture[..., None], 3, axis=2))
    part = ["--split", "train", "--holdout", 0, "--workers", 1, "--out", tmp_path / "images.beton"]
    assert write("--dataset", "images", "--root", tmp_path / "pictures", *part).status == 0
    cache_here(*cache_options(fashion, teacher, unlabelled, *data, "--data.batch_size", 20))
    refused(r"teacher\.calibration: the images of .*images\.beton have no labels, and a teacher is calibrated by these",
            fashion, store, run_dir, "--teacher.calibration", unlabelled)  # fmt: skip

"""Images without labels: the teacher alone teaches, and what needs a label is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ckd_dist.core.errors import UserError
from ckd_dist.core.results import read_curve
from ckd_dist.data.dataset import read_info
from ckd_dist.store.reader import StoreReader
from tests.helpers.commands import run
from tests.helpers.data_prep import idx_images, save, write
from tests.helpers.here import cache_here, run_here, store_here
from tests.helpers.shared import make_once
from tests.helpers.stores import contents
from tests.helpers.training import metrics, same_weights, summary

CLASSES = 10


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory, fashion, teacher) -> Path:
    """A folder with 200 pictures: x.beton without labels, labelled.beton with any, and stores of the first."""

    def make(folder: Path) -> None:
        grey = idx_images("t10k")[0][:200]
        pictures = np.repeat(grey[..., None], 3, axis=3)
        images = [save(folder / "images" / f"{i:03}.png", picture) for i, picture in enumerate(pictures)]
        table = folder / "labelled.csv"
        table.write_text("".join(f"{path},{i % CLASSES}\n" for i, path in enumerate(images)))
        names = read_info(fashion["train"], "").classes
        (folder / "classes.txt").write_text("\n".join(names) + "\n")
        for dataset, root, name in (("images", folder / "images", "x"), ("csv", table, "labelled")):
            argv = ("--split", "train", "--holdout", 0, "--out", folder / f"{name}.beton")
            result = write("--dataset", dataset, "--root", root, *argv)
            assert result.status == 0, result.err
        for codec, more in (("dense", ()), ("topk", ("--k", 3))):
            words = ("--data.train", folder / "x.beton", "--teacher.run", teacher, "--views", 2, "--shard_size", 64)
            cache_here(*words, "--store", folder / codec, "--codec", codec, *more)

    return make_once(tmp_path_factory, "unlabelled", make)


def distill(images: Path, fashion: dict[str, Path], run_dir: Path, *more: object) -> Path:
    data = ("--data.train", images, "--data.val", fashion["holdout"], "--data.batch_size", 50)
    model = ("--model.name", "resnet8", "--epochs", 2, "--log_every", 2, "--run_dir", run_dir)
    run_here("distill", *data, *model, *more)
    return run_dir


def test_a_student_is_that_of_labelled_images_of_which_no_label_counts(tmp_path, unlabelled, fashion, teacher):
    cache = ("--teacher.run", teacher, "--views", 2, "--store", tmp_path / "store")
    cache_here("--data.train", unlabelled / "labelled.beton", *cache)
    kd = ("--kd.alpha", 0, "--teacher.checkpoints", "[1,3]", "--teacher.store")
    ours = distill(unlabelled / "x.beton", fashion, tmp_path / "ours", *kd, unlabelled / "dense")
    theirs = distill(unlabelled / "labelled.beton", fashion, tmp_path / "theirs", *kd, tmp_path / "store")
    assert same_weights(*(run / "checkpoints" / "epoch_0002.pt" for run in (ours, theirs)))
    assert summary(ours)["top1"] == summary(theirs)["top1"]
    assert read_curve(ours / "metrics.jsonl", "") == read_curve(theirs / "metrics.jsonl", "")
    about_labels = {"ce", "top1", "teacher_top1"}
    for line, other in zip(metrics(ours), metrics(theirs), strict=True):
        assert other.keys() - line.keys() == about_labels and line["agreement"] == other["agreement"]


def test_a_topk_store_keeps_the_largest_logits_and_no_label(unlabelled):
    epochs, ids = [1, 2, 3], np.arange(200)
    dense, topk = (StoreReader(str(unlabelled / codec), epochs) for codec in ("dense", "topk"))
    without = 0
    for column in range(len(epochs)):
        logits = dense.codec.decode(torch.from_numpy(dense.rows(ids, 1, [column])[:, 0].copy()), 1.0)
        records = topk.rows(ids, 1, [column])[:, 0].copy().view(topk.codec.array(1)[0])[:, 0]
        assert (records["logits"] == logits.sort(dim=1, descending=True).values[:, :3].numpy()).all()
        without += (records["classes"] != 0).all(axis=1).sum()
    assert without > 100  # records that the file's zeros, taken for labels, would have got into


def test_a_converted_store_is_one_that_was_cached_so(tmp_path, unlabelled):
    words = ("convert", unlabelled / "dense", tmp_path / "topk", "--data.train", unlabelled / "x.beton")
    assert store_here(*words, "--codec", "topk", "--k", 3) == 0
    shards = sorted((tmp_path / "topk").rglob("*.npy"))
    assert len(shards) == 24
    for path in shards:
        cached, converted = np.load(unlabelled / "topk" / path.relative_to(tmp_path / "topk")), np.load(path)
        assert (cached["logits"] == converted["logits"]).all()


def test_a_store_of_them_is_verified_and_its_origin_found(unlabelled, teacher):
    words = ("--teacher.run", teacher, "--data.train", unlabelled / "x.beton")
    assert store_here("verify", unlabelled / "topk", *words, "--records", 8) == 0
    before = contents(unlabelled / "topk")
    assert store_here("repair", unlabelled / "topk", *words) == 0
    assert contents(unlabelled / "topk") == before
    shown = run("ckd_dist.lineage", unlabelled / "topk").stdout
    assert "200 images of images train" in shown  # and status 0: nothing has changed


REFUSED = {
    "a student without a teacher": ("distill", [], "data.train: the images of ", "write a file of images that have"),
    "a weight of labels": ("distill", ["--kd.alpha", 0.1], "kd.alpha is 0.1, and the images of ", "give --kd.alpha 0"),
    "a loss of labels": ("distill", ["--kd.alpha", 0, "--kd.loss", "dkd"], "kd.loss dkd ", "give another"),
    "a search with a weight of labels": ("search", ["--grid.alphas", "[0,0.5]"], "kd.alpha is 0.5", "--kd.alpha 0"),
    "a teacher": ("train_teacher", [], "data.train: the images of ", "write a file of images that have"),
    "a selection": ("select_teacher", [], "data.train: the images of ", "write a file of images that have"),
    "an evaluation": ("evaluate", [], "data.val: the images of ", "write a file of images that have"),
    "an evaluation after every epoch": ("distill", [], "data.val: the images of ", "write a file of images that have"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_a_label_is_refused_in_one_line(tmp_path, unlabelled, fashion, teacher, case):
    command, more, start, mend = REFUSED[case]
    images, run_dir = unlabelled / "x.beton", tmp_path / "run"
    words = ["--data.train", images, "--data.val", fashion["holdout"], "--run_dir", run_dir]
    if command in ("distill", "search", "train_teacher"):
        words += ["--model.name", "resnet8", "--epochs", 1]
    if command in ("distill", "search") and case != "a student without a teacher":
        words += ["--teacher.store", unlabelled / "dense", "--teacher.checkpoints", "[3]"]
    if command == "select_teacher":
        words += ["--teacher.run", teacher]
    if command == "evaluate":
        words = ["--data.val", images, "--checkpoint", teacher / "checkpoints" / "epoch_0003.pt"]
    if case == "an evaluation after every epoch":
        words[1], words[3] = fashion["train"], images
    with pytest.raises(UserError) as refused:
        run_here(command, *words, *more)
    message = str(refused.value)
    assert message.startswith(start) and mend in message and str(images) in message and "\n" not in message
    assert not run_dir.exists()

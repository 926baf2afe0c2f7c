"""Layouts of the data sets that are read, and wrong ones that are refused with the right one."""

import hashlib
import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.helpers.data_prep import (
    assert_refused,
    photo,
    read,
    write,
)


def test_tiny_imagenet_reads_its_official_layout_and_numbers_train_and_test_alike(tmp_path, tiny_imagenet):
    argv = ["--dataset", "tiny_imagenet", "--root", tiny_imagenet, "--holdout", 0, "--split"]
    for split, labels in {"train": [0, 0, 1, 1, 2, 2], "test": [1, 1, 2, 0]}.items():
        out = tmp_path / f"{split}.beton"
        assert write(*argv, split, "--out", out).status == 0
        assert read(out).labels == labels
        description = json.loads(Path(f"{out}.json").read_text())
        assert description["classes"] == ["tench, Tinca tinca", "goldfish", "n03"]
        assert description["image_size"] == {"min": [64, 64], "max": [64, 64]}
    first = np.array(Image.open(tiny_imagenet / "val" / "images" / "val_0.JPEG"))
    assert (read(tmp_path / "test.beton").images[0] == first).all()


def test_imagenet_reads_train_and_val(tmp_path, imagenet):
    argv = ["--dataset", "imagenet", "--root", imagenet, "--holdout", 0, "--split"]
    for split, labels in {"train": [0, 0, 0, 1, 1, 1], "test": [0, 1]}.items():
        out = tmp_path / f"{split}.beton"
        assert write(*argv, split, "--out", out, "--write-mode", "jpg").status == 0
        assert read(out).labels == labels
        assert json.loads(Path(f"{out}.json").read_text())["classes"] == ["n01440764", "n01443537"]


@pytest.fixture
def cifar100(tmp_path: Path, request, monkeypatch) -> SimpleNamespace:
    """Three images in CIFAR-100's own format, which torchvision takes for the real ones; their labels by parameter."""
    from torchvision.datasets import CIFAR100

    folder = tmp_path / "data" / CIFAR100.base_folder
    folder.mkdir(parents=True)
    pixels = np.stack([photo(32, 32, seed=i) for i in range(3)])
    files = {
        "train": {
            "data": pixels.transpose(0, 3, 1, 2).reshape(3, -1),
            "fine_labels": getattr(request, "param", [0, 99, 1]),
        },
        "meta": {"fine_label_names": [f"class {i}" for i in range(100)]},
    }
    md5 = {}
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5["meta"]})
    monkeypatch.setattr(CIFAR100, "url", "file:///nowhere/cifar-100-python.tar.gz")
    return SimpleNamespace(root=tmp_path / "data", pixels=pixels, meta=folder / "meta")


def test_cifar_is_read_through_torchvision_with_the_papers_constants(tmp_path, cifar100):
    out = tmp_path / "x.beton"
    argv = [
        "--dataset",
        "cifar100",
        "--root",
        cifar100.root,
        "--split",
        "train",
        "--holdout",
        0,
        "--out",
        out,
    ]
    assert write(*argv).status == 0
    assert (np.stack(read(out).images) == cifar100.pixels).all()
    assert read(out).labels == [0, 99, 1]
    description = json.loads(Path(f"{out}.json").read_text())
    assert description["num_classes"] == 100 and description["classes"][99] == "class 99"
    assert description["normalization"] == {"mean": [0.5071, 0.4867, 0.4408], "std": [0.2675, 0.2565, 0.2761]}


@pytest.mark.parametrize("cifar100", [[0, 100, 1], [0, 99, -1], [0, 99]], indirect=True)
def test_a_label_that_no_class_covers_is_never_written(tmp_path, cifar100):
    out = tmp_path / "x.beton"
    result = write("--dataset", "cifar100", "--root", cifar100.root, "--split", "train", "--out", out)
    assert_refused(result, f"error: {cifar100.root}: ", "get")
    assert os.listdir(tmp_path) == ["data"]


def test_a_failed_download_is_one_line(tmp_path, cifar100):
    cifar100.meta.unlink()
    out = tmp_path / "x.beton"
    result = write("--dataset", "cifar100", "--root", cifar100.root, "--split", "train", "--out", out)
    assert_refused(result, f"error: --root {cifar100.root}: CIFAR100 is not there whole", "download failed")
    assert os.listdir(tmp_path) == ["data"]


def spoil_layout(case: str, root: Path) -> tuple[str, str]:
    """Breaks a layout; returns the start of the message and a part of its rest."""
    if case == "imagefolder without classes":
        for folder in root.iterdir():
            folder.rename(folder.with_name("." + folder.name))
        return f"error: --root {root}: no class folders", "<class>"
    if case == "imagefolder of splits":
        for folder, name in zip(sorted(root.iterdir()), ("test", "train", "val"), strict=True):
            folder.rename(folder.with_name(name))
        return f"error: --root {root}: its folders are splits", f"--root {root}/test"
    if case == "imagefolder with an empty class":
        (root / "dog" / "deeper").mkdir(parents=True)
        return f"error: {root}/dog: a class without images", "remove the folder"
    if case == "imagefolder with a folder in two classes":
        (root / "bee" / "more").symlink_to(root / "ant")
        return f"error: {root}/bee/more: the same folder is below {root}/ant, another class", "remove the link"
    if case == "imagefolder with a file in two classes":
        os.link(root / "ant" / "007.jpg", root / "cat" / "more.jpg")
        return f"error: {root}/cat/more.jpg: the same file as {root}/ant/007.jpg, of another class", "remove one"
    if case == "imagefolder with a loop for a class":
        (root / "dog").symlink_to(".")
        return f"error: {root}/dog: a class without images (1 folders linked in a loop or twice)", "remove the folder"
    if case == "tiny_imagenet without wnids":
        (root / "wnids.txt").unlink()
        return f"error: {root}/wnids.txt: No such file", "official layout"
    if case == "tiny_imagenet without annotations":
        (root / "val" / "val_annotations.txt").unlink()
        return f"error: {root}/val/val_annotations.txt: No such file", "official layout"
    if case == "tiny_imagenet with an unknown class":
        (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn77\t0\t0\t1\t1\n")
        return f"error: {root}/val/val_annotations.txt: no class of wnids.txt", "n77"
    if case == "tiny_imagenet with a listed image missing":
        (root / "val" / "images" / "val_2.JPEG").unlink()
        return f"error: {root}/val/images/val_2.JPEG: unreadable image (No such file", "repair"
    raise AssertionError(case)


@pytest.mark.parametrize(
    "case",
    [
        "imagefolder without classes",
        "imagefolder of splits",
        "imagefolder with an empty class",
        "imagefolder with a folder in two classes",
        "imagefolder with a file in two classes",
        "imagefolder with a loop for a class",
        "tiny_imagenet without wnids",
        "tiny_imagenet without annotations",
        "tiny_imagenet with an unknown class",
        "tiny_imagenet with a listed image missing",
    ],
)
def test_a_wrong_layout_is_one_line_that_says_the_right_one(tmp_path, request, case):
    dataset = case.split()[0]
    root = request.getfixturevalue("own_photos" if dataset == "imagefolder" else dataset)
    start, mend = spoil_layout(case, root)
    out = tmp_path / "x.beton"
    assert_refused(write("--dataset", dataset, "--root", root, "--split", "test", "--out", out), start, mend)
    assert os.listdir(tmp_path) == [root.name]

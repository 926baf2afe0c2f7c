"""ImageNet as its organisers and Kaggle ship it: the same files, byte for byte, as from class folders."""

import csv
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.data_prep import assert_refused, photo, save, with_companions, write

WNIDS = ("n01440764", "n01443537", "n02100735")
DEVKIT = "ILSVRC2012_devkit_t12"


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Class folders with the organisers' names, the classes of validation images in no order."""
    root = tmp_path / "folders"
    for label, wnid in enumerate(WNIDS):
        for i in (10026, 2, 301):
            save(root / "train" / wnid / f"{wnid}_{i}.JPEG", photo(40 + i % 7, 50, seed=i + label))
    for i, label in enumerate((2, 0, 1, 2, 0, 1), start=1):
        save(root / "val" / WNIDS[label] / f"ILSVRC2012_val_{i:08}.JPEG", photo(48, 32 + i, seed=i))
    return root


def write_tar(path: Path, contents: dict[str, bytes | Path], *, ended: bool = True) -> Path:
    """A tar file of these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in contents.items():
            content = content if isinstance(content, bytes) else content.read_bytes()
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
        end = tar.offset
    if not ended:
        os.truncate(path, end)
    return path


def train_tar(folders: Path, root: Path, *, ended: bool = True) -> Path:
    """A tar file of a tar file a class, neither of them sorted."""
    inner = {}
    for wnid in sorted(WNIDS, reverse=True):
        images = sorted((folders / "train" / wnid).iterdir(), reverse=True)
        made = write_tar(root / "inner.tar", {path.name: path for path in images}, ended=ended)
        inner[f"{wnid}.tar"] = made.read_bytes()
        made.unlink()
    return write_tar(root / "ILSVRC2012_img_train.tar", inner)


def val_images(folders: Path) -> list[Path]:
    return sorted((folders / "val").rglob("*.JPEG"), key=lambda path: path.name)


def val_tar(folders: Path, root: Path) -> Path:
    return write_tar(root / "ILSVRC2012_img_val.tar", {path.name: path for path in val_images(folders)})


def flat_val(folders: Path, root: Path) -> None:
    (root / "val").mkdir(parents=True)
    for path in val_images(folders):
        shutil.copy(path, root / "val")


def devkit(folders: Path, root: Path, packed: bool) -> None:
    """The development kit: its class numbers follow neither the WordNet ids nor the alphabet, and go beyond classes."""
    from scipy.io import savemat

    numbers = {WNIDS[2]: 1, WNIDS[0]: 2, WNIDS[1]: 3}
    wnids = [*sorted(numbers, key=numbers.__getitem__), "n00001740"]
    types = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    types += [("children", "O"), ("wordnet_height", "O"), ("num_train_images", "O")]
    synsets = np.zeros((len(wnids), 1), types)
    for row, wnid in enumerate(wnids):
        children = (0, [], 0, 3) if wnid in numbers else (3, [1, 2, 3], 1, 0)
        synsets[row, 0] = (float(row + 1), wnid, f"a thing, {wnid}", "no gloss", *children)
    data = root / DEVKIT / "data"
    data.mkdir(parents=True)
    savemat(data / "meta.mat", {"synsets": synsets})
    truth = "".join(f"{numbers[path.parent.name]}\n" for path in val_images(folders))
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)
    if packed:
        with tarfile.open(root / f"{DEVKIT}.tar.gz", "w:gz") as tar:
            tar.add(root / DEVKIT, DEVKIT)
        shutil.rmtree(root / DEVKIT)


def solution(folders: Path, root: Path) -> Path:
    """Kaggle's table of the validation images, in its own order, with the boxes behind the class."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / "LOC_val_solution.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ImageId", "PredictionString"])
        for image in reversed(val_images(folders)):
            boxes = "".join(f"{image.parent.name} 85 1 499 272 " for _ in range(2))
            rows.writerow([image.stem, boxes])
    return path


def kaggle(folders: Path, root: Path) -> Path:
    """What Kaggle's archive unpacks to; returns its folder of train/ and val/."""
    inner = root / "ILSVRC" / "Data" / "CLS-LOC"
    shutil.copytree(folders / "train", inner / "train")
    flat_val(folders, inner)
    save(inner / "test" / "ILSVRC2012_test_00000001.JPEG", photo(32, 32, seed=99))
    solution(folders, root)
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} a thing\n" for wnid in WNIDS))
    return inner


def lay_out(case: str, folders: Path, root: Path) -> Path:
    """One of the layouts; returns what --root is."""
    if case.startswith("kaggle"):
        inner = kaggle(folders, root)
        return {"top": root, "ILSVRC": root / "ILSVRC", "CLS-LOC": inner}[case.split()[1]]
    if case == "tars":
        train_tar(folders, root)
        val_tar(folders, root)
        devkit(folders, root, packed=True)
    elif case == "tars without an end":
        train_tar(folders, root, ended=False)
        val_tar(folders, root)
        devkit(folders, root, packed=False)
    elif case == "flat val and devkit":
        shutil.copytree(folders / "train", root / "train")
        flat_val(folders, root)
        devkit(folders, root, packed=False)
    elif case == "tars and table":
        train_tar(folders, root)
        val_tar(folders, root)
        solution(folders, root)
    return root


def write_all(root: Path, out: Path) -> dict[str, bytes]:
    """Every file that --split all writes of ImageNet at `root`, by one worker: pages in the order of images."""
    out.mkdir()
    options = ("--holdout", 0.3, "--write-mode", "proportion", "--workers", 1)
    result = write("--dataset", "imagenet", "--root", root, "--split", "all", "--out", out, *options)
    assert result.status == 0, result.err
    return {path.name: path.read_bytes() for path in out.iterdir()}


CASES = [
    *("kaggle top", "kaggle ILSVRC", "kaggle CLS-LOC"),
    *("tars", "tars without an end", "tars and table", "flat val and devkit"),
]


@pytest.mark.parametrize("case", CASES)
def test_every_layout_gives_the_bytes_of_class_folders(tmp_path, folders, case):
    expected = write_all(folders, tmp_path / "expected")
    assert set(expected) == with_companions("train.beton", "holdout.beton", "test.beton")
    assert write_all(lay_out(case, folders, tmp_path / "in"), tmp_path / "out") == expected


def test_parallel_workers_read_a_tar_in_place(tmp_path):
    folders = tmp_path / "folders"
    for label, wnid in enumerate(WNIDS):
        for i in range(60):
            save(folders / "train" / wnid / f"{wnid}_{i}.JPEG", photo(16, 16 + i, seed=1000 * label + i))
    train_tar(folders, tmp_path / "in")
    hashes = []
    for root, workers in ((folders, 1), (tmp_path / "in", 3)):
        out = tmp_path / "x.beton"
        argv = ["--dataset", "imagenet", "--root", root, "--split", "train", "--holdout", 0, "--workers", workers]
        assert write(*argv, "--out", out).status == 0
        hashes.append(json.loads(Path(f"{out}.json").read_text())["content_hash"])
    assert hashes[0] == hashes[1]


def test_it_says_what_was_read_and_what_in_a_tar_is_no_image(tmp_path, folders):
    root = tmp_path / "in"
    images: dict = {path.name: path for path in val_images(folders)}
    others = {"README": b"text", "list.txt": b"text", "._x.JPEG": b"no image", "extra.JPEG": b"no label"}
    tar = write_tar(root / "ILSVRC2012_img_val.tar", {**others, **images, "README": b"again"})
    table = solution(folders, root)
    result = write("--dataset", "imagenet", "--root", root, "--split", "test", "--out", tmp_path / "x.beton")
    assert result.err.splitlines()[0] == (
        f"imagenet test: 6 of 6 images, classes: 3; from {tar} and {table}; left out: "
        "1 without suffix, 1 .txt, 1 hidden, 1 images without a label"
    )


def spoil(case: str, folders: Path, root: Path) -> tuple[str, str]:
    """A layout that lacks something; returns the start of the message and a part of its rest."""
    flat, tar = root / "val", root / "ILSVRC2012_img_val.tar"
    if case == "a flat val without classes":
        flat_val(folders, root)
        return f"error: {flat}: nothing says the classes", "put LOC_val_solution.csv (Kaggle's)"
    if case == "a flat val without an image":
        flat_val(folders, root)
        solution(folders, root)
        (flat / "ILSVRC2012_val_00000003.JPEG").unlink()
        return f"error: {flat}: 1 of the 6 images that {root}/LOC_val_solution.csv lists", "_00000003.JPEG: get them"
    if case == "nothing":
        root.mkdir()
        return f"error: --root {root}: no validation images; looked for {root}/val/<wnid>/*.JPEG", "ILSVRC/Data/CLS-LOC"
    if case == "another class in val":
        shutil.copytree(folders, root)
        (root / "val" / WNIDS[0]).rename(root / "val" / "n99999999")
        return f"error: --root {root}: {flat} and {root}/train hold different classes (2, e.g. {WNIDS[0]})", "complete"
    if case == "other classes in train":
        kaggle(folders, root)
        (root / "ILSVRC" / "Data" / "CLS-LOC" / "train" / WNIDS[0]).rename(root / "away")
        return f"error: --root {root}: ", f"hold different classes (1, e.g. {WNIDS[0]}): complete them"
    if case == "a damaged table":
        flat_val(folders, root)
        solution(folders, root).write_text("ImageId,PredictionString\nILSVRC2012_val_00000001,\n")
        return f"error: {root}/LOC_val_solution.csv: no image and class in the line", "get it anew"
    if case == "a devkit of another year":
        flat_val(folders, root)
        devkit(folders, root, packed=False)
        (root / DEVKIT / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text("17\n")
        return f"error: {root}/{DEVKIT}: meta.mat and ", "get it anew"
    solution(folders, root)
    content = val_tar(folders, root).read_bytes()
    if case == "a tar cut short":
        tar.write_bytes(content[:5000])
        return f"error: {tar}: ", "get it anew"
    if case == "a damaged tar":
        tar.write_bytes(content[:2048].ljust(len(content), b"x"))
        return f"error: {tar}: ", "get it anew"
    assert case == "a compressed tar"
    with tarfile.open(tar, "w:gz") as packed:
        packed.add(folders, "val")
    return f"error: {tar}: not a whole tar file", "decompress it"


@pytest.mark.parametrize(
    "case",
    [
        "a flat val without classes",
        "a flat val without an image",
        "nothing",
        "another class in val",
        "other classes in train",
        "a damaged table",
        "a devkit of another year",
        "a tar cut short",
        "a damaged tar",
        "a compressed tar",
    ],
)
def test_what_is_missing_is_one_line_with_the_mend(tmp_path, folders, case):
    root = tmp_path / "in"
    start, mend = spoil(case, folders, root)
    out = tmp_path / "x.beton"
    assert_refused(write("--dataset", "imagenet", "--root", root, "--split", "test", "--out", out), start, mend)
    assert not list(tmp_path.glob("*x.beton*"))

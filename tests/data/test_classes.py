"""Classes are compared by name: those of other names or order are refused, and mapped when that is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ckd_dist.core.errors import UserError
from ckd_dist.data.beton import open_images
from ckd_dist.data.options import TrainDataConfig
from ckd_dist.store.__main__ import main as store_main
from tests.helpers.data_prep import write_folder
from tests.helpers.here import run_here


def write_classes(root: Path, names: list[str], per_class: int, seed: int) -> Path:
    """A .beton file of an image folder whose classes, in the order of `names`, are colours."""
    rng = np.random.default_rng(seed)
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for image in range(per_class):
            pixels = np.full((12, 12, 3), (20 * number, 255 - 20 * number, 128)) + rng.integers(0, 8, (12, 12, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{image}.png")
    out = root.with_suffix(".beton")
    write_folder(root, out, "--workers", 1)
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Twelve classes whose folders are called otherwise in each part, and a teacher of the first."""
    root = tmp_path_factory.mktemp("classes")
    padded, plain = [f"{number:02d}" for number in range(12)], [str(number) for number in range(12)]
    named = {
        "train": (padded, 8, 0),
        "same": (padded, 2, 1),
        "unpadded": (plain, 2, 1),
        "few": (padded[:6], 2, 1),
        "other": ([f"colour_{name}" for name in padded], 2, 1),
        "mixed": ([*padded[:-1], "eleven"], 2, 1),
        "unpadded_train": (plain, 8, 0),
    }
    found = {name: write_classes(root / name, *how) for name, how in named.items()}
    words = ["--data.train", found["train"], "--data.batch_size", 32, "--model.name", "resnet8", "--amp", "off"]
    run_here(
        "train_teacher", *words, "--epochs", 30, "--optim.lr", 0.05, "--run_dir", root / "teacher", "--save_every", 30
    )
    return {**found, "checkpoint": root / "teacher" / "checkpoints" / "epoch_0030.pt", "teacher": root / "teacher"}


def top1(folders, capsys, name, *more):
    capsys.readouterr()
    run_here("evaluate", "--data.val", folders[name], "--checkpoint", folders["checkpoint"], *more)
    return json.loads(capsys.readouterr().out.splitlines()[-1])["top1"]


BY_NAME, BY_POSITION = ("--data.map_classes", "by_name"), ("--data.map_classes", "by_position")


def test_classes_of_other_names_or_order_are_refused_and_mapped_when_asked_for(folders, capsys):
    right = top1(folders, capsys, "same")
    assert right > 50
    assert top1(folders, capsys, "unpadded", *BY_NAME) == right
    assert top1(folders, capsys, "unpadded", *BY_POSITION) < right
    assert top1(folders, capsys, "other", *BY_POSITION) == right
    assert top1(folders, capsys, "few", *BY_NAME) > 50
    for name, options, expected in (
        ("unpadded", (), r"class 2 of .*unpadded\.beton is 10, of .* it is 02: .* --data\.map_classes by_name"),
        ("other", (), r"class 0 of .* is colour_00, of .* it is 00 \(it alone has colour_00 and 11 more\)"),
        ("mixed", (), r"class 11 of .* is eleven, of .* it is 11 \(it alone has eleven\)"),
        ("mixed", BY_NAME, r"1 classes of .*, first \['eleven'\], are none of"),
        ("few", (), r"has 6 classes, .* has 12 \(it lacks 06 and 5 more\): give --data\.map_classes by_name"),
    ):
        with pytest.raises(UserError, match=expected):
            top1(folders, capsys, name, *options)


def test_every_command_compares_classes_and_a_store_of_mapped_ones_teaches_the_same(folders, tmp_path):
    common = ["--data.batch_size", 32, "--amp", "off"]
    student = [*common, "--model.name", "resnet8", "--epochs", 1, "--optim.lr", 0.05, "--run_dir", tmp_path / "run"]
    teacher = ["--teacher.run", folders["teacher"]]
    cache = [*common, *teacher, "--codec", "topk", "--k", 3]
    ours, others = ["--data.train", folders["train"]], ["--data.train", folders["unpadded_train"]]
    val = ["--data.val", folders["unpadded"]]
    for command, words in (
        ("train_teacher", [*student, *ours, *val]),
        ("cache_logits", [*cache, *others, "--store", tmp_path / "none"]),
        ("distill", [*student, *others, *teacher]),
        ("select_teacher", [*common, *ours, *val, *teacher, "--run_dir", tmp_path / "run"]),
    ):
        with pytest.raises(UserError, match=r"class 2 of .* is 10, of .* it is 02"):
            run_here(command, *words)
    assert not any(tmp_path.iterdir())
    run_here("cache_logits", *cache, *others, *BY_NAME, "--store", tmp_path / "store")
    taught = [*student, *others, *val, "--log_every", 1, "--teacher.store", tmp_path / "store"]
    with pytest.raises(UserError, match="class 2 of"):
        run_here("distill", *taught)
    run_here("distill", *taught, *BY_NAME)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["teacher_top1"] > 50
    assert store_main(["verify", *map(str, [tmp_path / "store", *teacher, *others])]) == 0


def test_images_of_two_files_that_are_the_same_pixel_for_pixel_are_counted(folders, capsys):
    images = {"train": str(folders["same"]), "val": str(folders["unpadded"]), "map_classes": "by_name"}
    open_images(TrainDataConfig(**images), "train", "val")
    found = capsys.readouterr().out
    assert "warning: 24 of the 24 images of data.val are in data.train too, pixel for pixel" in found
    open_images(TrainDataConfig(**{**images, "train": str(folders["train"])}), "train", "val")
    assert "pixel for pixel" not in capsys.readouterr().out

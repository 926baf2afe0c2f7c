"""Small image folders in the layouts that are read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.data_prep import photo, save


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 photographs of different sizes in three unequal classes."""
    root = tmp_path_factory.mktemp("photos")
    for name, count in {"ant": 120, "bee": 60, "cat": 20}.items():
        for i in range(count):
            save(root / name / f"{i:03}.jpg", photo(24 + i % 7, 32 + i % 5, seed=1000 * count + i))
    return root


@pytest.fixture
def own_photos(tmp_path: Path, photos: Path) -> Path:
    """Those, to be spoilt."""
    return Path(shutil.copytree(photos, tmp_path / "photos"))


@pytest.fixture
def tiny_imagenet(tmp_path: Path) -> Path:
    root = tmp_path / "tiny-imagenet-200"
    wnids = ["n03", "n01", "n02"]
    for wnid in wnids:
        for i in range(2):
            save(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", photo(64, 64, seed=int(wnid[1:]) + i))
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    lines = []
    for i, wnid in enumerate(["n02", "n02", "n03", "n01"]):
        save(root / "val" / "images" / f"val_{i}.JPEG", photo(64, 64, seed=50 + i))
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t63\t63\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (root / "words.txt").write_text("n00\tentity\nn01\ttench, Tinca tinca\nn02\tgoldfish\n")
    return root


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    root = tmp_path / "imagenet"
    for split, count in (("train", 3), ("val", 1)):
        for label, wnid in enumerate(("n01440764", "n01443537")):
            for i in range(count):
                pixels = photo(40 + i, 50, seed=100 * count + 10 * label + i)
                save(root / split / wnid / f"{wnid}_{i}.JPEG", pixels)
    return root

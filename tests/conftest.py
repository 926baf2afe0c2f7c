"""Real data, by real commands: small .beton files of Fashion-MNIST and of photographs, a teacher, its logit stores."""

from __future__ import annotations

import os
from pathlib import Path

# One thread a process, also for the tests in this one: more than there are cores wait for each other spinning.
os.environ["OMP_NUM_THREADS"] = "1"

import shutil

import pytest

from tests.helpers.commands import run
from tests.helpers.photographs import write_photographs
from tests.helpers.shared import make_once
from tests.helpers.stores import cache_options


@pytest.fixture(scope="session")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Fashion-MNIST: 1201 training images (no batch size divides them), 301 held-out ones, 200 test images."""

    def make(folder: Path) -> None:
        for split, subset in (("train", 1201), ("holdout", 301), ("test", 200)):
            options = ("--dataset", "fashion_mnist", "--split", split, "--subset", subset, "--holdout", "0.1")
            run("data_prep.write_beton", *options, "--out", folder / f"{split}.beton")

    folder = make_once(tmp_path_factory, "fashion", make)
    return {split: folder / f"{split}.beton" for split in ("train", "holdout", "test")}


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """101 photographs of different sizes in three classes, half of them JPEG in the .beton file."""

    def make(folder: Path) -> None:
        write_photographs(folder / "images", {"ash": 40, "beech": 30, "cedar": 31})
        write_photographs(folder / "others", {"ash": 10, "beech": 10, "cedar": 10}, seed=1)
        for root, name in (("images", "photographs"), ("others", "others")):
            options = ("--root", folder / root, "--split", "test", "--write-mode", "proportion")
            run("data_prep.write_beton", "--dataset", "imagefolder", *options, "--out", folder / f"{name}.beton")

    return make_once(tmp_path_factory, "photographs", make) / "photographs.beton"


@pytest.fixture(scope="session")
def other_photographs(photographs: Path) -> Path:
    """30 more of them."""
    return photographs.with_name("others.beton")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, fashion: dict[str, Path]) -> Path:
    """A resnet8 trained by two processes, with checkpoints after epochs 1, 2 and 3."""

    def make(folder: Path) -> None:
        data = ("--data.train", fashion["train"], "--data.val", fashion["holdout"], "--data.batch_size", 64)
        run(
            "ckd_dist.train_teacher", *data, "--model.name", "resnet8", "--epochs", 3, "--save_every", 1,
            "--optim.lr", 0.05, "--optim.warmup_epochs", 1, "--run_dir", folder / "run", nproc=2,
        )  # fmt: skip

    return make_once(tmp_path_factory, "teacher", make) / "run"


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, fashion: dict[str, Path], teacher: Path) -> Path:
    """Dense logits of all three checkpoints, two views, written by one process in batches of 64."""

    def make(folder: Path) -> None:
        run("ckd_dist.cache_logits", *cache_options(fashion, teacher, folder / "store"))

    return make_once(tmp_path_factory, "store", make) / "store"


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    """A copy of the shared store, to be damaged."""
    return Path(shutil.copytree(store, tmp_path / "copy"))


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory: pytest.TempPathFactory, fashion: dict[str, Path], store: Path) -> Path:
    """The shared store with the last checkpoint of a second run, `other`, in it; beside it that run."""

    def make(folder: Path) -> None:
        path = shutil.copytree(store, folder / "store")
        model = ("--model.name", "resnet8", "--epochs", 1, "--seed", 1, "--run_dir", folder / "run")
        run("ckd_dist.train_teacher", "--data.train", fashion["train"], "--data.batch_size", 64, *model)
        run("ckd_dist.cache_logits", *cache_options(fashion, folder / "run", path, "--teacher.name", "other"))

    return make_once(tmp_path_factory, "two_runs", make) / "store"


LONGEST = [
    "launch/test_jobs.py",
    "launch/test_job_failures.py",
    "core/test_identity.py",
    "train/test_training.py",
    "search/test_race.py",
    "search/test_processes.py",
    "train/test_resume.py",
    "launch/test_pipeline.py",
    "selection/test_choice.py",
    "data/test_classes.py",
    "train/test_distill.py",
    "examples/test_examples.py",
    "search/test_side_by_side.py",
    "store/test_interruptions.py",
    "store/test_ahead.py",
    "store/test_damage.py",
]
"""Files whose tests take longest: workers, which take a file at a time, had better begin with them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of `LONGEST` first."""
    order = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))

"""Real data, real commands: small .beton files of Fashion-MNIST and of photographs, a teacher and its logit store;
running and killing commands."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# One thread a process, also for the tests in this one: more than there are cores wait for each other spinning.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import psutil
import pytest
from filelock import FileLock
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
VIEWS, SHARD = 2, 250
"""Of the store that tests share."""


def command_line(module: str, *arguments: object, nproc: int = 0) -> list[str]:
    """`python -m module` or, with `nproc`, the same under torchrun; a path ending in .py is a program of the tests."""
    target = [module] if module.endswith(".py") else ["-m", module]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc else []
    return [sys.executable, *launcher, *target, *map(str, arguments)]


def run(
    module: str,
    *arguments: object,
    nproc: int = 0,
    status: int = 0,
    env: dict[str, str] = ENVIRONMENT,
    cwd: Path = ROOT,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and check its exit status."""
    done = subprocess.run(
        command_line(module, *arguments, nproc=nproc),
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
        cwd=cwd,
    )
    assert done.returncode == status, f"exit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL a launcher and all its ranks at one moment."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            pass
    psutil.wait_procs(family, timeout=30)
    process.wait(timeout=30)


def kill_and_repeat(
    command: list[str], progress: Callable[[], int], kills: list[int], seed: int = 0, longest: float = 0.1
) -> None:
    """Start `command`, SIGKILL all its processes a random moment, at most `longest` seconds, after `progress()` first
    reaches each value of `kills`, start it again, and let it end."""
    moment = random.Random(seed)
    for target in kills:
        process = subprocess.Popen(
            command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        started = time.monotonic()
        while progress() < target:
            assert process.poll() is None, f"the command ended before it could be killed at {target}"
            assert time.monotonic() - started < 200
            time.sleep(0.002)
        time.sleep(moment.uniform(0, longest))
        assert process.poll() is None, f"the command ended before it could be killed at {target}"
        kill_tree(process)
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def count_lines(path: Path) -> int:
    """Lines of a file, 0 when it is not there."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def write_photographs(root: Path, counts: dict[str, int], seed: int = 0) -> None:
    """An image folder: smooth, noisy JPEG photographs of different sizes, one colour range a class."""
    rng = np.random.default_rng(seed)
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            height, width = rng.integers(40, 120, 2)
            y, x = np.mgrid[0:height, 0:width]
            wave = np.sin(x / (3 + 4 * label) + rng.uniform(0, 6)) * np.cos(y / (5 + 3 * label))
            image = 128 + 90 * wave[..., None] * np.roll([1.0, 0.3, -0.6], label) + rng.normal(0, 8, (height, width, 3))
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / name / f"{i:03d}.jpg", quality=92)


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The session's folder `name`, filled by `make(folder)` in whichever of pytest-xdist's workers asks first."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / "shared" / name
    finished = folder.with_name(f"{name}.finished")
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_name(f"{name}.lock")):
        if not finished.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            finished.touch()
    return folder


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


def cache_options(fashion: dict[str, Path], teacher: Path, store: Path, *more: object) -> list[str]:
    """Options of cache_logits for the store that tests share, later ones winning."""
    words = ["--data.train", fashion["train"], "--teacher.run", teacher, "--store", store, "--views", VIEWS]
    return [str(word) for word in [*words, "--shard_size", SHARD, "--data.batch_size", 64, *more]]


def contents(store: Path) -> dict[str, str]:
    """sha256 of every file of a folder."""
    files = sorted(path for path in store.rglob("*") if path.is_file())
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


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


LONGEST = ["test_job_failures", "test_launch", "test_training", "test_search", "test_selection", "test_store"]
"""Files whose tests take longest: workers, which take a file at a time, had better begin with them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of `LONGEST` first."""
    order = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))

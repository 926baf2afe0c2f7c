"""Writing .beton files and reading them again, in this process or in one that it forks."""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from PIL import Image

from data_prep import write_beton

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
needs_fashion_mnist = pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")


def write(*argv: object) -> SimpleNamespace:
    """Runs the command line in this process (its workers are processes) and returns status, out, err."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status: object = write_beton.main([str(word) for word in argv])
        except SystemExit as stop:  # argparse's way
            status = stop.code
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())


class Fork:
    """A process that this one forks: it has imported FFCV already. Its stdout and stderr go to `log`.out and .err."""

    def __init__(self, work: Callable[[], object], log: Path) -> None:
        self.log, self.work = log, work
        self.process = multiprocessing.get_context("fork").Process(target=self._run)
        self.process.start()

    def _run(self) -> None:
        with self.log.with_suffix(".out").open("w") as out, self.log.with_suffix(".err").open("w") as err:
            sys.stdout, sys.stderr = out, err
            self.work()

    def wait(self) -> SimpleNamespace:
        """Its status, out and err; killed after a minute."""
        self.process.join(60)
        self.process.kill()
        self.process.join()
        out, err = (self.log.with_suffix(end).read_text() for end in (".out", ".err"))
        return SimpleNamespace(status=self.process.exitcode, out=out, err=err)


def run_as_program(argv: list[str]) -> None:
    """`python -m data_prep.write_beton` in this process."""
    sys.argv[1:] = argv
    del sys.modules["data_prep.write_beton"]
    runpy.run_module("data_prep.write_beton", run_name="__main__", alter_sys=True)


def with_companions(*names: str) -> set[str]:
    """The names of all files that are written with these."""
    return {f"{name}{ending}" for name in names for ending in ("", ".json", ".digests.npy")}


def write_folder(root: Path, out: Path, *argv: object, split: str = "test") -> dict:
    """Writes an image folder and returns its JSON."""
    result = write("--dataset", "imagefolder", "--root", root, "--split", split, "--out", out, *argv)
    assert result.status == 0, result.err
    return json.loads(Path(f"{out}.json").read_text())


def read_written(root: Path, out: Path, *argv: object) -> SimpleNamespace:
    """Writes an image folder and reads it."""
    write_folder(root, out, *argv)
    return read(out)


def read(path: Path) -> SimpleNamespace:
    """A .beton's images (list of uint8 arrays), labels and JPEG flags, by FFCV's Reader and PIL."""
    from ffcv.reader import Reader

    reader = Reader(str(path))
    data = path.read_bytes()
    assert list(reader.handlers) == ["image", "label"]
    size = {int(row["sample_id"]): int(row["size"]) for row in reader.alloc_table}
    images, jpeg = [], []
    for i, row in enumerate(reader.metadata["f0"]):
        stored = data[int(row["data_ptr"]) : int(row["data_ptr"]) + size[i]]
        jpeg.append(row["mode"] == 0)
        if jpeg[-1]:
            images.append(np.array(Image.open(io.BytesIO(stored))))
        else:
            images.append(np.frombuffer(stored, np.uint8).reshape(row["height"], row["width"], 3))
    return SimpleNamespace(images=images, labels=reader.metadata["f1"].tolist(), jpeg=jpeg)


def photo(height: int, width: int, seed: int) -> np.ndarray:
    """A smooth gradient with some noise: uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    planes = [255 * (a * y + (1 - a) * x) for a in rng.random(3)]
    return np.clip(np.stack(planes, -1) + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def idx_images(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Fashion-MNIST by hand: uint8 [N, 28, 28] and labels [N]."""
    images = gzip.decompress((DEBIAN / f"{kind}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((DEBIAN / f"{kind}-labels-idx1-ubyte.gz").read_bytes())
    return np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def assert_refused(result: SimpleNamespace, start: str, *also: str) -> None:
    """Status 2 and one line of error that begins so; nothing on stdout, no traceback."""
    assert result.status == 2, result
    lines = [line for line in result.err.splitlines() if ", classes: " not in line]  # what it set out to write
    assert len(lines) == 1 and lines[0].startswith(start), result.err
    for text in also:
        assert text in lines[0]
    assert result.out == ""


def pipes(tmp_path: Path) -> list[str]:
    """A command line whose two workers wait for ever: its images are named pipes that nobody writes to."""
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    for i in range(128):
        os.mkfifo(tmp_path / "in" / "a" / f"{i}.jpg")
    argv = ["--dataset", "imagefolder", "--root", str(tmp_path / "in"), "--split", "test"]
    return [*argv, "--out", str(tmp_path / "out" / "x.beton"), "--workers", "2"]


def wait_for_workers(pid: int, known: frozenset[int] = frozenset()) -> list[int]:
    """The two workers of the process, once both are there and wait. `known`: children to leave out."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        workers = {child: status for child, status in forks(pid).items() if child not in known}
        if list(workers.values()) == [psutil.STATUS_SLEEPING] * 2:
            return list(workers)
        time.sleep(0.05)
    raise AssertionError(f"no workers of {pid}")


def forks(pid: int) -> dict[int, str]:
    """Children that run the same command line, not multiprocessing's resource tracker, and what each does."""
    process = psutil.Process(pid)
    command, found = process.cmdline(), {}
    for child in process.children():
        with suppress(psutil.NoSuchProcess):  # what an import starts is soon gone
            if child.cmdline() == command:
                found[child.pid] = child.status()
    return found

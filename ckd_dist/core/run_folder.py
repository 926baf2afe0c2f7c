"""The folder of a run and its records: options, origin, environment, metrics, summary."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from ckd_dist.core import dist
from ckd_dist.core.console import say
from ckd_dist.core.errors import UserError, require
from ckd_dist.core.files import errors_name, lock, read_json, require_regular, write_bytes_atomically
from ckd_dist.core.identity import RESULTS, Origin, require_same
from ckd_dist.core.log_hook import LogHook


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What summary.json tells at least."""

    epochs: int
    steps: int
    train_seconds: float
    side_by_side: int
    images_per_s: float
    top1: float | None = None
    """Percent, as top5; None where there was no data.val."""
    top5: float | None = None
    loss: float | None = None


def read_summary(folder: Path) -> Summary | None:
    """The final figures of a run, None until there are any; raises `UserError` where the file is damaged."""
    path = folder / "summary.json"
    if not path.exists():
        return None
    return read_json(path, Summary, "run_dir", "remove it, and the run's command writes it again")


def is_complete(folder: Path, origin: Origin) -> bool:
    """Whether the run in `folder` is at its end; raises `UserError` where it is one of another origin."""
    if not require_same(folder, origin):
        _say_older(folder)
    if any((folder / name).exists() for name in RESULTS):
        return True
    summary = read_summary(folder)
    return summary is not None and summary.epochs == origin.options["epochs"]


_older: list[Path] = []


def _say_older(folder: Path) -> None:
    """Once a command."""
    if not _older:
        say(f"{folder}: of an older version, which did not keep what its inputs held: they are taken to be the same")
    _older.append(folder)


class RunFolder:
    """The folder of one run. Only rank 0 writes; on other ranks every method does nothing.

    Unless the run is complete, rank 0's process works in it alone, until it is complete or the process ends, however
    that comes about.
    """

    def __init__(self, path: str, origin: Origin, *, tensorboard: bool = False, log_to: str | None = None):
        """Create the folder with config.yaml, lineage.json and env.json, or go on in it.

        Collective. `log_to` names a function that rank 0 calls with every line, see `LogHook`. Raises `UserError` on
        every rank when the folder holds a run of another origin, or another process is at work in it, or there is no
        such function.
        """
        self.path = Path(path)
        self._writer: Any = None
        self._hook: LogHook | None = None
        dist.on_main(lambda: self._load_hook(log_to))
        self.complete = dist.on_main(lambda: self._prepare(origin))
        """Whether nothing is left to do."""
        self._tensorboard = dist.rank() == 0 and tensorboard
        require(
            not self._tensorboard or importlib.util.find_spec("tensorboard") is not None,
            "tensorboard: not installed; pip install 'ckd_dist[tensorboard]'",
        )

    def _prepare(self, origin: Origin) -> bool:
        if is_complete(self.path, origin):
            return True  # its environment was that of then
        self.path.mkdir(parents=True, exist_ok=True)
        _lock(self.path)
        if is_complete(self.path, origin):  # by one who held the lock until now
            _unlock(self.path)
            return True
        origin.write(self.path)
        self._write("env.json", json.dumps(environment(), indent=2) + "\n")
        (self.path / "summary.json").unlink(missing_ok=True)  # of fewer epochs
        return False

    def _load_hook(self, log_to: str | None) -> None:
        if log_to:
            self._hook = LogHook(log_to)

    def rewind(self, step: int) -> None:
        """Forget the metrics of steps after `step`: the run goes on from there. Collective; raises `UserError` where
        the file is damaged."""
        dist.on_main(lambda: self._rewind(step))
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # What fails in its thread is raised in `log`, and need not be shown twice.
            shown = threading.excepthook
            threading.excepthook = lambda failed: (
                None if "tensorboard" in type(failed.thread).__module__ else shown(failed)
            )
            with errors_name(self.path):
                self._writer = SummaryWriter(str(self.path), purge_step=step + 1)

    def _rewind(self, step: int) -> None:
        record = self.path / "metrics.jsonl"
        if not record.exists():
            return
        require_regular(record, "run_dir")
        before, kept = record.read_bytes(), b""
        for number, line in enumerate(before.splitlines(keepends=True), start=1):
            found = _step_of(line)
            require(
                found is not None or not line.endswith(b"\n"),
                f"run_dir: {record} is damaged: remove its line {number}, or the file",
            )
            if found is None or found > step:  # None: cut short by a kill or a full disk
                break
            kept += line.rstrip(b"\n") + b"\n"
        if kept != before:
            write_bytes_atomically(record, kept)

    def log(self, split: str, step: int, epoch: int, **values: float) -> None:
        """Append one JSON object to metrics.jsonl, and tell the user's function, if there is one."""
        if dist.rank():
            return
        record = self.path / "metrics.jsonl"
        with errors_name(record), open(record, "a", encoding="utf-8") as file:
            file.write(json.dumps({"split": split, "step": step, "epoch": epoch, **values}) + "\n")
        if self._writer is not None:
            with errors_name(self.path / "events.out.tfevents"):
                for name, value in values.items():
                    self._writer.add_scalar(f"{split}/{name}", value, step)
                self._writer.flush()  # a process may end without notice
        if self._hook is not None:
            self._hook({"run": str(self.path), "split": split, "step": step, "epoch": epoch, **values})

    def write_summary(self, values: dict) -> None:
        """Write summary.json, the final figures: the run is complete."""
        if dist.rank() == 0:
            self._write("summary.json", json.dumps(values, indent=2) + "\n")
            _unlock(self.path)

    def _write(self, name: str, text: str) -> None:
        write_bytes_atomically(self.path / name, text.encode())


_locked: dict[Path, IO] = {}
"""The open lock file of every folder that this process works in."""


def _lock(folder: Path) -> None:
    """Lock the file `.lock` for this process; raises `UserError` where another one has it.

    The file stays for good: who removed it might do so just when somebody has opened it to lock it.
    """
    _unlock(folder)  # of an earlier try of this process
    file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115  closed by _unlock
    if not lock(file):
        file.seek(0)
        who = " ".join(file.read(200).split()) or "another process"
        raise UserError(f"run_dir: {folder} is in use by {who}: wait until it ends, or choose another run_dir")
    _locked[folder.resolve()] = file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()


def _unlock(folder: Path) -> None:
    file = _locked.pop(folder.resolve(), None)
    if file is not None:
        file.close()


def _step_of(line: bytes) -> int | None:
    """Of a line of metrics.jsonl; None where it is none."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def environment() -> dict:
    """What a result depends on beside the configuration: command, commit, versions, machine."""
    names = ("ckd_dist", "torch", "torchvision", "ffcv", "numpy", "numba")
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    source = Path(__file__).parent
    copied = source.parent / "commit.json"  # of the copy that a job of `launch` runs
    if copied.exists():
        code = json.loads(copied.read_text(encoding="utf-8"))
    else:
        code = {
            "commit": _git("rev-parse", "HEAD", cwd=source),
            "dirty": bool(_git("status", "--porcelain", cwd=source)),
        }
    return {
        "command": [sys.executable, *sys.orig_argv[1:]],
        **code,
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "world_size": dist.world_size(),
    }


def _cpu() -> str:
    """The processor's name, where Linux tells it."""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if found := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            return found[1]
    return platform.machine()


def _git(*arguments: str, cwd: Path) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=cwd, capture_output=True, encoding="utf-8", errors="replace", timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

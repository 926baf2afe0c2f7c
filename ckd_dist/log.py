"""What a run leaves and what it shows: the run folder with its records, and a progress bar or plain lines."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ckd_dist import dist
from ckd_dist.config import UserError, flatten, require
from ckd_dist.files import write_bytes_atomically

# Settings that may differ when a run goes on: they change how it is done, not what comes out.
_FREE = ("data.workers", "data.os_cache", "data.verify", "save_last_every", "log_every", "tensorboard")


def saved_options(folder: Path) -> dict[str, Any]:
    """The options of the run in `folder`, with dotted keys; empty where there is none."""
    saved = folder / "config.yaml"
    return flatten(yaml.safe_load(saved.read_text()) or {}) if saved.exists() else {}


def require_same_options(folder: Path, config: dict) -> None:
    """Raise `UserError` when `folder` holds a run of another configuration."""
    old, new = saved_options(folder), flatten(config)
    if not old:
        return
    for key in sorted((old.keys() | new.keys()) - set(_FREE)):
        require(
            old.get(key) == new.get(key),
            f"run_dir: {folder} holds a run with {key} {old.get(key)}, not {new.get(key)}: "
            "repeat its options to go on, or choose another run_dir",
        )


class RunFolder:
    """The folder of one run. Only rank 0 writes; on other ranks every method does nothing."""

    def __init__(self, path: str, config: dict, *, tensorboard: bool = False):
        """Create the folder with config.yaml and env.json, or go on in it.

        Collective. Raises `UserError` on every rank when it holds a run with another configuration.
        """
        self.path = Path(path)
        self._writer: Any = None
        dist.on_main(lambda: self._prepare(config))
        if dist.rank() == 0 and tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("tensorboard: not installed; pip install 'ckd_dist[tensorboard]'") from None
            self._writer = SummaryWriter(str(self.path))

    def _prepare(self, config: dict) -> None:
        require_same_options(self.path, config)
        self.path.mkdir(parents=True, exist_ok=True)
        if self.summary is not None:
            return  # complete: its environment was that of then
        self._write("config.yaml", yaml.safe_dump(config, sort_keys=False))
        self._write("env.json", json.dumps(environment(), indent=2) + "\n")

    def rewind(self, step: int) -> None:
        """Forget the metrics of steps after `step`: the run goes on from there."""
        record = self.path / "metrics.jsonl"
        if dist.rank() == 0 and record.exists():
            lines = record.read_text().splitlines(keepends=True)
            self._write("metrics.jsonl", "".join(line for line in lines if _step_of(line) <= step))

    def log(self, split: str, step: int, epoch: int, **values: float) -> None:
        """Append one JSON object to metrics.jsonl."""
        if dist.rank():
            return
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"split": split, "step": step, "epoch": epoch, **values}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{split}/{name}", value, step)
            self._writer.flush()  # a process may end without notice

    def write_summary(self, values: dict) -> None:
        """Write summary.json, the final figures."""
        if dist.rank() == 0:
            self._write("summary.json", json.dumps(values, indent=2) + "\n")

    @property
    def summary(self) -> dict | None:
        """The final figures, if the run is complete."""
        path = self.path / "summary.json"
        return json.loads(path.read_text()) if path.exists() else None

    def _write(self, name: str, text: str) -> None:
        write_bytes_atomically(self.path / name, text.encode())


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # a line cut short by a kill


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
        code = json.loads(copied.read_text())
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
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "world_size": dist.world_size(),
    }


def _git(*arguments: str, cwd: Path) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# ------------------------------------------------------------------------------------------- screen


def say(message: str) -> None:
    """Print a line on rank 0."""
    if dist.rank() == 0:
        _console.print(message, markup=False, highlight=False, soft_wrap=True)


_console = Console()


class ProgressDisplay:
    """Progress of a long work on rank 0: a bar with rate and time left on a terminal, else a plain line every
    `interval` seconds. On other ranks it shows nothing."""

    def __init__(self, total: int, *, unit: str = "images", done: int = 0, interval: float = 10.0):
        self.total, self.unit, self.interval = total, unit, interval
        self._first = done
        self._started = self._printed = time.perf_counter()
        self._shown = dist.rank() == 0
        self._bar: Progress | None = None
        if self._shown and _console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=_console,
            )
            self._task = self._bar.add_task("starting", total=total, completed=done, note="")
            self._bar.start()

    def update(self, done: int, description: str, note: str = "") -> None:
        """Show that `done` of `total` units are done."""
        if not self._shown:
            return
        now = time.perf_counter()
        rate = (done - self._first) / max(1e-9, now - self._started)
        if self._bar is not None:
            note = f"{note}  {format_rate(rate)} {self.unit}/s".strip()
            self._bar.update(self._task, completed=done, description=description, note=note)
        elif now - self._printed >= self.interval:
            self._printed = now
            left = (self.total - done) / rate if rate else 0
            share = 100 * done / max(1, self.total)
            say(f"{description}  {share:.0f} %  {note}  {format_rate(rate)} {self.unit}/s  {format_seconds(left)} left")

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def format_rate(rate: float) -> str:
    """Whole numbers, and two digits of small ones."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def format_seconds(seconds: float) -> str:
    """h:mm:ss, or m:ss under an hour."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

"""What a command shows: plain lines, and progress as a bar or as lines."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ckd_dist.core import dist


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

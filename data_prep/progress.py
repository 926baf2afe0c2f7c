"""One progress line: redrawn in place on a terminal, written now and then into a pipe or a log."""

import sys
import time
from datetime import timedelta
from types import TracebackType

REDRAW_SECONDS = 0.1
LOG_SECONDS = 10.0


class Progress:
    """Shows done/total, rate and time left on stderr; a context manager around the work.

    Args:
        verb: what is being done, e.g. "writing".
        total: number of images.
    """

    def __init__(self, verb: str, total: int) -> None:
        self.verb = verb
        self.total = total
        self.done = 0
        self.terminal = sys.stderr.isatty()
        self.start = self.shown = time.monotonic()

    def update(self, done: int) -> None:
        """Says that `done` images are finished; cheap enough to call for every image."""
        self.done = done
        now = time.monotonic()
        if now - self.shown >= (REDRAW_SECONDS if self.terminal else LOG_SECONDS):
            self.shown = now
            self._show()

    def _show(self) -> None:
        seconds = max(time.monotonic() - self.start, 1e-6)
        rate = self.done / seconds
        percent = 100 * self.done // self.total
        left = str(timedelta(seconds=round((self.total - self.done) / rate))) if self.done else "-:--:--"
        line = f"{self.done:,}/{self.total:,} images  {rate:,.0f} images/s  {left} left"
        if self.terminal:
            bar = ("#" * (percent // 5)).ljust(20, ".")
            # Erase to the end of the line: a shorter text must not leave the tail of a longer one.
            print(f"\r{self.verb:7} [{bar}] {percent:3d} %  {line}\033[K", end="", file=sys.stderr, flush=True)
        else:
            print(f"{self.verb} {percent} %  {line}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.terminal:
            if kind is None:
                self._show()
            print(file=sys.stderr)

"""Signals that end the program: as an exception, so that workers and unfinished files go, and not in places that would
lose it."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


def exit_on_termination() -> None:
    """SIGTERM and SIGHUP, unless it is ignored as under nohup, end the program with `SystemExit`, status 128 + n."""
    signal.signal(signal.SIGTERM, _exit)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _exit)


def _exit(number: int, frame: Any) -> NoReturn:
    sys.exit(128 + number)


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Has signals that end the program wait for the end of the block, where an exception of theirs would be lost: numba
    calls Python back while it compiles, and so does a fork."""
    came: list[int] = []
    # Not blocked: a thread of a library's would take them then, and have them handled here all the same.
    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in ends}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for arrived in came:
            signal.raise_signal(arrived)

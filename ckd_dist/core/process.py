"""A process of a user's command: how it starts, the signals that stop it, and what it leaves on stderr."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from ckd_dist.core.errors import TrainingError, UserError
from ckd_dist.core.options import load_config

T = TypeVar("T")

STOPPED = 75
"""Exit status of a command that SIGUSR2 stopped; the same command goes on where it was (EX_TEMPFAIL of sysexits.h)."""
PEER_LOST = 76
"""Exit status of a rank that has lost another one: not its own fault, and perhaps only a node's (EX_PROTOCOL)."""
INTERRUPTED = 130
"""Exit status of a command that Ctrl-C stopped, as shells have it."""
PARENT = "CKD_DIST_PARENT"
"""Environment variable: id of the process that starts this one and is to take it along, see `begin`."""


def run_command(main: Callable[[T], None], cls: type[T], module: str) -> NoReturn:
    """Run an entry point with the options of the command line as a process of a user's command, see `run_process`."""

    def read_and_run() -> None:
        if int(os.environ.get("RANK", "0")) and {"-h", "--help"} & set(sys.argv):
            raise SystemExit(0)
        main(load_config(cls, prog=f"python -m {module}", description=main.__globals__["__doc__"]))

    run_process(read_and_run, interrupted="stopped by Ctrl-C: the same command goes on")


def run_process(main: Callable[[], int | None], *, interrupted: str = "stopped by Ctrl-C") -> NoReturn:
    """Call `main` and end the process with the status that it returns.

    SIGUSR2, a scheduler's warning, ends rank 0 with status `STOPPED`, and Ctrl-C every rank with `INTERRUPTED`, rank 0
    with the line `interrupted`: at once, unless the command is in a `StopRequest`. Other ranks ignore SIGUSR2 and end
    when rank 0 is gone, with status `PEER_LOST`. A second Ctrl-C ends the process whatever it is at.

    Bad input is one line on stderr and status 2. Input is bad on every rank of a node alike, so the first of them
    alone speaks; what befalls one rank only (a full disk, a bug) that rank reports, with its number. Always ends the
    process at once: a rank that fails must not wait for its peers, its loader threads or a collective.
    """
    begin()
    rank = int(os.environ.get("RANK", "0"))
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    status = 0
    signal.signal(signal.SIGUSR2, signal.SIG_IGN if rank else lambda *_: os._exit(STOPPED))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # which it is not in the background of a shell
        signal.signal(signal.SIGINT, _interrupt)
    try:
        status = main() or 0
    except UserError as error:
        status = 2
        if speaks:
            print(f"error: {error}", file=sys.stderr)
        else:
            time.sleep(3)  # torchrun ends all at the first failure: let the one that speaks be first
    except TrainingError as error:
        status = 1
        if speaks:
            print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        status = 2
        where = f": {error.filename}" if error.filename else ""
        print(f"error: rank {rank}: {error.strerror or error}{where}", file=sys.stderr)
    except KeyboardInterrupt:
        status = INTERRUPTED
        if rank == 0:
            print(interrupted, file=sys.stderr)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        status = 1
        if _peer_is_lost(error):
            status = PEER_LOST
            print(f"error: rank {rank}: stopped, another rank has failed", file=sys.stderr)
        else:
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def begin() -> None:
    """What a process of a command does first, in whatever locale, and whoever started it."""
    if sys.getfilesystemencoding() != "utf-8":  # "é" in a file of options could name no path
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that a terminal cannot show is no error
    _end_with_parent()


def _peer_is_lost(error: BaseException | None) -> bool:
    """Whether this is what a collective raises once another rank has gone."""
    lost = r"Connection (closed|reset) by peer|Broken pipe|ncclRemoteError"
    return isinstance(error, RuntimeError) and bool(re.search(lost, str(error)))


# ------------------------------------------------------------------------------------------- signals


def _interrupt(*_: object) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next one ends the process, even in the middle of a C function
    raise KeyboardInterrupt


class StopRequest:
    """While it is entered, SIGUSR2 and SIGINT (Ctrl-C), or those of them that are given, are only noted: the command is
    at something that it can bring to a point where it saves. A second Ctrl-C ends the process at once.

    A signal that the command has not heeded by the end is raised again then, for whoever handled it before. So it is
    where another rank is lost meanwhile, which may have had the signal too.
    """

    def __init__(self, *numbers: signal.Signals) -> None:
        self._numbers = numbers or (signal.SIGUSR2, signal.SIGINT)
        self.signal: signal.Signals | None = None
        """What came last, if anything."""

    def __enter__(self) -> StopRequest:
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # by a shell, which has it in the background
        numbers = [number for number in self._numbers if number != signal.SIGINT or not ignored]
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def _note(self, number: int, _: object) -> None:
        self.signal = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.signal is not None and (error is None or _peer_is_lost(error)):
            signal.raise_signal(self.signal)

    @property
    def name(self) -> str:
        """As users know it."""
        return "Ctrl-C" if self.signal == signal.SIGINT else "SIGUSR2"

    @property
    def status(self) -> int:
        """Exit status of a command that heeds it."""
        return INTERRUPTED if self.signal == signal.SIGINT else STOPPED


# ------------------------------------------------------------------------------------------- parents


def _end_with_parent() -> None:
    """Have this process end within a second of the one that started it, where that is torchrun or gave its id as
    `PARENT`; every other process outlives its parent as usual, under nohup, say.

    A thread looks who the parent is. The kernel would tell (PR_SET_PDEATHSIG), but when the parent's *thread* ends.
    """
    given = os.environ.pop(PARENT, None)  # for this process, not for those that it starts
    if given is None and "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid() if given is None else int(given)
    if given is None and _is_orphan(parent):
        os._exit(1)

    def watch() -> None:
        while os.getppid() == parent:  # not so from the start where it died before this process came here
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _is_orphan(parent: int) -> bool:
    """Whether torchrun died before its rank came here: the rank is init's now, and init is not torchrun, as it may be
    in a container."""
    try:
        return parent == 1 and b"python" not in Path("/proc/1/cmdline").read_bytes()
    except OSError:
        return False

"""Jobs on this machine: their states. submitit starts them, each under a process of its own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from launch.slurm import State, read_result


class LocalWatch:
    """As `launch.slurm.Watch`, of jobs whose ids are those of their processes."""

    def __init__(self, results: dict[str, Path]):
        self._results = dict(results)

    def look(self) -> dict[str, State]:
        """Every job's state."""
        return {job: self._state(job) for job in self._results}

    settle = look

    def follow(self, interval: float = 0.2) -> Iterator[dict[str, State]]:
        """`look` until all jobs are over."""
        while True:
            states = self.look()
            yield states
            if all(state.final for state in states.values()):
                return
            time.sleep(interval)

    def _state(self, job: str) -> State:
        if is_running(job):  # first: the result stands before the process is gone
            return State("running")
        result = read_result(self._results[job])
        if result is None:
            return State("failed", "ended without a result")
        return State("done") if result["status"] == 0 else State("failed", f"exit status {result['status']}")


def is_running(job: str) -> bool:
    """Whether the process is there and is a job's: submitit's, or still our own child that becomes it."""
    try:
        state, parent = (
            Path(f"/proc/{job}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:2]
        )
        command = Path(f"/proc/{job}/cmdline").read_bytes()
    except OSError:
        return False
    return state != "Z" and (b"submitit.local._local" in command or int(parent) == os.getpid())


def cancel(jobs: list[str]) -> None:
    """End jobs; trainings save first."""
    for job in jobs:
        if is_running(job):
            os.kill(int(job), signal.SIGTERM)

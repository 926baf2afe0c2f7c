"""Talking to SLURM: the state of jobs in one query, what a cluster allows, cancelling."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ckd_dist.core.errors import UserError, require

WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
FAILED = {"FAILED", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
DOUBT_SECONDS = 30
"""How long a job may be in no queue and without a result before it counts as dead: SLURM may be about to requeue it, a
shared folder may show its result late."""


def command(*words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a SLURM command."""
    return subprocess.run(
        words, capture_output=True, encoding="utf-8", errors="replace", timeout=timeout, stdin=subprocess.DEVNULL
    )


def require_slurm() -> None:
    """Raise `UserError` where there is no SLURM."""
    require(shutil.which("sbatch") is not None, "executor: no sbatch on this machine: log in to the cluster, or give "
            "--executor local")  # fmt: skip
    try:
        done = command("sinfo", "-h", "-o", "%P")
    except subprocess.TimeoutExpired:
        raise UserError("executor: SLURM does not answer within a minute: try later") from None
    error = done.stderr.strip().splitlines()
    require(done.returncode == 0, f"executor: SLURM does not answer: {error[-1] if error else 'sinfo failed'}")


# ------------------------------------------------------------------------------------------- states


@dataclass(frozen=True)
class State:
    """Of a job."""

    name: str
    """pending, running, done, failed or cancelled."""
    note: str = ""

    @property
    def final(self) -> bool:
        """Whether it is over."""
        return self.name in ("done", "failed", "cancelled")

    def __str__(self) -> str:
        return f"{self.name} ({self.note})" if self.note else self.name


class Watch:
    """The states of jobs, from what SLURM says and from the results that jobs leave."""

    def __init__(self, results: dict[str, Path]):
        """`results`: job id (of an array's element: ARRAY_INDEX) -> the file of its result, which may not be there."""
        self._results = dict(results)
        self._states = {job: State("pending") for job in results}
        self._in_doubt: dict[str, float] = {}
        self._accounting = shutil.which("sacct") is not None

    def look(self) -> dict[str, State]:
        """Every job's state, by one squeue and, for jobs that have left the queue, one sacct if the cluster has it."""
        open_jobs = [job for job, state in self._states.items() if not state.final]
        if open_jobs:
            known = self._ask_slurm(open_jobs)
            if known is not None:  # else the controller does not reply: as before
                for job in open_jobs:
                    self._states[job] = self._decide(job, *known.get(job, ("", "")))
        return dict(self._states)

    def settle(self) -> dict[str, State]:
        """`look`, again until no job is in doubt."""
        delays = backoff(1)
        while True:
            states = self.look()
            if not self._in_doubt:
                return states
            time.sleep(next(delays))

    def follow(self, interval: float = 1.0) -> Iterator[dict[str, State]]:
        """`look` until all jobs are over, ever less often while nothing changes."""
        delays, before = backoff(interval), None
        while True:
            states = self.look()
            yield states
            if all(state.final for state in states.values()):
                return
            if states != before:
                delays, before = backoff(interval), states
            time.sleep(next(delays))

    def _ask_slurm(self, jobs: list[str]) -> dict[str, tuple[str, str]] | None:
        try:
            queue = command("squeue", "--me", "-h", "-a", "-r", "-t", "all", "-o", "%i|%T|%r")
        except subprocess.TimeoutExpired:
            return None
        if queue.returncode:
            return None
        known = {}
        for line in queue.stdout.splitlines():
            job, state, reason = line.split("|", 2)
            known[job] = (state, reason)
        gone = [job for job in jobs if job not in known]
        if gone and self._accounting:
            # With its header: it says which column is which, whoever's sacct this is.
            words = ("sacct", "-X", "--parsable2", "-o", "JobID,State", "-j", ",".join(gone))
            try:
                found = command(*words)
            except subprocess.TimeoutExpired:
                return None
            self._accounting = found.returncode == 0
            header, *lines = found.stdout.splitlines() or [""]
            columns = header.split("|")
            for line in lines if self._accounting else []:
                row = dict(zip(columns, line.split("|"), strict=False))
                known.setdefault(row.get("JobID", ""), (row.get("State", "").split(" ")[0], ""))
        return known

    def _decide(self, job: str, slurm: str, reason: str) -> State:
        if slurm in WAITING:
            self._in_doubt.pop(job, None)
            return State("pending", "" if reason in ("None", "Priority", "Resources") else reason)
        result = read_result(self._results[job])
        if result is not None:
            self._in_doubt.pop(job, None)
            return State("done") if result["status"] == 0 else State("failed", f"exit status {result['status']}")
        if slurm in RUNNING:
            self._in_doubt.pop(job, None)
            return State("running")
        if slurm == "CANCELLED":
            return State("cancelled")
        if slurm in FAILED:
            return State("failed", f"{slurm}, no result")
        since = self._in_doubt.setdefault(job, time.monotonic())
        if time.monotonic() - since < DOUBT_SECONDS:
            return self._states[job]
        del self._in_doubt[job]
        return State("failed", f"{slurm or 'not in the queue'}, no result")


def read_result(path: Path) -> dict | None:
    """What a job left: `status`, and if that is not 0, `rank`, `host` and the last `lines` of its stderr."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def backoff(first: float, longest: float = 30.0) -> Iterator[float]:
    """Seconds to wait before each further query."""
    while True:
        yield first
        first = min(longest, 1.5 * first)


def cancel(jobs: list[str]) -> None:
    """Cancel jobs; those that are over stay as they are."""
    for start in range(0, len(jobs), 500):
        command("scancel", *jobs[start : start + 500])


# ------------------------------------------------------------------------------------------- limits


def setting(name: str) -> str | None:
    """A value of the cluster's configuration."""
    found = re.search(rf"^{name}\s*= (.*)$", command("scontrol", "show", "config").stdout, re.MULTILINE)
    return found[1].strip() if found else None


def max_array_size() -> int:
    """Elements that an array may have."""
    return int(setting("MaxArraySize") or 1001)


@dataclass(frozen=True)
class Partition:
    """What a partition has, at most, in a node, and in all."""

    name: str
    gpus: int
    cpus: int
    nodes: int
    minutes: float


def partition(name: str | None) -> Partition:
    """The partition called `name`, or the default one; raises `UserError` where there is none."""
    lines = [line.split("|") for line in command("sinfo", "-h", "-o", "%P|%G|%c|%D|%l").stdout.splitlines()]
    names = list(dict.fromkeys(line[0].rstrip("*") for line in lines))
    wanted = name or next((line[0].rstrip("*") for line in lines if line[0].endswith("*")), None)
    require(
        wanted is not None, f"slurm.partition is missing, the cluster has no default: give one of {', '.join(names)}"
    )
    rows = [line[1:] for line in lines if line[0].rstrip("*") == wanted]
    require(bool(rows), f"slurm.partition: no partition {wanted}: give one of {', '.join(names)}")
    gpus = [sum(map(int, re.findall(r"gpu:(?:[^:,(]+:)?(\d+)", row[0]))) for row in rows]
    cpus = [int(row[1].rstrip("+")) for row in rows]
    return Partition(wanted or "", max(gpus), max(cpus), sum(int(row[2]) for row in rows), _minutes(rows[0][3]))


def _minutes(text: str) -> float:
    """Of SLURM's days-hours:minutes:seconds."""
    if not text[:1].isdigit():
        return float("inf")
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        hours, minutes, seconds = (0, 0, *parts)[-3:] if len(parts) > 1 else (0, parts[0], 0)
    return 1440 * int(days or 0) + 60 * hours + minutes + seconds / 60

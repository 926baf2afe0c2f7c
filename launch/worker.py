"""What every process of a job runs: the command as a child process, its environment, and the scheduler's signals.

It travels to the job inside its pickle, code and constants, and imports nothing else of this package there: edits made
while the job waits change nothing.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import submitit

from ckd_dist.core.process import PARENT, PEER_LOST, STOPPED

RENDEZVOUS_SECONDS = 600
"""For all processes of a job to start: a node may boot first."""
PEER_SECONDS = 900
"""Within which SLURM tells why a rank is gone: it notices a dead node after SlurmdTimeout, 300 s by default."""
RUN_MODULE = """
import runpy, sys
sys.path.insert(0, {code!r})
from ckd_dist.core.process import begin
begin()
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


class Worker:
    """A submitit callable: runs `python -m module words` on this process's rank, from the package copied to `code`.

    At SIGUSR2, which SLURM sends before the time limit or a preemption, rank 0's command stops and saves, and the job
    goes back to the queue, where it finds everything as it left it; after a requeue from outside or a node's failure it
    goes on from what was saved last. A command that fails ends the job, and its last lines on stderr are kept in the
    job's result. The command ends with this process.
    """

    def __init__(self, module: str, words: list[str], code: Path, folder: Path, cores: int, max_restarts: int):
        self.module, self.words, self.code, self.folder = module, words, str(code), str(folder)
        self.cores, self.max_restarts = cores, max_restarts
        self._child: Any = None
        self._stopping = False

    def __call__(self) -> None:
        """Run the command to its end; leaves the process where the job is to end otherwise."""
        job = submitit.JobEnvironment()
        self._slurm = job.cluster == "slurm"
        self._rank, self._job_id = job.global_rank, job.job_id
        self._errors = Path(job.paths.stderr)
        self._errors_start = self._errors.stat().st_size if self._errors.exists() else 0
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        if self._rank == 0:
            self._result.unlink(missing_ok=True)
            if restarts > self.max_restarts:
                self._fail(1, [f"restarted {restarts} times, slurm.max_restarts is {self.max_restarts}: given up"])
        signal.signal(signal.SIGTERM, self._terminate)  # in place of submitit's, which does nothing
        environment = {
            **os.environ,
            "PYTHONPATH": f"{self.code}:{os.environ.get('PYTHONPATH', '')}",
            "CKD_DIST_CORES": str(self.cores),
            PARENT: str(os.getpid()),
        }
        if job.num_tasks > 1:
            environment.update(self._distributed(job, restarts))
        code = RUN_MODULE.format(code=self.code, module=self.module)
        print(f"{socket.gethostname()}: python -m {self.module} {shlex.join(self.words)}", flush=True)
        self._child = subprocess.Popen(
            [sys.executable, "-c", code, *self.words], env=environment, preexec_fn=_ignore_signals
        )
        try:
            status = self._wait()
        finally:
            self._child.kill()
        if status == 0:
            if self._rank == 0:
                write_json(self._result, {"status": 0})
            return
        if self._stopping or status in (STOPPED, PEER_LOST):
            self._linger()
        lines = own_lines(self._errors, self._errors_start)[-12:]
        # Perhaps rank 0 has just left for the queue, or is about to say what is wrong with everybody's input.
        deadline = time.monotonic() + (5 if lines else 60)
        while self._rank and time.monotonic() < deadline and not self._failed_elsewhere():
            time.sleep(0.5)
        self._fail(status, lines)

    def checkpoint(self, *_: Any) -> submitit.helpers.DelayedSubmission:
        """Called by submitit at SIGUSR2, on rank 0: stop the command, then back to the queue."""
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        self._stop()
        self._address_file(int(os.environ.get("SLURM_RESTART_COUNT", "0"))).unlink(missing_ok=True)
        again = Worker(self.module, self.words, Path(self.code), Path(self.folder), self.cores, self.max_restarts)
        return submitit.helpers.DelayedSubmission(again)

    # ----------------------------------------------------------------------------------- the child process

    def _wait(self) -> int:
        while (status := self._child.poll()) is None:
            time.sleep(0.2)
            if not self._slurm and self._failed_elsewhere():  # srun sees to it
                self._child.kill()
                return PEER_LOST
        return status

    def _stop(self) -> None:
        """Send rank 0's command signals to stop until it has: at its imports, it does not handle them yet."""
        self._stopping = True
        while self._rank == 0 and self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGUSR2)
            time.sleep(0.5)

    def _terminate(self, *_: Any) -> None:
        """SIGTERM: `scancel`, or a preemption without SIGUSR2. SLURM ends the job soon, and requeues it or not."""
        self._stop()
        if self._rank == 0:
            self._linger()

    def _linger(self) -> NoReturn:
        """This process has nothing left to do, but to end with an error now would make the job fail: SLURM is about to
        requeue or end it, or the rank that failed is."""
        deadline = time.monotonic() + (PEER_SECONDS if self._slurm else 0)
        while time.monotonic() < deadline and not self._failed_elsewhere():
            time.sleep(0.5)
        if self._slurm and not self._failed_elsewhere():
            self._fail(PEER_LOST, [f"rank {self._rank}: another rank is gone, and SLURM does not say why"])
        sys.exit(1)

    # ----------------------------------------------------------------------------------- ranks

    def _distributed(self, job: Any, restarts: int) -> dict[str, str]:
        """The variables that torch.distributed reads."""
        local = job.num_tasks // job.num_nodes
        address, port = self._publish_address(restarts) if job.global_rank == 0 else self._read_address(restarts)
        return {
            "RANK": str(job.global_rank),
            "WORLD_SIZE": str(job.num_tasks),
            "LOCAL_RANK": str(job.local_rank),
            "LOCAL_WORLD_SIZE": str(local),
            "MASTER_ADDR": address,
            "MASTER_PORT": port,
        }

    def _publish_address(self, restarts: int) -> tuple[str, str]:
        # Bound, with SO_REUSEADDR, and never listening: the kernel gives this port to nobody else, and lets the command
        # of this rank, whose socket has the option too, listen on it. Held until this process ends.
        self._port = socket.socket()
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port.bind(("", 0))
        found = (socket.gethostname() if self._slurm else "127.0.0.1", str(self._port.getsockname()[1]))
        write_json(self._address_file(restarts), found)
        return found

    def _read_address(self, restarts: int) -> tuple[str, str]:
        deadline = time.monotonic() + RENDEZVOUS_SECONDS
        path = self._address_file(restarts)
        while not path.exists():
            if self._failed_elsewhere():
                sys.exit(1)
            if time.monotonic() > deadline:
                self._fail(1, [f"rank 0 did not start within {RENDEZVOUS_SECONDS} s"])
            time.sleep(0.1)
        address, port = json.loads(path.read_text(encoding="utf-8"))
        return address, port

    def _address_file(self, restarts: int) -> Path:
        return Path(self.folder) / f"{self._job_id}_{restarts}.address"

    # ----------------------------------------------------------------------------------- result

    @property
    def _result(self) -> Path:
        return Path(self.folder) / f"{self._job_id}.json"

    def _failed_elsewhere(self) -> bool:
        """Whether another rank has ended the job."""
        return self._result.exists() and json.loads(self._result.read_text(encoding="utf-8"))["status"] != 0

    def _fail(self, status: int, lines: list[str]) -> NoReturn:
        """End this process, and with it the job; the first rank that fails leaves the result."""
        if not self._result.exists():
            write_json(
                self._result, {"status": status, "rank": self._rank, "host": socket.gethostname(), "lines": lines}
            )
        print(f"rank {self._rank} failed: {lines[-1] if lines else status}", flush=True)
        sys.exit(status if status > 0 else 1)


def own_lines(log: Path, start: int) -> list[str]:
    """The command's own lines, from the byte `start` of a log on: without submitit's and empty ones."""
    with open(log, "rb") as file:
        file.seek(start)
        lines = [line.rstrip() for line in file.read().decode(errors="replace").splitlines()]
    return [line for line in lines if line and not line.startswith("submitit ")]


def _ignore_signals() -> None:
    """In the child, before its program: the scheduler signals all processes of a job, and to a program without a
    handler that would be the end. The command sets its own for SIGUSR2."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def write_json(path: Path, values: Any) -> None:
    """A file that is whole or absent, whoever writes it on whatever node."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    temporary.write_text(json.dumps(values), encoding="utf-8")
    os.replace(temporary, path)

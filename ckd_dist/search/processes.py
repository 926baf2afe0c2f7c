"""A search shared out among processes of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ckd_dist.core.process import PARENT, STOPPED, StopRequest
from ckd_dist.search.options import SearchConfig


def share_out(config: SearchConfig) -> None:
    """Train the students in processes of this machine, a part each, and return when all are done. One that fails ends
    the others, and this process with its status; they end too when this process is killed, and save first when it gets
    a signal to stop."""
    import torch

    from ckd_dist.core import dist

    options = ["--config", str(Path(config.run_dir) / "config.yaml"), f"--students_at_once={config.students_at_once}"]
    options += [f"--amp={config.amp}", f"--data.views={config.data.views}"]
    if config.race:
        options += ["--race=true", f"--race_error={config.race_error}"]
        given = {"race_budget": config.race_budget, "race_hours": config.race_hours}
        options += [f"--{name}={value}" for name, value in given.items() if value is not None]
    threads = str(max(1, dist.cores_per_rank() // config.processes))
    workers, copies = [], []
    with StopRequest() as stop:
        try:
            for number in range(1, config.processes + 1):
                environment = {**os.environ, "OMP_NUM_THREADS": threads, PARENT: str(os.getpid())}
                environment.pop("CKD_DIST_CORES", None)  # of all of us
                if gpus := torch.cuda.device_count():
                    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
                    environment["CUDA_VISIBLE_DEVICES"] = visible[(number - 1) % gpus]
                part = f"{number}/{config.processes}"
                words = [sys.executable, "-m", "ckd_dist.search", *options, "--part", part]
                pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
                # A session of its own: Ctrl-C is for this process, which tells the others.
                worker = subprocess.Popen(words, env=environment, errors="replace", start_new_session=True, **pipes)
                workers.append(worker)
                copies.append(threading.Thread(target=_copy_lines, args=(worker, part), daemon=True))
                copies[-1].start()
            while any(worker.poll() is None for worker in workers) and not failures(workers):
                for worker in workers if stop.signal else ():
                    worker.send_signal(signal.SIGUSR2)  # again and again: it may still be at its imports
                time.sleep(0.1)
            if failed := failures(workers):
                raise SystemExit(failed[0] if failed[0] > 0 else 1)
        finally:
            for worker in workers:
                worker.kill()
            for copy in copies:
                copy.join()
    if any(worker.returncode for worker in workers):
        raise SystemExit(STOPPED)


def failures(workers: list[subprocess.Popen]) -> list[int]:
    """Exit statuses of parts that have ended otherwise than by their end or by SIGUSR2."""
    fine = (None, 0, STOPPED, -signal.SIGUSR2)
    return [worker.returncode for worker in workers if worker.returncode not in fine]


def _copy_lines(worker: subprocess.Popen, part: str) -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        print(f"{part}  {line}", end="", flush=True)

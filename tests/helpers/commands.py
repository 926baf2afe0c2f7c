"""Commands of this repository as processes: running them, killing them."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "tests" / "programs"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def command_line(module: str, *arguments: object, nproc: int = 0) -> list[str]:
    """`python -m module` or, with `nproc`, the same under torchrun; a path ending in .py is a program of the tests."""
    target = [module] if module.endswith(".py") else ["-m", module]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc else []
    return [sys.executable, *launcher, *target, *map(str, arguments)]


def run(
    module: str,
    *arguments: object,
    nproc: int = 0,
    status: int = 0,
    env: dict[str, str] = ENVIRONMENT,
    cwd: Path = ROOT,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and check its exit status."""
    done = subprocess.run(
        command_line(module, *arguments, nproc=nproc),
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
        cwd=cwd,
    )
    assert done.returncode == status, f"exit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL a launcher and all its ranks at one moment."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            pass
    psutil.wait_procs(family, timeout=30)
    process.wait(timeout=30)


def kill_and_repeat(
    command: list[str], progress: Callable[[], int], kills: list[int], seed: int = 0, longest: float = 0.1
) -> None:
    """Start `command`, SIGKILL all its processes a random moment, at most `longest` seconds, after `progress()` first
    reaches each value of `kills`, start it again, and let it end."""
    moment = random.Random(seed)
    for target in kills:
        process = subprocess.Popen(
            command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        started = time.monotonic()
        while progress() < target:
            assert process.poll() is None, f"the command ended before it could be killed at {target}"
            assert time.monotonic() - started < 200
            time.sleep(0.002)
        time.sleep(moment.uniform(0, longest))
        assert process.poll() is None, f"the command ended before it could be killed at {target}"
        kill_tree(process)
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def count_lines(path: Path) -> int:
    """Lines of a file, 0 when it is not there."""
    return path.read_bytes().count(b"\n") if path.exists() else 0

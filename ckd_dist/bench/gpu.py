"""All that is to be asked of a machine with a GPU, in half an hour and without a network: is it right, how fast is it?

  python -m ckd_dist.bench.gpu --prepare [OUT]      where the data sets are, before
  python -m ckd_dist.bench.gpu [OUT] [--minutes 25]

One command after another, each to its end or to the end of its share of the time: the tests that need a GPU, a small
distillation on one process and on two, training under the profiler, the bench. OUT (default runs/gpu) gets a log of
each and summary.md. On a CPU it is a rehearsal. OUT with its images is all that has to be carried there.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ckd_dist.bench.training import Setup
from ckd_dist.core.files import write_bytes_atomically
from ckd_dist.core.options import Parser
from ckd_dist.core.process import run_process
from ckd_dist.studies import quickstart
from ckd_dist.studies.commands import console


@dataclass(frozen=True)
class Stage:
    """A command, with its share of the time."""

    name: str
    share: float
    words: list[object]
    shows: int
    """Lines of its end that are part of the summary."""


def stages(out: Path) -> list[Stage]:
    """In their order: what is right comes before what is fast."""
    images, bench = out / "images", out / "bench"
    quick = ["-m", "ckd_dist.studies.quickstart"]
    setup = Setup(bench, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    student = [*setup.options, "--model.name", setup.models.student, "--epochs", 3, "--log_every", 1000]
    return [
        Stage("tests", 0.25, ["-m", "pytest", "-m", "gpu", "-n", 0, "-q", "tests"], 3),
        Stage("one process", 0.15, [*quick, out / "one", "--images", images, "--processes", 1], 24),
        Stage("two processes", 0.15, [*quick, out / "two", "--images", images, "--processes", 2], 24),
        Stage("profile", 0.1, ["-m", "ckd_dist.bench.profile", out / "profile", *student], 20),
        Stage("bench", 0.35, ["-m", "ckd_dist.bench", bench, "--only", "step", "loader", "epochs", "store"], 80),
    ]


def main() -> int:
    """Run all stages, and write the summary; status 1 where one failed."""
    parser = Parser(prog="python -m ckd_dist.bench.gpu", description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/gpu"), metavar="OUT")
    parser.add_argument("--minutes", type=float, default=25.0, help="for all of it (default: 25)")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="some of the stages, by their names")
    parser.add_argument("--prepare", action="store_true", help="write the images, and nothing else")
    options = parser.parse_args(sys.argv[1:])
    out: Path = options.out
    if options.prepare:
        prepare(out)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    wanted = [stage for stage in stages(out) if not options.only or stage.name in options.only]
    parts, failed = [f"# {device()}\n"], False
    for stage in wanted:
        log = out / f"{stage.name.replace(' ', '_')}.log"
        status, seconds = run(stage, log, 60 * options.minutes * stage.share)
        failed |= status not in ("done", "out of time")
        tail = log.read_text(encoding="utf-8").splitlines()[-stage.shows :]
        parts.append("\n".join([f"## {stage.name}: {status}, {seconds:.0f} s", "", "```", *tail, "```", ""]))
        write_bytes_atomically(out / "summary.md", "\n".join(parts).encode())
        console.print(f"{stage.name}: {status}, {seconds:.0f} s")
    console.print(f"{out / 'summary.md'} has the ends of all logs")
    return int(failed)


def prepare(out: Path) -> None:
    """Write what only a machine with the data sets can."""
    quickstart.prepare(out / "images")
    (out / "bench").mkdir(parents=True, exist_ok=True)
    Setup(out / "bench", torch.device("cpu")).write_images()
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    console.print(f"{out} is ready to be carried: {size / 1e6:,.0f} MB")


def run(stage: Stage, log: Path, seconds: float) -> tuple[str, float]:
    """How a stage ended, and how long it took; it and all that it started are ended when its time is over."""
    command = [sys.executable, *map(str, stage.words)]
    console.rule(f"[bold]{stage.name}", align="left")
    console.print(shlex.join(["python", *command[1:]]), style="dim", soft_wrap=True)
    environment = {**os.environ, "COLUMNS": "160"}
    started = time.monotonic()
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        try:
            code = process.wait(timeout=seconds)
            status = "done" if code == 0 else f"failed with status {code}"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return status, time.monotonic() - started


def device() -> str:
    """What the machine has."""
    if not torch.cuda.is_available():
        return f"a rehearsal on {os.cpu_count()} CPU cores, torch {torch.__version__}"
    driver = ""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = f", driver {subprocess.run(query, capture_output=True, text=True).stdout.split()[0]}"
    names = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
    return f"{names}{driver}, torch {torch.__version__}, CUDA {torch.version.cuda}"


if __name__ == "__main__":
    run_process(main)

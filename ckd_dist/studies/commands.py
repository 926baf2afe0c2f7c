"""Commands of this package, run one after another as a user would type them: what quickstart and the comparisons do."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console

from ckd_dist.core.process import StopRequest, run_process

console = Console(highlight=False)


def run_in_folder(main: Callable[[Path], None], default: str) -> None:
    """Call `main` with the folder that the command line names, or `default`; --help prints its module's text."""
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words) or len(words) > 1:
        print(main.__globals__["__doc__"])
        sys.exit(0 if len(words) <= 1 else 2)
    run_process(lambda: main(Path(words[0] if words else default)))


def run_module(title: str, *words: object, processes: int = 0) -> float:
    """Show and run `python -m WORDS`, under torchrun if there are `processes`, and return its seconds; a failure ends
    this process with its status."""
    command = ["-m", *map(str, words)]
    torchrun = ["torchrun", "--standalone", f"--nproc_per_node={processes}"]
    console.rule(f"[bold]{title}", align="left")
    console.print(shlex.join([*(torchrun if processes else ["python"]), *command]), style="dim", soft_wrap=True)
    launcher = ["-m", "torch.distributed.run", *torchrun[1:]] if processes else []
    started = time.perf_counter()
    threads = {"OMP_NUM_THREADS": "1"} if processes else {}
    with StopRequest(signal.SIGINT):  # Ctrl-C is for the command, which saves; then this process ends too
        done = subprocess.run([sys.executable, *launcher, *command], env={**threads, **os.environ})
    if done.returncode:
        console.print(f"this command failed with exit status {done.returncode}", style="red")
        sys.exit(done.returncode)
    return time.perf_counter() - started


def write_images(folder: Path, dataset: str, counts: Mapping[str, int]) -> None:
    """Write so many images of each split of a data set as `folder`/SPLIT.beton, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        path = folder / f"{split}.beton"
        if not path.exists():
            options = ["--dataset", dataset, "--split", split, "--holdout", 0.1, "--subset", count, "--out", path]
            run_module(f"{count} images for {split}", "data_prep.write_beton", *options)

"""Measure what this machine reaches, and what it could: one table of rates, each beside its limit.

  python -m ckd_dist.bench [RUN_DIR] [--only CASE ...]

Everything is measured here and now, in turn with what it is compared with, medians of several rounds; nothing is
estimated. RUN_DIR (default runs/bench) gets bench.json, and keeps images and teachers for the next time. Cases:

  loader    our views, FFCV's stock decoder, torchvision v2 with DataLoader; JPEG, half JPEG, raw; with RandAugment
  order     a file larger than memory, in random and in quasi-random order (as root, to limit the memory)
  step      the train step on data in memory against a bare loop
  teaching  the same with cached records and with online teachers
  epochs    plain training, from the store (dense, top-k), online teachers, small and large
  store     caching against the bare forward pass, 1 and 4 checkpoints; reading, of a store larger than memory too
            (as root); codecs; what `store plan` foretells
  students  four side by side against four commands
  scaling   1 and 2 processes on the CPU, or 1 to 8 GPUs

On a GPU: ResNet-18, ResNet-50 and MobileNetV2 at 224 and 160 px for the step, and larger models for the rest. Without
FFCV: step and teaching, on random numbers in memory.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckd_dist.core.options import Parser
from ckd_dist.core.process import run_process
from ckd_dist.studies.commands import console

IN_MEMORY = ("step", "teaching")
CASES = ("loader", "order", *IN_MEMORY, "epochs", "store", "students", "scaling")


def main() -> None:
    """Measure the cases that the command line names, and show them."""
    parser = Parser(prog="python -m ckd_dist.bench", description=__doc__)
    parser.add_argument("run_dir", nargs="?", type=Path, default=Path("runs/bench"), metavar="RUN_DIR")
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES, metavar="CASE")
    options = parser.parse_args(sys.argv[1:])

    from ckd_dist.bench import measure, step
    from ckd_dist.core import dist, precision, run_folder

    with_ffcv = importlib.util.find_spec("ffcv") is not None
    if not with_ffcv:
        console.print(f"FFCV is not installed: only {' and '.join(IN_MEMORY)} are measured, on random data in memory")
    names = [name for name in options.only if with_ffcv or name in IN_MEMORY]
    needs_files = set(names) - set(IN_MEMORY)
    if needs_files:
        from ckd_dist.bench import loader, order, storing, training

    folder: Path = options.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    with dist.process_group() as device:
        amp = precision.automatic()
        limits = measure.machine_limits(device, amp)
        scratch = folder / "scratch"
        cases: dict[str, Callable[[], list[measure.Row]]] = {
            "step": lambda: step.measure(scratch, device, limits),
            "teaching": lambda: step.measure_distillation(scratch, device),
        }
        if needs_files:
            setup = training.Setup(folder, device)
            cases |= {
                "loader": lambda: loader.measure(folder),
                "order": lambda: order.measure(folder),
                "epochs": lambda: training.measure_epochs(setup),
                "store": lambda: storing.measure(setup),
                "students": lambda: training.measure_students(setup),
                "scaling": lambda: training.measure_scaling(setup),
            }
            if needs_files - {"loader", "order"}:
                setup.prepare()
        environment = run_folder.environment()
        del environment["command"]  # its paths: bench.json is for others too
        result: dict[str, Any] = {"environment": environment, "precision": precision.words(amp)}
        result |= {"machine": limits, "rows": []}
        for name in names:
            console.rule(f"[bold]measuring: {name}", align="left")
            result["rows"] += [row.to_dict() for row in cases[name]()]
            (folder / "bench.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    show(folder / "bench.json")


def show(path: Path) -> None:
    """Print bench.json as a table."""
    from rich.console import Console
    from rich.table import Table

    from ckd_dist.core.results import read_bench
    from ckd_dist.report import speed

    found = read_bench(path, "RUN_DIR")
    about = "median (least to most); ratios are of rates in the same round: above 1 is faster"
    table = Table(title=f"{speed.machine(found)}\n{about}", title_justify="left")
    for column in ("", "rate", "ratio", "to", "limit"):
        table.add_column(column, justify="right" if column == "rate" else "left")
    case = None
    for row in found.rows:
        if row.case != case:
            case = row.case
            table.add_section()
            table.add_row(f"[bold]{case}")
        table.add_row(f"  {row.what}", *speed.cells(row))
    Console(width=200, highlight=False).print(table)


if __name__ == "__main__":
    run_process(main)

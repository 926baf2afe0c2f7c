"""Running the examples of other people's loops, and the training that they are to repeat."""

from __future__ import annotations

import re
from pathlib import Path

from tests.helpers.commands import ROOT, run

SETTING = ("--checkpoints", 2, "--epochs", 2, "--batch_size", 64, "--lr", 0.1, "--log_every", 1)


def distilling(fashion: dict[str, Path], store: Path, run_dir: Path) -> list[object]:
    """Options of distill for what the examples are to do: two epochs of 18 steps from checkpoint 2, in float32."""
    data = ["--data.train", fashion["train"], "--data.batch_size", 64, "--teacher.store", store]
    loss = ["--teacher.checkpoints", "[2]", "--kd.alpha", 0.5, "--kd.temperature", 4, "--amp", "off"]
    model = ["--model.name", "resnet8", "--epochs", 2, "--optim.lr", 0.1, "--log_every", 1]
    return [*data, *loss, *model, "--run_dir", run_dir]


def example(name: str, fashion: dict[str, Path], store: Path, out: Path, *more: object, nproc: int = 0) -> list[float]:
    """Run an example, and read the loss of every step that it printed."""
    options = ("--images", fashion["train"], "--store", store, "--out", out, *SETTING, *more)
    text = run(str(ROOT / "examples" / f"{name}.py"), *options, nproc=nproc).stdout
    return [float(each) for each in re.findall(r"^step \d+ loss (\S+)$", text, re.MULTILINE)]

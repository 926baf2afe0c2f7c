"""Short selections of a teacher's checkpoint."""

from __future__ import annotations

import json

from ckd_dist import select_teacher
from ckd_dist.core.options import load_config
from ckd_dist.selection.options import SelectConfig

QUICK = ["--data.batch_size", 64, "--probe.steps", 80, "--probe.repeats", 2, "--student", "resnet8"]


def select_here(*words):
    """`python -m ckd_dist.select_teacher` in this process; what selection.json holds."""
    config = load_config(SelectConfig, [str(word) for word in words])
    select_teacher.main(config)
    return json.loads((select_teacher.Path(config.run_dir) / "selection.json").read_text())

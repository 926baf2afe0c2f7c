"""The shipped recipes go together: teacher, cache and students of each data set, all steps for real, made small."""

from __future__ import annotations

import math

import pytest
import yaml

from ckd_dist import cache_logits, distill, train_teacher
from ckd_dist.commands import COMMANDS
from ckd_dist.core.options import load_config
from ckd_dist.search import __main__ as search
from ckd_dist.search.options import SearchConfig
from ckd_dist.store.options import CacheConfig
from ckd_dist.train.options import DistillConfig
from tests.helpers.commands import ROOT
from tests.helpers.here import here
from tests.helpers.training import metrics, summary


def recipes(family, module):
    """The recipes of a command."""
    for path in sorted((ROOT / "configs" / family).glob("*.yaml")):
        if f"-m {module} " in path.read_text().splitlines()[0]:
            yield path


@pytest.mark.parametrize("family", ["imagenet", "cifar100", "tiny_imagenet", "fashion_mnist"])
def test_recipes_lead_from_teacher_to_student(family, photographs, other_photographs, tmp_path):
    images = {"train": str(photographs), "batch_size": 10, "image_size": 32}
    training = {
        "data": {**images, "val": None, "start_image_size": None, "val_image_size": None, "views": None},
        "optim": {"lr": 1e-3},  # recipes' rates are for more images
        "epochs": 1,
    }
    trainings = 0
    for command in (train_teacher, cache_logits, distill, search):
        module = command.__name__.removesuffix(".__main__")
        cls = COMMANDS[module]
        for path in recipes(family, module):
            given = load_config(cls, ["--config", str(path)])
            if cls is CacheConfig:
                run = tmp_path / given.teacher.run
                if not run.exists():  # one of another program, adopted: ours takes its place
                    run = next(tmp_path.rglob("summary.json")).parent
                teacher = {"run": str(run), "checkpoints": []}
                small = {"data": images, "teacher": teacher, "store": f"{tmp_path}/{given.store}", "views": 1}
                small |= {"codec": "dense", "bytes": None}  # a basis is not fitted to so few images
            else:
                small = {**training, "save_every": 1, "run_dir": f"{tmp_path}/{given.run_dir}"}
                trainings += 1
            if cls is DistillConfig:
                small["teacher"] = {"store": f"{tmp_path}/{given.teacher.store}", "checkpoints": [1]}
            if cls is SearchConfig:
                small["data"] = {**training["data"], "val": str(other_photographs), "test": None}
                small["teacher"] = {"store": f"{tmp_path}/{given.teacher.store}"}
                small["grid"] = {"teachers": [[1]], "alphas": [0.5], "temperatures": [4], "seeds": [0]}
                small["processes"] = 1
            override = tmp_path / "small.yaml"
            override.write_text(yaml.safe_dump(small))
            here(command, cls, "--config", path, "--config", override)
    runs = [path.parent for path in tmp_path.rglob("summary.json")]
    assert len(runs) == trainings >= 2
    for run in runs:
        assert summary(run)["steps"] == 10 and math.isfinite(metrics(run)[-1]["loss"])

"""The commands of the study of recipes are such as the program takes, and its differences are paired."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from ckd_dist.core.errors import UserError
from ckd_dist.core.options import load_config
from ckd_dist.core.run_folder import Summary
from ckd_dist.store.options import CacheConfig
from ckd_dist.studies import recipes
from ckd_dist.train.options import DistillConfig, TrainTeacherConfig

CONFIGS = {
    "ckd_dist.distill": DistillConfig,
    "ckd_dist.cache_logits": CacheConfig,
    "ckd_dist.train_teacher": TrainTeacherConfig,
}


@pytest.fixture
def commands(monkeypatch):
    """What is run, each read as its program would."""
    run = []

    def note(title, module, *words, processes=0):
        if module in CONFIGS:
            run.append((module, load_config(CONFIGS[module], [str(word) for word in words])))

    for each in (recipes, recipes.trajectories):
        monkeypatch.setattr(each, "run_module", note)
    return run


def test_every_recipe_differs_from_the_plain_one_in_options_that_there_are(commands, tmp_path):
    run = tmp_path / "fashion" / "1"
    for recipe in recipes.RECIPES:
        recipes.train(recipe, recipes.SETTINGS["fashion"], run)
    (_, plain), *others = commands
    students = [config for module, config in others if module == "ckd_dist.distill"]
    assert len(students) == len(recipes.RECIPES) - 1 and all(config != plain for config in students)
    assert len({config.run_dir for config in students}) == len(students)
    stores = {config.store for module, config in others if module == "ckd_dist.cache_logits"}
    assert len(stores) == 5 and stores < {config.teacher.store for config in students}
    assert {config.seed for config in students} == {1}


def test_the_whole_of_fashion_mnist_has_a_teacher_of_its_own(commands, tmp_path):
    recipes.train_teacher(tmp_path / "all" / "2")
    teacher, store, held_out = (config for _, config in commands)
    assert teacher.seed == 2 and teacher.epochs == teacher.save_every == 12 and teacher.optim.milestones == [6, 9]
    assert store.teacher.checkpoints == held_out.teacher.checkpoints == [12] and store.views == 4


def test_trainings_that_are_not_there_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["recipes", str(tmp_path), "--tasks", "tiles"])
    with pytest.raises(UserError, match=r"RUN_DIR: there is no .*tiles/1/store: run ckd_dist\.studies\.trajectories"):
        recipes.main()


def test_differences_are_of_the_same_training_of_a_teacher(tmp_path):
    plain, one, *_ = recipes.RECIPES
    for recipe, teacher, top1 in ((plain, 1, 80.0), (plain, 2, 70.0), (one, 1, 79.0), (one, 2, 72.0), (one, 3, 99.0)):
        path = recipes.folder(recipe, tmp_path / "fashion" / str(teacher))
        path.mkdir(parents=True)
        summary = Summary(epochs=20, steps=620, train_seconds=1.0, side_by_side=1, images_per_s=1.0, top1=top1)
        (path / "summary.json").write_text(json.dumps(asdict(summary)))
    found = recipes.read(tmp_path)
    assert [case.value for case in found.plain.cases] == [80.0, 70.0]
    assert [(case.teacher, case.value) for case in found.changes[0].cases] == [(1, -1.0), (2, 2.0)]

"""Choosing the teacher's checkpoint: right where the answer is known, and the same however it is computed."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from ckd_dist import distill
from ckd_dist.core import checkpoint
from ckd_dist.core.errors import TrainingError, UserError
from ckd_dist.core.identity import read_lineage
from ckd_dist.core.options import load_config
from ckd_dist.train.options import DistillConfig
from tests.helpers.commands import run
from tests.helpers.selection import QUICK, select_here


def test_the_checkpoint_that_keeps_image_and_label_is_chosen_under_every_scaling(chosen):
    _, result = chosen
    assert result["choice"] == 2 and result["choices"] == {"raw": 2, "minmax": 2, "zscore": 2}
    nothing, both, image_only = result["checkpoints"]
    assert abs(nothing["image_information"]) < 0.05 and abs(nothing["label_information"]) < 0.1
    assert abs(image_only["label_information"]) < 0.15 and image_only["image_information"] > 0.03
    assert both["label_information"] > 1.0 and both["image_information"] > image_only["image_information"]
    assert result["fixed"] == {"half": 1, "full": 3} and result["constants"]["label_entropy"] < np.log(4)
    assert result["layer"] == "features" and both["label_information_deviation"] > 0


def test_a_selection_is_nearly_the_same_on_two_processes(chosen, tmp_path):
    words, first = chosen
    run("ckd_dist.select_teacher", *words, "--run_dir", tmp_path / "two", nproc=2)
    two = json.loads((tmp_path / "two" / "selection.json").read_text())
    assert two["choices"] == first["choices"] and two["constants"] == pytest.approx(first["constants"], rel=1e-6)
    # Batch norm sees each process's part of the batch.
    for a, b in zip(first["checkpoints"], two["checkpoints"], strict=True):
        assert a["image_information"] == pytest.approx(b["image_information"], abs=0.02)
        assert a["label_information"] == pytest.approx(b["label_information"], abs=0.1)
        assert a["top1"] == b["top1"]
    cost = json.loads((tmp_path / "two" / "cost.json").read_text())
    assert cost["seconds"] > 0 and cost["share"] == pytest.approx(cost["seconds"] / (3 * cost["student_seconds"]))


def test_another_layer_can_be_named_and_the_options_of_a_run_stay_its_own(chosen, tmp_path):
    words, _ = chosen
    few = [*words, "--probe.steps", 2, "--teacher.checkpoints", "[2,3]"]
    assert select_here(*few, "--layer", "features.3", "--run_dir", tmp_path / "run")["layer"] == "features.3"
    with pytest.raises(UserError, match=r"run_dir: .* holds a run with layer features\.3, not features\.4"):
        select_here(*few, "--layer", "features.4", "--run_dir", tmp_path / "run")
    with pytest.raises(UserError, match=r"the teacher has no module features\.33"):
        select_here(*few, "--layer", "features.33", "--run_dir", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert select_here(*few, "--layer", "fc", "--run_dir", tmp_path / "vector")["layer_form"] == "fc (4 values)"
    (tmp_path / "run" / "cost.json").write_text('{"seconds": 1, "student_seconds": "a few", "share": 1}')
    with pytest.raises(UserError, match=r"run_dir: .*cost\.json is damaged \(student_seconds: .*: remove it and sel"):
        select_here(*few, "--layer", "features.3", "--run_dir", tmp_path / "run")


@pytest.mark.parametrize("damaged", ["features.0.weight", "fc.weight"])
def test_a_checkpoint_that_tells_no_number_is_named_not_chosen(chosen, known, tmp_path, damaged):
    run_dir = shutil.copytree(known, tmp_path / "known")
    path = checkpoint.checkpoint_path(run_dir, 2)
    state = checkpoint.load(path, "")
    state["weights"][damaged][0] = float("nan")
    checkpoint.save(path, state)
    words, _ = chosen
    with pytest.raises(TrainingError, match=r"epoch 2 of .*known: what its features or logits tell is not a finite"):
        select_here(*words, "--teacher.run", run_dir, "--probe.steps", 2, "--run_dir", tmp_path / "run")
    assert not (tmp_path / "run" / "selection.json").exists()


def test_distill_takes_the_choice_and_refuses_that_of_another_run(fashion, teacher, store, tmp_path):
    images = ["--data.train", fashion["train"], "--data.val", fashion["holdout"], "--data.batch_size", 64]
    words = [*images, "--teacher.run", teacher, *QUICK, "--probe.steps", 3, "--run_dir", tmp_path / "selection"]
    result = select_here(*words)
    student = [*images, "--model.name", "resnet8", "--epochs", 1, "--teacher.store", store]

    def distill_here(run_dir, *more):
        distill.main(load_config(DistillConfig, [str(word) for word in (*student, "--run_dir", run_dir, *more)]))

    distill_here(tmp_path / "run", "--teacher.selection", tmp_path / "selection")
    lineage = read_lineage(tmp_path / "run", "")
    assert lineage.resolved["teacher.checkpoints"] == [result["choice"]]
    assert lineage.inputs["teacher.selection"].holds == {"weights_sha256": result["weights_sha256"]}
    path = tmp_path / "selection" / "selection.json"
    other = {"weights_sha256": "0" * 64}
    checkpoints = [{**each, **other} for each in result["checkpoints"] if each["epoch"] == result["choice"]]
    path.write_text(json.dumps({**result, **other, "checkpoints": checkpoints}))
    with pytest.raises(
        UserError, match=r"teacher\.selection: it chose epoch . with weights 000000000000, .* different"
    ):
        distill_here(tmp_path / "other", "--teacher.selection", path)
    path.write_text("{}")
    with pytest.raises(UserError, match=r"teacher\.selection: .*selection\.json is damaged"):
        distill_here(tmp_path / "other", "--teacher.selection", path)
    with pytest.raises(UserError, match=r"teacher\.selection: no such file"):
        distill_here(tmp_path / "other", "--teacher.selection", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"teacher\.selection goes with teacher\.store or teacher\.run, and without"):
        distill_here(tmp_path / "other", "--teacher.selection", path, "--teacher.checkpoints", "[1]")
    shutil.rmtree(tmp_path / "selection")

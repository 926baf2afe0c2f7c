"""Options: defaults < YAML < command line; bad input is one line that names the option and the mend, status 2."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ENVIRONMENT, ROOT, run

from ckd_dist.config import COMMANDS, DistillConfig, TrainTeacherConfig, UserError, load_config, to_dict
from ckd_dist.models import build_model
from launch.graph import PipelineConfig, build

NEEDED = ["--data.train", "A", "--model.name", "resnet8", "--run_dir", "R"]
CLASSES = {name.removeprefix("ckd_dist."): cls for name, cls in COMMANDS.items()}


def refusal(*arguments, cls=DistillConfig):
    with pytest.raises(UserError) as error:
        load_config(cls, [*NEEDED, *arguments])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_defaults_give_way_to_yaml_and_yaml_to_the_command_line(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump({"epochs": 5, "optim": {"lr": 0.3, "gamma": 0.2}, "teacher": {"store": "S"}}))
    config = load_config(
        DistillConfig, [*NEEDED, "--config", str(path), "--optim.lr", "0.7", "--teacher.checkpoints", "[4,8]"]
    )
    assert (config.epochs, config.optim.lr, config.optim.gamma, config.optim.momentum) == (5, 0.7, 0.2, 0.9)
    assert (config.teacher.store, config.teacher.checkpoints) == ("S", [4, 8])


def test_the_saved_configuration_gives_the_same_one_again(tmp_path):
    config = load_config(
        DistillConfig, [*NEEDED, "--teacher.run", "T", "--optim.clip_grad_norm", "1", "--data.flip", "false"]
    )
    path = tmp_path / "saved.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    assert load_config(DistillConfig, ["--config", str(path)]) == config


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--optim.lrr", "3"], "unknown option --optim.lrr; did you mean --optim.lr?"),
        (["--optim.lr", "fast"], "option optim.lr: expected float. Got value: fast"),
        (["--amp", "fp8"], "option amp: expected one of 'auto', 'bfloat16', 'float16', 'off'. Got value: fp8"),
        (["--kd.alpha", "3"], "kd.alpha is 3.0: give a number from 0 to 1"),
        (["--kd.temperature", "0"], "kd.temperature is 0.0"),
        (["--data.batch_size", "0"], "data.batch_size is 0: give 1 or more"),
        (["--data.crop_scale_min", "2"], "data.crop_scale_min is 2.0"),
        (["--optim.schedule", "multistep"], "optim.milestones goes with"),
        (["--teacher.store", "S", "--teacher.run", "R"], "teacher.store and teacher.run are both given"),
        (["--teacher.checkpoints", "[8]"], "teacher.checkpoints is given without a teacher"),
        (["--teacher.run", "R", "--teacher.checkpoints", "[8,8]"], "names a checkpoint twice"),
        (["--config", "none.yaml"], "none.yaml"),
        (["stray"], "stray"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_in_one_line(arguments, expected):
    assert expected in refusal(*arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epocs: 3", "unknown key epocs in the configuration file; did you mean --epochs?"),
        ("data:\n  trian: x", "unknown key data.trian in the configuration file; did you mean --data.train?"),
        ("teacher:\n  store: S", "unknown key teacher"),
        ("data: [1", "parsing"),
        ("epochs: many", "option epochs: expected int"),
    ],
)
def test_bad_configuration_files_are_refused_in_one_line(text, expected, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert expected in refusal("--config", str(path), cls=TrainTeacherConfig)


def test_a_missing_option_is_named():
    with pytest.raises(UserError, match=r"missing option: --data\.train, --model\.name, --run_dir"):
        load_config(DistillConfig, [])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_is_read_by_the_command_in_its_first_line(path):
    words = path.read_text().splitlines()[0].removeprefix("# ").split()
    module = words[words.index("-m") + 1]
    config = load_config({**COMMANDS, "launch.pipeline": PipelineConfig}[module], ["--config", str(path)])
    if isinstance(config, PipelineConfig):
        build(config)
    assert words[words.index("--config") + 1] == str(path.relative_to(ROOT))
    if hasattr(config, "model"):
        with torch.device("meta"):
            build_model(config.model.name, 10)


@pytest.mark.parametrize("command", CLASSES)
def test_help_teaches_without_waiting_for_torch(command):
    code = (
        "import runpy, sys, os; os._exit = lambda status: (print('torch' in sys.modules), sys.exit(status))\n"
        f"sys.argv = ['{command}', '--help']\nrunpy.run_module('ckd_dist.{command}', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr
    launcher = "python" if command == "search" else "torchrun --nproc_per_node=8"
    assert f"{launcher} -m ckd_dist.{command}" in done.stdout and "--data.batch_size" in done.stdout
    assert done.stdout.rstrip().endswith("False")


def test_bad_input_is_one_line_and_status_2_from_the_command_line(tmp_path, fashion):
    data = ("--data.train", fashion["train"], "--model.name", "resnet8", "--run_dir", tmp_path / "run")
    cases = [
        ("train_teacher", ["--data.train", "none.beton", "--model.name", "resnet8", "--run_dir", tmp_path / "run"],
         "data.train: no such file: none.beton"),
        ("train_teacher", [*data, "--model.name", "resnet9"], "model.name: no model resnet9"),
        ("train_teacher", [*data, "--data.batch_size", 5000], "data.batch_size 5000 is larger than the 1201 images"),
        ("train_teacher", [*data, "--model.name", "alexnet"], "data.image_size 28 does not fit the model alexnet"),
        ("distill", [*data, "--model.name", "mobilenetv2_075", "--data.image_size", 16, "--data.batch_size", 1],
         "data.batch_size leaves one image to some of 1 processes"),
        ("distill", [*data, "--teacher.store", tmp_path], "is not a logit store"),
        ("distill", [*data, "--teacher.run", tmp_path], "is not a run folder"),
        ("cache_logits", ["--data.train", fashion["train"], "--teacher.run", tmp_path, "--store", tmp_path / "s"],
         "is not a run folder"),
        ("evaluate", ["--data.val", fashion["holdout"], "--checkpoint", fashion["train"]], "not a file of tensors"),
    ]  # fmt: skip
    for command, arguments, expected in cases:
        module = importlib.import_module(f"ckd_dist.{command}")
        with pytest.raises(UserError, match=re.escape(expected)):
            module.main(load_config(CLASSES[command], [str(word) for word in arguments]))
    command, arguments, expected = cases[0]
    done = run(f"ckd_dist.{command}", *arguments, status=2)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and expected in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_under_torchrun_one_rank_speaks_and_none_hangs(fashion, tmp_path):
    arguments = ("--data.train", fashion["train"], "--model.name", "resnet9", "--run_dir", tmp_path / "run")
    done = run("ckd_dist.train_teacher", *arguments, nproc=2, status=1)  # torchrun's own status when a rank fails
    assert done.stderr.count("error: model.name: no model resnet9") == 1
    assert "exitcode  : 2" in done.stderr  # and torchrun ended the other, which waits for the first to speak
    assert not (tmp_path / "run").exists()

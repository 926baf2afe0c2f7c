"""Options: defaults < YAML < command line; bad input is one line that names the option and the mend, status 2."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import os
import re
import subprocess
import sys
from typing import get_type_hints

import pytest
import torch
import yaml

from ckd_dist.commands import COMMANDS
from ckd_dist.core.errors import UserError
from ckd_dist.core.options import load_config, to_dict
from ckd_dist.nn.models import build_model
from ckd_dist.train.options import DistillConfig, TrainTeacherConfig
from launch.graph import PipelineConfig, build
from tests.helpers.commands import ENVIRONMENT, ROOT, run

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
        (["--kd.alpha", "3"], "kd.alpha is 3.0: give 0 to 1"),
        (["--kd.temperature", "0"], "kd.temperature is 0.0"),
        (["--data.batch_size", "0"], "data.batch_size is 0: give 1 to 1,000,000"),
        (["--data.crop_scale_min", "2"], "data.crop_scale_min is 2.0"),
        (["--optim.schedule", "multistep"], "optim.milestones goes with"),
        (["--teacher.store", "S", "--teacher.run", "R"], "teacher.store and teacher.run are both given"),
        (["--teacher.checkpoints", "[8]"], "teacher.checkpoints is given without a teacher"),
        (["--teacher.run", "R", "--teacher.checkpoints", "[8,8]"], "names a checkpoint twice"),
        (["--optim", "x.yaml"], "ambiguous option: --optim could match --optim.name"),
        (["--config", "none.yaml"], "none.yaml"),
        (["stray"], "stray"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_in_one_line(arguments, expected):
    assert expected in refusal(*arguments)


def options(cls, section=""):
    """(section, name, type) of every option of a command."""
    for name, kind in get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from options(kind, f"{name}.")
        else:
            yield section, name, kind


@pytest.mark.parametrize("command", CLASSES)
def test_every_number_has_bounds(command):
    found = list(options(CLASSES[command]))
    needed = {"data.train", "data.val", "model.name", "run_dir", "store", "checkpoint", "files", "format", "out"}
    needed.add("teacher.run" if command in ("cache_logits", "select_teacher") else "teacher.store")
    values = {"files": "[X]", "format": "onnx"}
    words = [f"--{s}{name}={values.get(name, 'X')}" for s, name, _ in found if f"{s}{name}" in needed]
    config = load_config(CLASSES[command], words)
    numbers = [each for each in found if re.search(r"\b(int|float)\b", str(each[2])) and "str" not in str(each[2])]
    assert len(numbers) >= (0 if command == "export" else 3)
    for section, name, kind in numbers:
        holder = getattr(config, section[:-1]) if section else config
        for value in (math.nan, math.inf, -math.inf, 10**20, -(10**20)):
            with pytest.raises(UserError) as error:
                dataclasses.replace(holder, **{name: [value] if "list" in str(kind) else value})
            assert str(error.value).startswith(f"{section}{name} is {value}: give ")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("epocs: 3", "unknown key epocs in the configuration file; did you mean --epochs?"),
        ("data:\n  trian: x", "unknown key data.trian in the configuration file; did you mean --data.train?"),
        ("teacher:\n  store: S", "unknown key teacher"),
        ("data: [1", "parsing"),
        ("epochs: many", "option epochs: expected int"),
        ("epochs: .nan", "option epochs: expected int"),
        ("epochs: " + 6000 * "9", "x.yaml cannot be read as YAML (Exceeds the limit"),
        ("run_dir: caf\xe9".encode("latin1"), "x.yaml cannot be read as YAML (it is not UTF-8)"),
        ("optim: &a {lr: *a}", "x.yaml cannot be read as YAML (Circular reference detected)"),
        ("\n".join(f"{b}: &{b} [{','.join(9 * [f'*{a}'])}]" if a else f"{b}: &{b} 1" for a, b in
                   itertools.pairwise(["", *"abcdefghijkl"])), "x.yaml cannot be read as YAML (it is too large)"),
        ("optim: " + 20000 * "[", "x.yaml cannot be read as YAML ("),
        ("run_dir: !!set {a, b}", "x.yaml cannot be read as YAML (Object of type set"),
        ("run_dir: " + 2**21 * "x", "x.yaml cannot be read as YAML (it is too large)"),
        ("", "x.yaml holds no options"),
        ("- 1", "x.yaml holds no options"),
        ("optim:\nepochs: 3", "x.yaml: optim is None: give its options by name"),
        ("optim: other.yaml", "x.yaml: optim is other.yaml: give its options by name"),
        (os.mkfifo, "x.yaml is not a regular file"),
        (os.mkdir, "x.yaml is not a regular file"),
    ],
    ids=range(19),
)  # fmt: skip
def test_bad_configuration_files_are_refused_in_one_line(content, expected, tmp_path):
    path = tmp_path / "x.yaml"
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert expected in refusal("--config", str(path), cls=TrainTeacherConfig)


def test_a_configuration_file_is_utf8_in_every_locale_and_may_repeat_itself(tmp_path):
    path, ascii_path = tmp_path / "x.yaml", tmp_path / "ascii.yaml"
    path.write_bytes("\ufeff# É\nrun_dir: 'é \U0001f600'\noptim: {lr: &a 2e-3, gamma: *a}".encode())
    ascii_path.write_bytes("# É\noptim: {lr: 1e-3}".encode())
    config = load_config(DistillConfig, [*NEEDED[:4], "--config", str(path)])
    assert (config.run_dir, config.optim.lr, config.optim.gamma) == ("é \U0001f600", 0.002, 0.002)
    code = (
        "import sys; a, b, *words = sys.argv[1:]\n"
        "from ckd_dist.core.errors import UserError\n"
        "from ckd_dist.core.options import load_config\n"
        "from ckd_dist.train.options import DistillConfig\n"
        "print(load_config(DistillConfig, [*words, '--config', a]).optim.lr)\n"
        "try: load_config(DistillConfig, [*words, '--config', b])\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", code, ascii_path, path, *NEEDED],
        capture_output=True, text=True, env={**ENVIRONMENT, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout == f"0.001\nconfig: {path}: this locale has no '\\xe9': set LC_ALL=C.UTF-8\n", done.stderr


def test_what_is_true_or_false_may_stand_alone():
    read = [load_config(DistillConfig, [*NEEDED, *words]).compile for words in (["--compile"], ["--compile", "false"])]
    assert read == [True, False]
    assert load_config(DistillConfig, ["--compile", *NEEDED, "--tensorboard"]).tensorboard
    assert load_config(DistillConfig, [*NEEDED, "--compile", "reduce-overhead"]).compile == "reduce-overhead"
    assert load_config(DistillConfig, ["--data.flip", *NEEDED]).data.flip is True
    with pytest.raises(UserError, match=r"compile.*quick"):
        load_config(DistillConfig, [*NEEDED, "--compile", "quick"])


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
    launcher = "python" if command in ("search", "adopt", "export") else "torchrun --nproc_per_node=8"
    option = "--format" if command == "export" else "--data.batch_size"
    assert f"{launcher} -m ckd_dist.{command}" in done.stdout and option in done.stdout
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

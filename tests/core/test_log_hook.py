"""--log_to: a function of the user's gets every line, on rank 0 alone, and its errors are one line."""

from __future__ import annotations

import json

import pytest

from ckd_dist.core.errors import UserError
from ckd_dist.core.log_hook import LogHook
from tests.helpers.commands import ENVIRONMENT, ROOT, run
from tests.helpers.training import metrics, options

MODULE = """
import json, os

def log(values):
    with open(os.environ["LINES"], "a") as file:
        file.write(json.dumps({**values, "rank": os.environ.get("RANK", "0")}) + "\\n")

def fail(values):
    if values["step"] > 1:
        raise RuntimeError("no network\\nat all")

number = 1
"""


def train(fashion, tmp_path, name, function, **more):
    (tmp_path / "my_logging.py").write_text(MODULE)
    few = ("--epochs", 1, "--amp", "off", "--log_every", 1, "--log_to", f"my_logging:{function}")
    data = {**fashion, "train": fashion["holdout"], "holdout": fashion["test"]}
    env = {**ENVIRONMENT, "LINES": str(tmp_path / "lines"), "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    return run("ckd_dist.train_teacher", *options(data, tmp_path / name, *few), env=env, **more)


def test_it_gets_every_line_on_rank_0(fashion, tmp_path):
    train(fashion, tmp_path, "run", "log", nproc=2)
    found = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    written = metrics(tmp_path / "run") + metrics(tmp_path / "run", "val")
    assert found == [{"run": str(tmp_path / "run"), **line, "rank": "0"} for line in written]
    assert [line["split"] for line in found] == ["train"] * 3 + ["val"]


def test_its_error_is_one_line_and_the_run_goes_on_without_it(fashion, tmp_path):
    done = train(fashion, tmp_path, "run", "fail", status=2)
    message = "error: log_to: my_logging:fail failed at step 2 (RuntimeError: no network at all): mend it"
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
    train(fashion, tmp_path, "run", "log")
    assert len(metrics(tmp_path / "run")) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_logging", "log_to: my_logging is no module:function"),
        (":log", "log_to: :log is no module:function"),
        ("my_logging:lag", "log_to: the module my_logging has no function lag"),
        ("my_logging:number", "log_to: the module my_logging has no function number"),
        ("not_there:log", r"log_to: not_there:log cannot be imported \(ModuleNotFoundError: No module named"),
        ("broken:log", r"log_to: broken:log cannot be imported \(SyntaxError"),
    ],
)
def test_what_is_no_function_is_refused(name, message, tmp_path, monkeypatch):
    (tmp_path / "my_logging.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("def log(")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=message):
        LogHook(name)

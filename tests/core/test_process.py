"""Processes: how they begin and end, the signals that stop them, and what they say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from ckd_dist.core import checkpoint
from ckd_dist.core.errors import UserError
from ckd_dist.core.process import INTERRUPTED, PARENT, STOPPED, StopRequest
from ckd_dist.train import loop
from launch.worker import RUN_MODULE
from tests.helpers.commands import ENVIRONMENT, ROOT, command_line, count_lines, run
from tests.helpers.training import metrics, options, train_here

TRAIN_LINEAR = str(ROOT / "tests" / "programs" / "train_linear.py")
SLEEP = "def main():\n  print('ready', flush=True)\n  time.sleep(99)\nrun_process(main)"


def start(code, *, environment=None, **more):
    """A small program, `code`, as a process that is ready once it has printed a line."""
    program = f"from ckd_dist.core.process import *\nimport os, sys, time, signal\n{code}"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**ENVIRONMENT, **(environment or {})},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def wait_until(good, seconds=60):
    deadline = time.monotonic() + seconds
    while not good():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGINT])
def test_a_signal_that_nobody_heeded_in_time_comes_again_for_whoever_handled_it_before(number):
    seen = []
    before = signal.signal(number, lambda *_: seen.append(True))
    ours = signal.getsignal(number)
    try:
        for error, expected in ((None, 1), (UserError(), 0), (RuntimeError("Connection reset by peer"), 1)):
            seen.clear()
            try:
                with StopRequest() as stop:
                    signal.raise_signal(number)
                    assert stop.signal == number and not seen
                    if error:
                        raise error
            except (UserError, RuntimeError) as raised:
                assert raised is error
            assert len(seen) == expected and signal.getsignal(number) is ours
        with StopRequest():
            pass
        assert len(seen) == 1
    finally:
        signal.signal(number, before)


def test_a_signal_during_the_last_evaluation_of_a_training_is_not_lost(fashion, tmp_path, monkeypatch):
    evaluate, seen = loop.evaluate, []

    def signal_and_evaluate(*arguments):
        signal.raise_signal(signal.SIGUSR2)
        return evaluate(*arguments)

    monkeypatch.setattr(loop, "evaluate", signal_and_evaluate)
    before = signal.signal(signal.SIGUSR2, lambda *_: seen.append((tmp_path / "run" / "summary.json").exists()))
    try:
        few = ["--data.train", fashion["holdout"], "--data.val", fashion["test"], "--epochs", 1, "--amp", "off"]
        train_here(*options(fashion, tmp_path / "run", *few))
        assert seen == [True]
        signal.raise_signal(signal.SIGUSR2)
        assert seen == [True, True]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_ctrl_c_under_torchrun_saves_and_the_same_command_goes_on(fashion, tmp_path):
    run_dir = tmp_path / "run"
    words = options(fashion, run_dir, "--model.name", "linear", "--amp", "off", "--log_every", 1, "--optim.lr", 0.01)
    command = command_line(TRAIN_LINEAR, *words, nproc=2)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env={**ENVIRONMENT, "PAUSE": "0.1"}, cwd=ROOT, **pipes)
    wait_until(lambda: count_lines(run_dir / "metrics.jsonl") > 2 or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert out.count("stopped by Ctrl-C and saved: the same command goes on (exit status 130)\n") == 1
    assert str(ROOT / "ckd_dist") not in err and "error:" not in err, err  # torchrun has a traceback of its own
    steps = [line["step"] for line in metrics(run_dir)]
    assert checkpoint.load(run_dir / "checkpoints" / "last.pt", "")["step"] == steps[-1] < 36


@pytest.mark.parametrize(("rank", "expected"), [("0", "stopped by Ctrl-C\n"), ("1", "")])
def test_ctrl_c_where_there_is_nothing_to_save_is_one_line_of_one_rank(rank, expected):
    process = start(SLEEP, environment={"RANK": rank})
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", expected) and process.returncode == INTERRUPTED


def test_a_second_ctrl_c_ends_the_process_whatever_it_is_at():
    code = """
def main():
    with StopRequest() as stop:
        print("ready", flush=True)
        while not stop.signal: time.sleep(0.01)
        print("noted", flush=True)
        time.sleep(99)
run_process(main)
"""
    process = start(code)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "noted\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "") and process.returncode == -signal.SIGINT


def test_ctrl_c_in_a_quickstart_leaves_its_stage_the_time_to_save(tmp_path):
    program = """
import time
from ckd_dist.core.process import StopRequest, run_process
def main():
    with StopRequest() as stop:
        print("ready", flush=True)
        while not stop.signal: time.sleep(0.01)
        time.sleep(1)
        print("saved", flush=True)
    raise SystemExit(stop.status)
run_process(main)
"""
    (tmp_path / "save.py").write_text(program)
    path = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "COLUMNS": "40"}
    code = "from ckd_dist.studies.commands import run_module\nrun_process(lambda: run_module('a stage', 'save'))"
    process = start(code, environment=path, start_new_session=True)
    for line in process.stdout:
        if line == "ready\n":
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert line == "saved\n" and process.wait(timeout=20) == INTERRUPTED
    assert process.stderr.read() == "stopped by Ctrl-C\nstopped by Ctrl-C\n"


def test_sigusr2_ends_a_command_that_has_nothing_to_save_at_once():
    process = start(SLEEP)
    process.send_signal(signal.SIGUSR2)
    assert process.communicate(timeout=20) == ("", "") and process.returncode == STOPPED


# ------------------------------------------------------------------------------------------- parents


def test_ranks_end_with_a_torchrun_that_is_killed(tmp_path):
    program = tmp_path / "sleep.py"
    program.write_text(f"import time\nfrom pathlib import Path\nfrom ckd_dist.core.process import run_process\n{SLEEP}")
    command = command_line(str(program), nproc=2)
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for _ in range(2):
        assert process.stdout.readline() == "ready\n"
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert len(ranks) == 2 and not psutil.wait_procs(ranks, timeout=20)[1]
    process.stdout.close()


@pytest.mark.parametrize(
    "program",
    [
        f"from ckd_dist.core.process import run_process\nimport time\n{SLEEP}",
        RUN_MODULE.format(code=str(ROOT), module="nap"),
    ],
    ids=["a part of a search", "the command of a job"],
)
def test_a_process_ends_with_the_one_that_gave_itself_as_its_parent(program, tmp_path):
    (tmp_path / "nap.py").write_text("print('ready', flush=True)\nimport time\ntime.sleep(99)")
    code = f"""
import subprocess
subprocess.Popen([sys.executable, "-c", {program!r}], env={{**os.environ, {PARENT!r}: str(os.getpid())}})
time.sleep(99)
"""
    parent = start(code, environment={"PYTHONPATH": f"{ROOT}:{tmp_path}"})
    children = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    assert len(children) == 1 and not psutil.wait_procs(children, timeout=20)[1]
    # The same where the parent has gone before the child looks: this test is not the one that is given.
    process = subprocess.Popen(
        [sys.executable, "-c", program], env={**ENVIRONMENT, PARENT: str(parent.pid)}, cwd=tmp_path
    )
    assert process.wait(timeout=20) == 1


@pytest.mark.parametrize("way", ["exec", "setsid nohup"])
def test_a_process_that_a_shell_started_outlives_it_even_in_a_job(way, tmp_path):
    done = tmp_path / "done"
    code = f"""
from ckd_dist.core.process import run_process
import os, time
from pathlib import Path
def main():
    shell = os.getppid()
    while os.getppid() == shell: time.sleep(0.01)
    time.sleep(1.2)
    Path({str(done)!r}).touch()
run_process(main)
"""
    # A shell that itself was started by the process of a job, which hands its id to the job's command only.
    start(
        f"""
os.environ[{PARENT!r}] = str(os.getppid())
begin()
import subprocess
words = {way!r} + " " + sys.executable + ' -c "$CODE" </dev/null >/dev/null 2>&1 & sleep 0.7'
subprocess.run(["sh", "-c", words])
print("the shell has gone", flush=True)
""",
        environment={"CODE": code},
    ).communicate(timeout=20)
    wait_until(done.exists, 20)


# ------------------------------------------------------------------------------------------- words


def test_a_name_that_the_terminal_cannot_show_is_no_error():
    code = "from ckd_dist.core.process import run_process\nrun_process(lambda: print('né ± \\udcff'))"
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"n\\xe9 \\xb1 \\udcff\n", b"")


def test_a_training_in_a_folder_with_accents_ends_well_in_a_locale_that_has_none(fashion, tmp_path):
    run_dir, config = tmp_path / "écrits" / "élève", tmp_path / "écrits" / "à moi.yaml"
    config.parent.mkdir()
    config.write_text(f"run_dir: {run_dir}\n", encoding="utf-8")
    images = ["--data.train", fashion["holdout"], "--data.val", fashion["test"]]
    few = [*images, "--epochs", 1, "--amp", "off", "--model.name", "linear"]
    words = [*options(fashion, run_dir, *few)[:-2], "--config", config]
    plain = {**ENVIRONMENT, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for expected in ("epoch 1/1  val", "élève: complete already"):
        done = run(TRAIN_LINEAR, *words, env=plain)
        assert expected in done.stdout and not done.stderr

"""A search in several processes or jobs: killed, stopped, failing, and in parts."""

from __future__ import annotations

import json
import signal
import subprocess
import time

import psutil
import yaml

from ckd_dist.core import checkpoint
from ckd_dist.core.results import read_table
from tests.helpers.commands import ENVIRONMENT, ROOT, command_line, count_lines
from tests.helpers.search import options, same, search_here, weights


def start(command, **more):
    return subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL, **more)


def test_a_killed_search_of_two_processes_leaves_nobody_and_then_ends_as_one_that_never_was(
    fashion, two_runs, tmp_path, monkeypatch
):
    monkeypatch.setitem(ENVIRONMENT, "CKD_DIST_CORES", "2")  # of a job, that the processes share
    grid = ["--grid.teachers", "[[],[1],[2,3]]", "--grid.seeds", "[0,1]", "--save_last_every", 5, "--log_every", 1]
    whole = search_here(*options(fashion, two_runs, tmp_path / "whole", *grid))
    killed = tmp_path / "killed"
    command = command_line("ckd_dist.search", *options(fashion, two_runs, killed, *grid, "--processes", 2))
    process = start(command)
    while sum(path.read_bytes().count(b"\n") for path in killed.glob("students/*/metrics.jsonl")) < 130:
        assert process.poll() is None
        time.sleep(0.01)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert len(family) == 2 and not alive and process.wait(timeout=10) == -signal.SIGKILL
    again = start(command, stderr=subprocess.PIPE, text=True)
    assert again.communicate(timeout=300)[1] == "" and again.returncode == 0
    rows = read_table(killed / "results.csv", "run_dir")
    for a, b in zip(whole, rows, strict=True):
        differ = {"train_seconds", "side_by_side"}
        assert {k: v for k, v in a.items() if k not in differ} == {k: v for k, v in b.items() if k not in differ}
        folders = [path / "students" / a["student"] for path in (tmp_path / "whole", killed)]
        assert same(*map(weights, folders))
        assert json.loads((folders[1] / "env.json").read_text())["threads"] == 1
        lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in folders]
        first, second = ([(x["split"], x["step"], x["loss"]) for x in map(json.loads, each)] for each in lines)
        assert first == second


def test_parts_of_a_job_array_and_a_last_command_make_the_whole(fashion, two_runs, tmp_path, capsys):
    words = options(fashion, two_runs, tmp_path / "run", "--grid.teachers", "[[1],[2],[3]]", "--epochs", 1)
    for part in ("1/2", "2/2"):
        search_here(*words, "--part", part)
        assert not (tmp_path / "run" / "results.csv").exists()
    capsys.readouterr()
    search_here(*words)
    out = capsys.readouterr().out.replace("\n", "")
    assert "side by side" not in out and "results.csv: 3 students" in out
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["grid"]["teachers"] == [[1], [2], [3]] and "part" not in saved


def test_a_part_that_fails_ends_the_search_ctrl_c_saves_in_all_parts_and_a_killed_one_leaves_nobody(
    fashion, two_runs, tmp_path
):
    words = options(fashion, two_runs, tmp_path / "run", "--grid.seeds", "[0,1]", "--epochs", 500, "--processes", 2)
    command = command_line("ckd_dist.search", *words, "--log_every", 1)

    def start():
        before = [count_lines(path) for path in records()]
        process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        while len(records()) < 2 or any(count_lines(p) <= n for p, n in zip(records(), before or [0, 0], strict=True)):
            assert process.poll() is None
            time.sleep(0.1)
        return process, psutil.Process(process.pid).children(recursive=True)

    def records():
        return sorted(tmp_path.glob("run/students/*/metrics.jsonl"))

    process, family = start()
    family[0].send_signal(signal.SIGKILL)
    assert process.wait(timeout=20) == 1
    assert not psutil.wait_procs(family, timeout=10)[1]
    process, family = start()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0].count("stopped by SIGUSR2 and saved") == 2 and process.returncode == 130
    for record in records():
        last = checkpoint.load(record.with_name("checkpoints") / "last.pt", "")
        assert last["step"] == json.loads(record.read_text().splitlines()[-1])["step"]
    process, family = start()
    process.kill()
    assert not psutil.wait_procs(family, timeout=20)[1] and process.wait(timeout=10) == -signal.SIGKILL

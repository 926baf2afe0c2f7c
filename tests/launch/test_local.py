"""Jobs and graphs on this machine, without SLURM."""

from __future__ import annotations

import re
import subprocess

import yaml

from tests.helpers.cluster import job_id, launch, wait_for
from tests.helpers.commands import PROGRAMS, ROOT, count_lines
from tests.helpers.training import metrics


def test_without_slurm_the_graph_runs_here(tmp_path):
    (tmp_path / "good.py").write_text("print('hello')")
    (tmp_path / "bad.py").write_text("raise SystemExit('no good')")
    tasks = {
        "a": {"module": "good"},
        "b": {"module": "bad", "after": ["a"]},
        "c": {"module": "good", "after": ["b"]},
        "d": {"module": "all_reduce", "after": ["a"], "cpus": 2},
    }
    path = tmp_path / "graph.yaml"
    path.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "graph"), "executor": "local", "tasks": tasks}))
    env = {"PYTHONPATH": f"{ROOT}:{PROGRAMS}:{tmp_path}"}
    done = launch(None, "pipeline", "--config", path, cwd=tmp_path, status=1, env=env)
    found = dict(re.findall(r"^│ (\w) +│ +1 │ (\w+)", done.stdout, re.MULTILINE))
    assert found == {"a": "done", "b": "failed", "c": "cancelled", "d": "done"} and "no good" in done.stdout
    (tmp_path / "bad.py").write_text("print('better')")
    done = launch(None, "pipeline", "--config", path, cwd=tmp_path, env=env)
    assert "b-" in done.stdout and "c-" in done.stdout and "a-" not in done.stdout and "d-" not in done.stdout
    assert "sum 2" in "".join(p.read_text() for p in tmp_path.glob("graph/jobs/d/*_0_log.out"))


def test_a_job_on_this_machine_ends_with_its_status_and_saves_when_told_to_stop(fashion, tmp_path):
    def options(name, *more):
        data = ["--data.train", fashion["holdout"], "--data.batch_size", 100, "--amp", "off", "--model.name", "linear"]
        return ["train_linear", *data, "--epochs", 20, "--log_every", 1, "--run_dir", tmp_path / name, *more]

    local = ["--executor", "local", "--cpus", 2]
    started = launch(None, "submit", *options("stopped"), *local, cwd=tmp_path, env={"PAUSE": "0.1"})
    wait_for(lambda: count_lines(tmp_path / "stopped" / "metrics.jsonl") > 4)
    subprocess.run(["kill", job_id(started)], check=True)
    log = tmp_path / "jobs" / f"{job_id(started)}_0_log.out"
    wait_for(lambda: "stopped by SIGUSR2 and saved" in log.read_text())
    done = launch(None, "submit", *options("stopped"), *local, "--wait", cwd=tmp_path)
    assert f"job {job_id(done)}: done" in done.stdout
    assert "going on after step" in (tmp_path / "jobs" / f"{job_id(done)}_0_log.out").read_text()
    assert [line["step"] for line in metrics(tmp_path / "stopped")] == [*range(1, 61)]
    bad = launch(
        None, "submit", *options("bad", "--data.train", "none.beton"), *local, "--wait", cwd=tmp_path, status=2
    )
    assert "error: data.train: no such file: none.beton" in bad.stdout

"""The states of jobs that are shown are right, with and without SLURM's accounting."""

from __future__ import annotations

import json
import re
import subprocess
import time

import psutil
import pytest
import yaml

from launch import slurm
from tests.helpers.cluster import launch, temporary_cluster, wait_for
from tests.helpers.commands import ROOT


def kill_processes(job):
    """SIGKILL what a job's ranks run, so that they leave no result."""
    for process in psutil.process_iter():
        try:
            if process.environ().get("SLURM_PROCID") and process.environ()["SLURM_JOB_ID"] == job:
                process.kill()
        except (psutil.Error, OSError):
            pass


@pytest.mark.parametrize("accounting", ["none", "shim", "slurmdbd"])
def test_the_state_shown_is_right_with_and_without_accounting(accounting, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "DOUBT_SECONDS", 3)
    (tmp_path / "nap.py").write_text("import time\ntime.sleep(99)")
    (tmp_path / "good.py").touch()
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    tasks = {name: {"module": name} for name in ("good", "bad")}
    tasks |= {name: {"module": "nap"} for name in ("killed", "cancelled")}
    tasks["after_bad"] = {"module": "good", "after": ["bad"]}
    tasks["after_good"] = {"module": "nap", "after": ["good"], "slurm": {"extra": {"begin": "now+1hour"}}}
    config = tmp_path / "graph.yaml"
    config.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "graph"), "tasks": tasks}))
    env = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}

    def states():
        done = launch(cluster, "pipeline", "status", "--config", config, cwd=tmp_path, env={**env, "COLUMNS": "150"})
        rows = re.findall(r"^│ (\w+) +│ +1 │ (\w+)(?: \((.*?)\))? *│", done.stdout, re.MULTILINE)
        return {name: f"{state} ({note})" if note else state for name, state, note in rows}

    with temporary_cluster(nodes=1, accounting=accounting) as cluster:
        launch(cluster, "pipeline", "--config", config, cwd=tmp_path, env=env)
        wait_for(lambda: all(states()[name] == "running" for name in ("killed", "cancelled")))
        assert states()["after_good"].startswith("pending (")
        record = {path.name.split("-")[0]: json.loads(path.read_text()) for path in tmp_path.glob("graph/tasks/*.json")}
        died = time.monotonic()
        kill_processes(record["killed"]["job_id"])
        launch(cluster, "pipeline", "cancel", "cancelled", "--config", config, cwd=tmp_path, env=env)
        wait_for(lambda: states()["killed"].startswith("failed") and states()["cancelled"] == "cancelled", 60)
        assert time.monotonic() - died < 60
        wait_for(lambda: states()["after_bad"] == "cancelled", 30)
        found = states()
        assert found["good"] == "done" and found["bad"] == "failed (exit status 3)"
        assert found["killed"] == "failed (FAILED, no result)" and found["after_good"].startswith("pending")
        logs = launch(cluster, "pipeline", "logs", "bad", "good", "--config", config, cwd=tmp_path, env=env).stdout
        assert "good-" in logs and "failed (exit status 3)" in logs and "rank 0 on n1:" in logs

        if accounting == "shim":  # it forgets what the queue forgets
            return
        cluster.forget_jobs()  # as it does MinJobAge seconds after a job's end
        known = accounting == "slurmdbd"
        gone = "failed (not in the queue, no result)"
        found = states()
        assert found["good"] == "done" and found["bad"] == "failed (exit status 3)"
        assert found["killed"] == ("failed (FAILED, no result)" if known else gone)
        assert found["cancelled"] == ("cancelled" if known else gone)


def test_a_cluster_leaves_nothing_behind():
    with temporary_cluster(nodes=2) as cluster:
        cluster.run("sbatch", "-N2", "-o", "/dev/null", "--wrap", "srun sleep 99")
        wait_for(lambda: cluster.run("squeue", "-h", "-t", "RUNNING").strip())
    left = subprocess.run(["pgrep", "-f", str(cluster.folder)], capture_output=True, text=True)
    assert left.stdout == "" and not cluster.folder.parent.exists()

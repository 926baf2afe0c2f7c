"""What befalls jobs on a real SLURM cluster: preemption, limits, dead nodes, requeues."""

from __future__ import annotations

import json
import time

import pytest

from launch import slurm
from tests.helpers.cluster import job_id, launch, wait_for
from tests.helpers.commands import ROOT, count_lines
from tests.helpers.training import metrics, same_weights


def test_jobs_outlive_preemption_time_limit_node_failure_and_requeue(cluster, fashion, tmp_path):
    steps, save_every = 240, 5

    def submit(name, *more, nodes):
        data = ["--data.train", fashion["holdout"], "--data.batch_size", 100, "--amp", "off", "--optim.lr", 0.01]
        run_dir = tmp_path / name
        options = [*data, "--model.name", "linear", "--epochs", steps // 3, "--save_last_every", save_every]
        options += ["--log_every", 1, "--run_dir", run_dir, "--slurm.nodes", 2, f"--slurm.extra.nodelist={nodes}"]
        done = launch(cluster, "submit", "train_linear", *options, *more, cwd=tmp_path, env={"PAUSE": "0.15"})
        return job_id(done)

    limited = submit("limited", "--slurm.timeout_min", 5, "--slurm.signal_delay_s", 120, nodes="n3,n4")
    low = submit("preempted", "--slurm.partition", "low", nodes="n1,n2")
    failed = submit("failed", nodes="n5,n6")
    requeued = submit("requeued", nodes="n7,n8")
    never = submit("never", nodes="n7,n8")
    names = {"limited": limited, "preempted": low, "failed": failed, "requeued": requeued, "never": never}

    high = ["-p", "high", "-w", "n1,n2", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2"]
    strikes = {
        "limited": lambda: cluster.run("scontrol", "update", f"JobId={limited}", "EndTime=now+100seconds"),
        "preempted": lambda: cluster.run("sbatch", *high),
        "failed": lambda: cluster.kill_node("n6"),
        "requeued": lambda: cluster.run("scontrol", "requeue", requeued),
    }
    deadline = time.monotonic() + 150
    limit_lifted = False
    while strikes or not limit_lifted:
        assert time.monotonic() < deadline, f"{[*strikes]} do not train"
        for name in [*strikes]:
            if count_lines(tmp_path / name / "metrics.jsonl") > 12:
                assert count_lines(tmp_path / name / "metrics.jsonl") < steps
                strikes.pop(name)()
        log = tmp_path / "jobs" / f"{limited}_0_log.out"
        if not limit_lifted and log.exists() and "stopped by SIGUSR2" in log.read_text():
            cluster.run("scontrol", "update", f"JobId={limited}", "TimeLimit=60")  # or it is hit again when it is back
            limit_lifted = True
        time.sleep(0.2)
    wait_for(lambda: "n6 down" in cluster.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T"), what="n6 down")
    cluster.start_node("n6")

    watch = slurm.Watch({job: tmp_path / "jobs" / f"{job}.json" for job in names.values()})
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SLURM_CONF", "PATH"):
            patch.setenv(name, cluster.environment[name])
        states = [*watch.follow(0.5)][-1]
    logs = {name: (tmp_path / "jobs" / f"{job}_0_log.out").read_text() for name, job in names.items()}
    assert all(states[job].name == "done" for job in names.values()), states
    losses = {name: [line["loss"] for line in metrics(tmp_path / name)] for name in names}
    for name in names:
        last = (tmp_path / each / "checkpoints" / f"epoch_{steps // 3:04d}.pt" for each in ("never", name))
        assert same_weights(*last) and losses[name] == losses["never"]
    saved = {name: "stopped by SIGUSR2 and saved" in log for name, log in logs.items()}
    assert saved["limited"] and saved["preempted"] and not saved["failed"]  # and a requeue sends SIGTERM first
    assert all(log.count("going on after step") == (name != "never") for name, log in logs.items())
    restarts = {name: cluster.run("scontrol", "show", "job", job) for name, job in names.items()}
    assert all(f"Restarts={int(name != 'never')}" in text for name, text in restarts.items())


def test_a_job_may_not_restart_more_often_than_its_budget(cluster, tmp_path):
    (tmp_path / "nap.py").write_text("import time\ntime.sleep(99)")
    words = ["nap", "--slurm.max_restarts", 0]
    job = job_id(launch(cluster, "submit", *words, cwd=tmp_path, env={"PYTHONPATH": f"{ROOT}:{tmp_path}"}))
    log = tmp_path / "jobs" / f"{job}_0_log.out"
    wait_for(lambda: log.exists() and "python -m nap" in log.read_text())
    cluster.run("scontrol", "requeue", job)
    result = tmp_path / "jobs" / f"{job}.json"
    wait_for(result.exists)
    assert json.loads(result.read_text())["lines"] == ["restarted 1 times, slurm.max_restarts is 0: given up"]

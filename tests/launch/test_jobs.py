"""Jobs on a real SLURM cluster of this machine."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time

import pytest

from tests.helpers.cluster import job_id, launch, wait_for
from tests.helpers.commands import ENVIRONMENT, ROOT, run
from tests.helpers.training import metrics


def test_two_nodes_of_two_processes_give_the_losses_of_torchrun(cluster, fashion, store, tmp_path):
    def options(run_dir):
        data = ["--data.train", fashion["train"], "--data.val", fashion["holdout"], "--data.batch_size", 100]
        model = ["--model.name", "resnet8", "--epochs", 1, "--optim.lr", 0.05, "--log_every", 1]
        return [*data, *model, "--teacher.store", store, "--run_dir", run_dir]

    job = [*options(tmp_path / "slurm"), "--slurm.nodes", 2, "--cpus", 2, "--wait"]
    done = launch(cluster, "submit", "ckd_dist.distill", *job)
    assert re.search(r"job \d+: done.*\nepoch 1/1  val top1", done.stdout) and "code: " in done.stdout
    run("ckd_dist.distill", *options(tmp_path / "torchrun"), nproc=4)
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("slurm", "torchrun")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 12
    env = json.loads((tmp_path / "slurm" / "env.json").read_text())
    assert env["world_size"] == 4 and env["threads"] == 1


def test_eight_jobs_at_once_on_the_same_nodes_do_not_meet(cluster, tmp_path):
    options = ["--slurm.nodes", 2, "--cpus", 1, "--slurm.extra.nodelist=n1,n2"]
    ids = [job_id(launch(cluster, "submit", "all_reduce", *options, cwd=tmp_path)) for _ in range(8)]
    results = [tmp_path / "jobs" / f"{job}.json" for job in ids]
    wait_for(lambda: all(path.exists() for path in results), what="eight results")
    assert [json.loads(path.read_text())["status"] for path in results] == [0] * 8
    assert all("sum 2" in (tmp_path / "jobs" / f"{job}_{rank}_log.out").read_text() for job in ids for rank in (0, 1))
    assert len({(tmp_path / "jobs" / f"{job}_0.address").read_text() for job in ids}) == 8


def test_a_command_that_fails_is_not_requeued_and_its_last_lines_are_shown(cluster, tmp_path):
    crash = tmp_path / "crash.py"
    crash.write_text(
        "import os, sys, time\nif os.environ['RANK'] == '1':\n    print('all well')\n    1 / 0\ntime.sleep(99)"
    )
    path = f"{ROOT}:{tmp_path}"
    words = ["crash", "--slurm.nodes", 2, "--wait"]
    started = time.monotonic()
    done = launch(cluster, "submit", *words, cwd=tmp_path, status=1, env={"PYTHONPATH": path})
    assert time.monotonic() - started < 60  # the other rank would sleep longer
    assert "failed (exit status 1)\nrank 1 on n" in done.stdout and "ZeroDivisionError: division by zero" in done.stdout
    assert "Restarts=0" in cluster.run("scontrol", "show", "job", job_id(done))
    bad = ["ckd_dist.evaluate", "--data.val", "none.beton", "--checkpoint", "none.pt", "--wait"]
    done = launch(cluster, "submit", *bad, cwd=tmp_path, status=2)
    assert "error: checkpoint: no such file: none.pt" in done.stdout


def test_edits_made_while_a_job_waits_change_nothing(cluster, tmp_path):
    tree = tmp_path / "tree"
    for name in ("ckd_dist", "launch", "data_prep"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    told, worker = tree / "data_prep" / "told.py", tree / "launch" / "worker.py"
    told.write_text("print('as it was')")
    words = ["data_prep.told", "--slurm.extra.begin=now+1hour"]
    done = run("launch.submit", *words, cwd=tree, env={**cluster.environment, "PYTHONPATH": str(tree)})
    told.write_text("print('as it is now')")
    worker.write_text("raise SystemExit('edited')")
    job = job_id(done)
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    result = tree / "jobs" / f"{job}.json"
    wait_for(result.exists)
    assert "as it was" in (tree / "jobs" / f"{job}_0_log.out").read_text()


def test_what_the_cluster_cannot_do_is_refused_in_one_line(cluster, fashion, teacher, tmp_path):
    distill = ["ckd_dist.distill", "--data.train", fashion["train"], "--model.name", "resnet8"]
    here = [*distill, "--run_dir", tmp_path / "run"]
    cache = ["ckd_dist.cache_logits", "--data.train", fashion["train"], "--teacher.run", teacher]
    cases = [
        ([*here, "--slurm.gpus_per_node", 5], "slurm.gpus_per_node: 5 GPUs a node asked, partition main has 4"),
        ([*here, "--slurm.cpus_per_gpu", 9], "slurm.cpus_per_gpu: 9 cores a node asked, partition main has 8"),
        ([*here, "--slurm.nodes", 9], "slurm.nodes: 9 nodes asked, partition main has 8"),
        ([*here, "--slurm.timeout_min", 1500], "1500 minutes asked, partition main has 1440 minutes at most"),
        ([*here, "--slurm.timeout_min", 3], "give 4 or more"),
        ([*here, "--slurm.partition", "gpu"], "no partition gpu: give one of main, low, high"),
        ([*here, "--slurm.noodes", 2], "unknown option --slurm.noodes; did you mean --slurm.nodes?"),
        ([*here, "--kd.alfa", 2], "unknown option --kd.alfa; did you mean --kd.alpha?"),
        ([*distill, "--run_dir", cluster.folder / "tmp" / "run"], "which every node has for itself"),
        (["ckd_dist.destill"], "no module ckd_dist.destill"),
        (["data_prep.write_beton", "--cpus", 2], "data_prep.write_beton runs in one process, here are 2"),
        ([*cache, "--store", tmp_path / "small" / "s", "--views", 9], "more, the disk has"),
    ]  # fmt: skip
    (tmp_path / "small").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", tmp_path / "small"], check=True)
    try:
        for words, expected in cases:
            done = launch(cluster, "submit", *words, status=2)
            assert expected in done.stderr and done.stderr.count("\n") == 1, done.stderr
        environment = {**ENVIRONMENT, **cluster.environment}
        done = run("launch.submit", *here, "--slurm.extra.reservation", "none", status=2, env=environment)
        assert re.fullmatch("error: sbatch refuses: Batch job submission failed.*\n", done.stderr)
        assert not (tmp_path / "small" / "s").exists()
    finally:
        subprocess.run(["umount", tmp_path / "small"], check=True)


def test_a_dry_run_shows_the_script_and_what_sbatch_says_to_it(cluster, fashion, tmp_path):
    words = ["--data.train", fashion["train"], "--model.name", "resnet8", "--run_dir", tmp_path / "run"]
    job = ["--slurm.nodes", 2, "--slurm.gpus_per_node", 4, "--slurm.cpus_per_gpu", 2, "--slurm.extra.mem", "4G"]
    done = launch(cluster, "submit", "ckd_dist.distill", *words, *job, "--dry-run")
    for line in ("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "cpus-per-task=2", "mem=4G", "signal=USR2@120"):
        assert f"#SBATCH --{line}\n" in done.stdout
    assert "srun --unbuffered" in done.stdout and "--kill-on-bad-exit=1 --cpus-per-task=2" in done.stdout
    assert "name: resnet8" in done.stdout and "using 16 processors on nodes n[1-2]" in done.stdout
    assert not (tmp_path / "run").exists()

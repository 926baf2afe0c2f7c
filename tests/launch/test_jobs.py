"""Jobs on a real SLURM cluster of this machine, and on this machine without one."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from ckd_dist.core.errors import UserError
from ckd_dist.core.options import flag_words
from launch import graph
from launch.graph import PipelineConfig, TaskConfig
from launch.jobs import FLAGS, SlurmConfig
from launch.submit import split
from tests.helpers.cluster import job_id, launch, temporary_cluster, wait_for
from tests.helpers.commands import ENVIRONMENT, PROGRAMS, ROOT, count_lines, run
from tests.helpers.training import metrics


@pytest.fixture(scope="module")
def cluster():
    with temporary_cluster(nodes=8) as started:
        yield started


# ------------------------------------------------------------------------------------------- one job


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


# ------------------------------------------------------------------------------------------- the graph


def write_graph(folder: Path) -> Path:
    """The whole graph, small: data to report, a teacher, two groups of checkpoints, four parts of a search."""
    data = {"train": f"{folder}/train.beton", "val": f"{folder}/holdout.beton"}
    images = {"module": "data_prep.write_beton"}
    subset = {"dataset": "fashion_mnist", "holdout": 0.1, "subset": 200}
    search = {
        "module": "ckd_dist.search",
        "options": {
            "data": {**data, "test": f"{folder}/test.beton", "batch_size": 50},
            "model.name": "resnet8",
            "teacher.store": f"{folder}/store",
            "epochs": 1,
            "grid": {"teachers": [[], [1], [2]], "seeds": [0, 1]},
            "run_dir": f"{folder}/search",
        },
    }
    tasks = {
        **{
            f"{split}_images": {**images, "options": {**subset, "split": split, "out": f"{folder}/{split}.beton"}}
            for split in ("train", "holdout", "test")
        },
        "teacher": {
            "module": "ckd_dist.train_teacher",
            "options": {
                "data": {**data, "batch_size": 50},
                "model.name": "resnet8",
                "epochs": 2,
                "save_every": 1,
                "run_dir": f"{folder}/teacher",
            },
            "slurm": {"nodes": 2},
            "after": ["train_images", "holdout_images"],
        },
        "cache": {
            "module": "ckd_dist.cache_logits",
            "options": {"data.train": data["train"], "teacher.run": f"{folder}/teacher", "store": f"{folder}/store"},
            "array": {"teacher.checkpoints": [[1], [2]]},
            "after": ["teacher"],
        },
        "verify": {"module": "ckd_dist.store", "arguments": ["verify", f"{folder}/store"], "after": ["cache"]},
        "select": {
            "module": "ckd_dist.select_teacher",
            "options": {
                "data": {**data, "batch_size": 50},
                "teacher.run": f"{folder}/teacher",
                "probe": {"steps": 5, "repeats": 1},
                "student": "resnet8",
                "run_dir": f"{folder}/selection",
            },
            "after": ["teacher"],
        },
        "students": {**search, "array": {"part": 4}, "limit": 2, "after": ["verify"]},
        "search": {**search, "after": ["students", "test_images"]},
        "report": {
            "module": "ckd_dist.report",
            "arguments": [str(folder)],
            "options": {"out": f"{folder}/report"},
            "after": ["search", "select"],
        },
    }
    path = folder / "graph.yaml"
    path.write_text(yaml.safe_dump({"run_dir": str(folder / "graph"), "tasks": tasks}))
    return path


def test_the_whole_graph_with_a_job_that_fails_and_then_completed(cluster, tmp_path):
    config = write_graph(tmp_path)
    poison = tmp_path / "search" / "students" / "resnet8_teacher_1_kd_alpha_0.5_T_5_seed_1" / "config.yaml"
    (poison.parent / "checkpoints").mkdir(parents=True)
    (poison.parent / "checkpoints" / "last.pt").touch()
    poison.write_text("epochs: 7\n")  # a run of other options: its part of the search refuses to go on
    started = launch(cluster, "pipeline", "--config", config, "--wait", status=1)
    assert "14 of 14 jobs submitted" in started.stdout
    assert re.search(r"holds a run with [\w.]+ None, not", started.stdout)

    def table(text):
        return dict(re.findall(r"^│ (\w+) +│ +\d+ │ (.*?) *│", text, re.M))

    found = table(launch(cluster, "pipeline", "status", "--config", config, env={"COLUMNS": "150"}).stdout)
    done = {"train_images", "holdout_images", "test_images", "teacher", "cache", "verify", "select"}
    assert {name for name, state in found.items() if state in ("done", "2 done")} == done
    assert re.search(r"3 done, 1 failed|1 failed, 3 done", found["students"])
    assert found["search"] == found["report"] == "cancelled"

    shutil.rmtree(poison.parent)
    again = launch(cluster, "pipeline", "--config", config, "--wait")
    assert "3 of 14 jobs submitted" in again.stdout
    assert "6 students" in (tmp_path / "graph").joinpath("jobs", "report").glob("*_0_log.out").__next__().read_text()
    assert (tmp_path / "report" / "report.html").exists()
    third = launch(cluster, "pipeline", "--config", config)
    assert "nothing to submit" in third.stdout
    assert set(table(third.stdout).values()) <= {"done", "2 done", "4 done"}
    arrays = {path.name.split("_")[0] for path in (tmp_path / "graph/jobs/students").glob("*_submitted.pkl")}
    assert len(arrays) == 3  # four parts in arrays of three and one, and the one that was repeated
    assert launch(cluster, "pipeline", "--config", config, "--dry-run").stdout.endswith(
        "0 of 14 jobs would be submitted\n"
    )
    # What a task was made of is replaced in place: its result, and all that came of it, is not what the graph says.
    first, second = sorted((tmp_path / "teacher" / "checkpoints").glob("epoch_*.pt"))[:2]
    shutil.copy(first, second)
    refused = launch(cluster, "pipeline", "--config", config, status=2)
    expected = (
        rf"tasks\.cache: \S+ is done, but teacher\.run \S+/teacher has changed since \(epoch {int(second.stem[-4:])} "
    )
    assert re.search(expected, " ".join(refused.stderr.split()))


def small_graph(tmp_path, **tasks):
    config = {name: TaskConfig(**values) for name, values in tasks.items()}
    return graph.build(PipelineConfig(run_dir=str(tmp_path / "graph"), tasks=config))


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
    found = dict(re.findall(r"^│ (\w) +│ +1 │ (\w+)", done.stdout, re.M))
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


NOOP = {"module": "data_prep.splits"}


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ({"a": {**NOOP, "after": ["bb"]}, "b": NOOP}, "tasks.a.after: no task bb; did you mean b?"),
        ({"a": {**NOOP, "after": ["b"]}, "b": {**NOOP, "after": ["a"]}}, "wait for each other"),
        ({"a": {"module": "ckd_dist.nothing"}}, "tasks.a: no module ckd_dist.nothing"),
        ({"a": {"module": "ckd_dist.distill", "options": {"epocs": 3}}}, "tasks.a: unknown option --epocs"),
        ({"a": {"module": "ckd_dist.distill", "config": "none.yaml"}}, "tasks.a: .*none.yaml"),
        ({"a": {**NOOP, "limit": 2}}, "tasks.a: limit is for an array"),
        ({"a": {**NOOP, "array": {"part": []}}}, "tasks.a: array.part: give a list"),
        ({"a": {**NOOP, "slurm": {"nodse": 2}}}, r"tasks.a: slurm has no \['nodse'\]"),
        ({"a": {**NOOP, "slurm": {"nodes": 0}}}, "tasks.a: slurm.nodes is 0"),
    ],
)
def test_a_bad_graph_is_refused_by_the_name_of_its_task(tasks, expected, tmp_path):
    with pytest.raises(UserError, match=expected):
        small_graph(tmp_path, **tasks)


def test_a_job_is_known_by_what_it_does_and_what_it_needs(tmp_path):
    def keys(**changes):
        tasks = {
            "a": {**NOOP, "options": {"x": changes.get("a", 1)}},
            "b": {**NOOP, "array": {"part": changes.get("parts", 2)}, "after": ["a"]},
            "c": {**NOOP, "slurm": changes.get("slurm", {}), "after": ["a"]},
        }
        return {name: [job.key for job in task.jobs] for name, task in small_graph(tmp_path, **tasks).items()}

    before = keys()
    assert keys(slurm={"nodes": 4}) == before  # where it runs does not change what it is
    assert all(keys(a=2)[name] != before[name] for name in "abc")
    assert keys(parts=3)["c"] == before["c"] and len(set(keys(parts=3)["b"])) == 3
    commands = [job.command for job in small_graph(tmp_path, a={**NOOP, "array": {"part": 2}})["a"].jobs]
    assert [command.words for command in commands] == [("--part", "1/2"), ("--part", "2/2")]


def test_images_that_are_there_are_used_only_if_they_are_the_right_ones(fashion, tmp_path):
    def state(subset):
        options = {"dataset": "fashion_mnist", "split": "train", "holdout": 0.1, "subset": subset}
        images = {"module": "data_prep.write_beton", "options": {**options, "out": str(fashion["train"])}}
        (job,) = small_graph(tmp_path, images=images)["images"].jobs
        return str(graph.state_without_queue(job, None))

    assert state(1201) == "done (was there)"
    with pytest.raises(UserError, match=r"tasks.images: .*train.beton is there already, with subset 1201, not 1200"):
        state(1200)


def test_a_set_of_images_is_there_once_those_for_training_are(tmp_path):
    options = {"dataset": "fashion_mnist", "split": "all", "subset": 20, "out": str(tmp_path)}
    (job,) = small_graph(tmp_path, images={"module": "data_prep.write_beton", "options": options})["images"].jobs
    assert str(graph.state_without_queue(job, None)) == "missing"
    run("data_prep.write_beton", *(word for key, value in options.items() for word in (f"--{key}", value)))
    assert str(graph.state_without_queue(job, None)) == "done (was there)"


def test_options_of_the_job_and_of_the_command_are_told_apart():
    line = "ckd_dist.store verify S --slurm.nodes 2 --data.train X --wait --cpus=3 --dry_run --k 4"
    module, theirs, mine = split(flag_words(shlex.split(line), *FLAGS))
    assert module == "ckd_dist.store" and theirs == ["verify", "S", "--data.train", "X", "--k", "4"]
    assert mine == ["--slurm.nodes", "2", "--wait=true", "--cpus=3", "--dry_run=true"]


def test_a_time_limit_leaves_time_for_the_signal():
    SlurmConfig(timeout_min=4, signal_delay_s=120)
    with pytest.raises(UserError, match="give 7 or more"):
        SlurmConfig(timeout_min=4, signal_delay_s=300)

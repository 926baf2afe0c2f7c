"""Graphs: which are refused, how a job is known, what is there already."""

from __future__ import annotations

import pytest

from ckd_dist.core.errors import UserError
from launch import graph
from launch.graph import PipelineConfig, TaskConfig
from tests.helpers.commands import run


def small_graph(tmp_path, **tasks):
    config = {name: TaskConfig(**values) for name, values in tasks.items()}
    return graph.build(PipelineConfig(run_dir=str(tmp_path / "graph"), tasks=config))


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

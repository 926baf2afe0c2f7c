"""The whole graph, from data to report, on a real SLURM cluster of this machine."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import yaml

from tests.helpers.cluster import launch


def image_tasks(folder: Path) -> dict[str, dict]:
    """A task for each part of the data set."""
    images = {"module": "data_prep.write_beton"}
    subset = {"dataset": "fashion_mnist", "holdout": 0.1, "subset": 200}
    return {
        f"{split}_images": {**images, "options": {**subset, "split": split, "out": f"{folder}/{split}.beton"}}
        for split in ("train", "holdout", "test")
    }


def write_graph(folder: Path) -> Path:
    """The whole graph, small: data to report, a teacher, two groups of checkpoints, four parts of a search."""
    data = {"train": f"{folder}/train.beton", "val": f"{folder}/holdout.beton"}
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
        **image_tasks(folder),
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
        return dict(re.findall(r"^│ (\w+) +│ +\d+ │ (.*?) *│", text, re.MULTILINE))

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

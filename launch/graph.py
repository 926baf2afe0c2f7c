"""A graph of tasks: read from its configuration, each known by a hash of what it does and of what it needs."""

from __future__ import annotations

import difflib
import graphlib
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckd_dist.commands import COMMANDS
from ckd_dist.core.errors import UserError, require
from ckd_dist.core.options import flatten
from launch import jobs
from launch.jobs import Command, LaunchConfig, SlurmConfig
from launch.slurm import State, read_result
from launch.worker import write_json


@dataclass(kw_only=True)
class TaskConfig:
    """One node of the graph: a command, or an array of them."""

    module: str
    """What `python -m` runs."""
    config: str | None = None
    """YAML file of its options."""
    options: dict[str, Any] = field(default_factory=dict)
    """Its options, which win over those of the file."""
    arguments: list[str] = field(default_factory=list)
    """Words that are no options, such as those of ckd_dist.store."""
    after: list[str] = field(default_factory=list)
    """Tasks that must be done before."""
    array: dict[str, Any] = field(default_factory=dict)
    """One option and its values, a job of an array for each: {teacher.checkpoints: [[2, 4], [6, 8]]}; a number n stands
    for the parts 1/n to n/n: {part: 16}."""
    limit: int | None = None
    """Jobs of the array that run at a time; default: all."""
    slurm: dict[str, Any] = field(default_factory=dict)
    """What differs from the graph's slurm."""
    cpus: int | None = None
    """Processes on each node without GPUs; default: the graph's."""


@dataclass(kw_only=True)
class PipelineConfig(LaunchConfig):
    """A graph of tasks."""

    run_dir: str
    """Folder of the graph's records, logs and code; what tasks make goes where their options say."""
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """Name -> task; only in the YAML file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.tasks), "tasks is missing: give --config with a YAML file that names them")


@dataclass(frozen=True, eq=False)
class Job:
    """A task, or one job of its array."""

    task: str
    index: int | None
    command: Command
    key: str
    """Hash of the command and of the keys of all jobs of the tasks before."""

    @property
    def name(self) -> str:
        """Of its record."""
        return f"{self.task}{'' if self.index is None else f'.{self.index}'}-{self.key[:12]}"

    @property
    def output(self) -> Path | None:
        """What must be there once it is done, where its options name it."""
        options = self.command.options or _words_to_options(self.command.words)
        found = next((options[key] for key in ("run_dir", "store", "out") if options.get(key)), None)
        if found and options.get("split") == "all":  # of images: a folder, into which those for training come last
            return Path(found) / "train.beton"
        return Path(found) if found else None


@dataclass(frozen=True)
class Task:
    """With its jobs, and what they request."""

    name: str
    config: TaskConfig
    jobs: list[Job]
    slurm: SlurmConfig
    cpus: int


def build(config: PipelineConfig) -> dict[str, Task]:
    """Every task with its jobs, in an order in which they can run; raises `UserError` naming the task."""
    for name, task in config.tasks.items():
        for other in task.after:
            near = difflib.get_close_matches(other, config.tasks, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            require(other in config.tasks, f"tasks.{name}.after: no task {other}{hint}")
    sorter = graphlib.TopologicalSorter({name: task.after for name, task in config.tasks.items()})
    order: list[str] = []
    try:
        sorter.prepare()
        while ready := sorted(sorter.get_ready(), key=list(config.tasks).index):
            order += ready
            sorter.done(*ready)
    except graphlib.CycleError as error:
        raise UserError(f"tasks: {' -> '.join(reversed(error.args[1]))} wait for each other") from None
    tasks: dict[str, Task] = {}
    for name in order:
        task = config.tasks[name]
        inputs = sorted(job.key for other in task.after for job in tasks[other].jobs)
        try:
            tasks[name] = Task(
                name,
                task,
                [
                    Job(name, index, command, _hash(command, inputs))
                    for index, command in _commands(task)
                ],
                jobs.replaced(config.slurm, task.slurm, "slurm"),
                task.cpus or config.cpus,
            )  # fmt: skip
        except UserError as error:
            raise UserError(f"tasks.{name}: {error}") from None
    return tasks


def _commands(task: TaskConfig) -> Iterator[tuple[int | None, Command]]:
    """(index in the array, command) of each job."""
    require(task.limit is None or bool(task.array), "limit is for an array")
    require(task.limit is None or task.limit >= 1, f"limit is {task.limit}: give 1 or more")
    if not task.array:
        yield None, _command(task, {})
        return
    require(len(task.array) == 1, "array names several options: give one, and its values")
    ((option, values),) = task.array.items()
    if isinstance(values, int):
        values = [f"{i}/{values}" for i in range(1, values + 1)]
    require(isinstance(values, list) and bool(values), f"array.{option}: give a list of values, or a number of parts")
    for index, value in enumerate(values):
        yield index, _command(task, {option: value})


def _command(task: TaskConfig, more: dict[str, Any]) -> Command:
    options = {**flatten(task.options), **more}
    if task.module in COMMANDS:
        require(not task.arguments, f"{task.module} takes options only, not arguments {task.arguments}")
        words = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]
        return jobs.read_command(task.module, [*(["--config", task.config] if task.config else []), *words])
    require(task.config is None, f"config: {task.module} reads no YAML file, give options")
    words = [word for key, value in options.items() for word in _words(key, value)]
    return jobs.read_command(task.module, [*map(str, task.arguments), *words])


def _words(key: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{key}"] if value else []
    return [f"--{key}", str(value)]


def _words_to_options(words: tuple[str, ...]) -> dict[str, str]:
    return {word[2:]: value for word, value in itertools.pairwise(words) if word.startswith("--")}


def _hash(command: Command, inputs: list[str]) -> str:
    values = [command.module, command.options, command.words, inputs]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------- records


@dataclass(frozen=True)
class Record:
    """Of a job that was submitted."""

    job_id: str
    executor: str
    folder: Path
    """Of its log files and its result."""

    @property
    def result(self) -> Path:
        """The file that the job leaves."""
        return self.folder / f"{self.job_id}.json"

    @property
    def log(self) -> Path:
        """Rank 0's log."""
        return self.folder / f"{self.job_id}_0_log.out"


class Records:
    """What was submitted, in a folder: a file for each job, by the job's key."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, job: Job, ending: str) -> Path:
        """A file of this job's."""
        return self.folder / f"{job.name}.{ending}"

    def read(self, job: Job) -> Record | None:
        """The last submission of this very job."""
        path = self.path(job, "json")
        if not path.exists():
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
        return Record(values["job_id"], values["executor"], Path(values["folder"]))

    def write(self, job: Job, record: Record) -> None:
        """Remember a submission."""
        self.folder.mkdir(parents=True, exist_ok=True)
        values = {"job_id": record.job_id, "executor": record.executor, "folder": str(record.folder)}
        write_json(self.path(job, "json"), values)


def state_without_queue(job: Job, record: Record | None) -> State | None:
    """What is known of a job without a query to SLURM: done, or never submitted; None where the queue must tell."""
    if record is not None:
        result = read_result(record.result)
        if result is None or result["status"]:
            return None
        missing = job.output is not None and not job.output.exists()
        return State("missing", f"{job.output} is gone") if missing else State("done")
    if job.command.module == "data_prep.write_beton" and job.output is not None and job.output.exists():
        _require_same_images(job, job.output)
        return State("done", "was there")
    return State("missing")


def _require_same_images(job: Job, path: Path) -> None:
    """Raise `UserError` where a file that was there before the graph is not what the task would write."""
    requested = _words_to_options(job.command.words)
    described = Path(f"{path}.json")
    known = json.loads(described.read_text(encoding="utf-8")) if described.exists() else {}
    known = {**known.get("recipe", {}), **known}
    for key in ("dataset", "split", "subset", "holdout", "max-resolution", "write-mode"):
        there = known.get(key.replace("-", "_"))
        require(
            key not in requested or there is None or requested[key] in (str(there), "all"),
            f"tasks.{job.task}: {path} is there already, with {key} {there}, not {requested.get(key)}: remove it, or "
            "choose another --out",
        )

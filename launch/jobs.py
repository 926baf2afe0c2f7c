"""Submitting: what jobs request from a cluster, the copy of the code that they run, and the checks before."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cloudpickle
import submitit

from ckd_dist.commands import COMMANDS
from ckd_dist.core.errors import UserError, require
from ckd_dist.core.options import load_config, to_dict
from launch import slurm, worker

PACKAGES = ("ckd_dist", "launch", "data_prep")
ONE_PROCESS = ("data_prep.", "ckd_dist.report")
"""Commands that run in one process."""
FLAGS = ("wait", "dry_run")
"""Options of `LaunchConfig` that may stand alone."""
START_SECONDS = 60
"""From a job's start until a training heeds signals."""

cloudpickle.register_pickle_by_value(worker)


@dataclass(kw_only=True)
class SlurmConfig:
    """What a job asks for. Options of sbatch that are not here: slurm.extra."""

    partition: str | None = None
    """Default: the cluster's."""
    nodes: int = 1
    """Number of nodes."""
    gpus_per_node: int = 0
    """GPUs of each node, a process each; 0: --cpus processes."""
    cpus_per_gpu: int = 1
    """Cores of each process."""
    timeout_min: int = 60
    """Time limit in minutes, after which the job goes back to the queue and goes on."""
    signal_delay_s: int = 120
    """Seconds before the limit at which rank 0 stops and saves; SLURM may send the signal a minute earlier."""
    max_restarts: int = 100
    """How often a job may start again: after its time limit, a preemption, a node's failure, `scontrol requeue`."""
    account: str | None = None
    """As in sbatch."""
    constraint: str | None = None
    """As in sbatch."""
    qos: str | None = None
    """As in sbatch."""
    extra: dict[str, str] = field(default_factory=dict)
    """Any other option of sbatch: --slurm.extra.mem 64G --slurm.extra.exclude node7."""

    def __post_init__(self) -> None:
        for name in ("nodes", "cpus_per_gpu", "timeout_min"):
            require(getattr(self, name) >= 1, f"slurm.{name} is {getattr(self, name)}: give 1 or more")
        for name in ("gpus_per_node", "max_restarts", "signal_delay_s"):
            require(getattr(self, name) >= 0, f"slurm.{name} is {getattr(self, name)}: give 0 or more")
        least = self.signal_delay_s + 60 + START_SECONDS
        require(
            60 * self.timeout_min >= least,
            f"slurm.timeout_min {self.timeout_min} is too short for slurm.signal_delay_s {self.signal_delay_s}: SLURM "
            f"may send the signal 60 s early, and a job takes {START_SECONDS} s to start: give {-(-least // 60)} or "
            "more",
        )


@dataclass(kw_only=True)
class LaunchConfig:
    """Where and how to run."""

    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    cpus: int = 1
    """Processes on each node where slurm.gpus_per_node is 0."""
    executor: Literal["slurm", "local"] = "slurm"
    """local: processes on this machine."""
    wait: bool = False
    """Stay, show the progress, and end with the job's exit status."""
    dry_run: bool = False
    """Show what would be submitted, let sbatch check it, and submit nothing."""

    def __post_init__(self) -> None:
        require(self.cpus >= 1, f"cpus is {self.cpus}: give 1 or more")


@dataclass(frozen=True)
class Command:
    """`python -m module`, with options as a validated configuration or as words."""

    module: str
    options: dict[str, Any] | None
    """Of a command of `COMMANDS`, resolved; None for others."""
    words: tuple[str, ...] = ()
    """Of other commands."""

    def command_line(self, options_file: Path) -> list[str]:
        """The words after the module; writes `options_file` where there are options."""
        if self.options is None:
            return list(self.words)
        options_file.parent.mkdir(parents=True, exist_ok=True)
        worker.write_json(options_file, self.options)  # JSON is YAML
        return ["--config", str(options_file)]


def read_command(module: str, words: Iterable[str]) -> Command:
    """Check a command and its options; raises `UserError`."""
    words = list(words)
    if module in COMMANDS:
        return Command(module, to_dict(load_config(COMMANDS[module], words)))
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    require(
        found is not None, f"no module {module}: give one of {', '.join(COMMANDS)}, or another that python -m can run"
    )
    return Command(module, None, tuple(words))


# ------------------------------------------------------------------------------------------- checks


def preflight(config: SlurmConfig, cpus: int, modules: Iterable[str], folder: Path) -> None:
    """Raise `UserError` for what the cluster would refuse, or start and fail."""
    processes = config.nodes * (config.gpus_per_node or cpus)
    for module in modules:
        require(
            processes == 1 or not module.startswith(ONE_PROCESS),
            f"{module} runs in one process, here are {processes}: give --slurm.nodes 1 --slurm.gpus_per_node 0 "
            "--cpus 1",
        )
    where = folder.absolute()
    for local in ("/dev/shm", *filter(None, [slurm.setting("TmpFS")])):
        require(
            not where.is_relative_to(local),
            f"run_dir: {folder} is under {local}, which every node has for itself: choose a shared folder",
        )
    has = slurm.partition(config.partition)
    wanted = {
        "gpus_per_node": (config.gpus_per_node, has.gpus, "GPUs a node"),
        "cpus_per_gpu": (config.cpus_per_gpu * (config.gpus_per_node or cpus), has.cpus, "cores a node"),
        "nodes": (config.nodes, has.nodes, "nodes"),
        "timeout_min": (config.timeout_min, has.minutes, "minutes at most"),
    }
    for name, (amount, there, what) in wanted.items():
        require(
            amount <= there,
            f"slurm.{name}: {amount} {what.removesuffix(' at most')} asked, partition {has.name} has {there:g} {what}",
        )


def check_store(command: Command) -> None:
    """Raise `UserError` when the store that a caching is to write does not fit on its disk; known only once the teacher
    and the images are there."""
    options = command.options
    if command.module != "ckd_dist.cache_logits" or options is None:
        return
    if not Path(options["data"]["train"]).exists() or not Path(options["teacher"]["run"]).exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        words = command.command_line(Path(folder) / "options.yaml")
        environment = {**os.environ, "PYTHONPATH": str(root())}
        program = [sys.executable, "-m", "ckd_dist.store", "plan", *words, "--trial_seconds=0", "--json"]
        done = subprocess.run(program, capture_output=True, encoding="utf-8", errors="replace", env=environment)
    if done.returncode == 2 or not done.stdout.startswith("{"):
        raise UserError(done.stderr.strip().removeprefix("error: ") or "store plan failed")
    plan = json.loads(done.stdout)
    missing, free = plan["missing_bytes"], plan["free_bytes"]
    require(
        missing <= free,
        f"store: {options['store']} needs {missing / 1e9:,.3g} GB more, the disk has {free / 1e9:,.3g} GB free: make "
        "room, choose another disk, fewer --views, or --codec topk",
    )


# ------------------------------------------------------------------------------------------- code


def root() -> Path:
    """The folder that holds the packages."""
    return Path(__file__).resolve().parent.parent


def copy_code(folder: Path) -> Path:
    """Copy the packages into `folder`, under a name that is a hash of them, unless they are there already.

    With the times of the files, and what numba has compiled of them: jobs need not compile it anew.
    """
    files = sorted(path for name in PACKAGES for path in (root() / name).rglob("*.py"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(root())}\0".encode() + path.read_bytes() + b"\0")
    target = folder.absolute() / digest.hexdigest()[:12]
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=".code_", dir=folder))
    compiled = [path for name in PACKAGES for path in (root() / name).rglob("__pycache__/*.nb[ci]")]
    for path in [*files, *compiled]:
        copy = staged / path.relative_to(root())
        copy.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # numba has just replaced it
            shutil.copy2(path, copy)
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", *PACKAGES)
    (staged / "commit.json").write_text(json.dumps({"commit": commit, "dirty": bool(changes)}), encoding="utf-8")
    staged.chmod(0o755)
    try:
        staged.rename(target)
    except OSError:  # another submission was first
        shutil.rmtree(staged)
    return target


def describe_code(code: Path) -> str:
    """One line on the copied code: its commit, and whether the work tree was dirty."""
    known = json.loads((code / "commit.json").read_text(encoding="utf-8"))
    commit = (known["commit"] or "no commit")[:12]
    return f"code: {code} ({commit}{', with uncommitted changes' if known['dirty'] else ''})"


def git(*words: str) -> str | None:
    """Output of git in the work tree, None outside one."""
    try:
        done = subprocess.run(
            ["git", *words], cwd=root(), capture_output=True, encoding="utf-8", errors="replace", timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# ------------------------------------------------------------------------------------------- submitting


def make_executor(
    name: str,
    config: SlurmConfig,
    cpus: int,
    folder: Path,
    *,
    kind: str,
    dependency: str | None = None,
    limit: int | None = None,
) -> Any:
    """submitit's executor for jobs of this kind, whose files go to `folder`."""
    processes = config.gpus_per_node or cpus
    shared: dict[str, Any] = {"nodes": config.nodes, "gpus_per_node": config.gpus_per_node or None}
    if kind == "local":
        require(config.nodes == 1, f"slurm.nodes is {config.nodes}: --executor local has one node")
        executor: Any = submitit.LocalExecutor(folder, max_num_timeout=config.max_restarts)
        executor.update_parameters(
            **{key: value for key, value in shared.items() if value},
            timeout_min=config.timeout_min,
            tasks_per_node=processes,
            signal_delay_s=config.signal_delay_s,
        )
        return executor
    extra = {"requeue": True, **config.extra}
    if dependency:
        extra |= {"dependency": dependency, "kill-on-invalid-dep": "yes"}
    executor = submitit.SlurmExecutor(folder, max_num_timeout=config.max_restarts)
    options = {key: getattr(config, key) for key in ("partition", "account", "constraint", "qos", "signal_delay_s")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        executor.update_parameters(
            **{key: value for key, value in {**shared, **options}.items() if value is not None},
            job_name=name,
            time=config.timeout_min,
            ntasks_per_node=processes,
            cpus_per_task=config.cpus_per_gpu,
            array_parallelism=limit or 100_000,
            additional_parameters=extra,
            # srun takes --cpus-per-task from sbatch no longer; a rank that ends takes the others with it.
            srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={config.cpus_per_gpu}"],
            wckey=None,
        )
    return executor


def batch_script(executor: Any) -> str:
    """What sbatch would get."""
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def try_script(script: str) -> str:
    """`sbatch --test-only`: when and where it would start; raises `UserError` where it is refused."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh", encoding="utf-8") as file:
        file.write(script)
        file.flush()
        done = slurm.command("sbatch", "--test-only", file.name)
    lines = done.stderr.strip().splitlines() or ["no answer"]
    require(done.returncode == 0, lines[-1].replace("allocation failure: ", "").replace("sbatch: error", "sbatch"))
    return lines[-1]


def submit(executor: Any, commands: list[list[str]], modules: list[str], code: Path, config: SlurmConfig) -> list[str]:
    """Submit jobs that are alike in what they request, as an array where they are several; returns their ids.

    Raises `UserError` where sbatch refuses.
    """
    folder = Path(executor.folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    workers = [
        worker.Worker(module, words, code, folder, config.cpus_per_gpu, config.max_restarts)
        for module, words in zip(modules, commands, strict=True)
    ]
    try:
        with warnings.catch_warnings(), _no_output():
            warnings.simplefilter("ignore")
            if len(workers) == 1:
                jobs = [executor.submit(workers[0])]
            else:
                with executor.batch():
                    jobs = [executor.submit(each) for each in workers]
    except submitit.core.utils.FailedJobError as error:
        lines = [line for line in str(error).splitlines() if "sbatch" in line] or str(error).splitlines()
        raise UserError(f"sbatch refuses: {lines[-1].removeprefix('sbatch: error: ')}") from None
    return [job.job_id for job in jobs]


@contextlib.contextmanager
def _no_output() -> Iterator[None]:
    """Without stdout and stderr: a job on this machine must not hold those of the command that started it, and submitit
    prints what sbatch says before it raises it."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        os.dup2(null, 2)
        yield
    finally:
        sys.stderr.flush()
        for number, copy in enumerate(kept, start=1):
            os.dup2(copy, number)
            os.close(copy)
        os.close(null)


def replaced(config: SlurmConfig, values: dict[str, Any], where: str) -> SlurmConfig:
    """`config` with other values; raises `UserError` for an unknown one."""
    known = {each.name for each in dataclasses.fields(SlurmConfig)}
    unknown = sorted(values.keys() - known)
    require(not unknown, f"{where} has no {unknown[:1]}: give some of {', '.join(sorted(known))}")
    return dataclasses.replace(config, **values)

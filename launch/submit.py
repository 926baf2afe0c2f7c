"""Run one command as a job: on every GPU of some nodes of a SLURM cluster, or on this machine.

  python -m launch.submit ckd_dist.distill --config student.yaml --slurm.partition gpu --slurm.nodes 4 \\
      --slurm.gpus_per_node 8 --slurm.cpus_per_gpu 12 --slurm.timeout_min 1440 --slurm.account A [--wait]

The first word is the module that `python -m` would run; options below are the job's, all others the command's. srun
starts a process on every GPU (without GPUs: --cpus on every node), so that SLURM knows each rank, and one that fails
ends the others. The job outlives its time limit, preemption, node failures and `scontrol requeue`: it goes on from its
last save. A command that fails ends the job, and its last lines are shown. The job runs a copy of the code and of the
resolved options as they are now; its files are in RUN_DIR/jobs (for a caching, STORE.jobs).
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

import yaml
from rich.console import Console

from ckd_dist.core.errors import UserError
from ckd_dist.core.options import flag_words, load_config, option_words
from ckd_dist.core.process import run_process
from launch import jobs, slurm
from launch.jobs import Command, LaunchConfig
from launch.local import LocalWatch
from launch.worker import own_lines

OWN = ("cpus", "executor", "wait", "dry_run")
"""Options that are the job's, beside those of slurm."""
console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    """Submit; with --wait, follow to the end. Returns the exit status."""
    words = flag_words(option_words(sys.argv[1:]), *jobs.FLAGS)
    module, theirs, mine = split(words)
    if {"-h", "--help"} & set(mine):
        load_config(LaunchConfig, ["--help"], prog="python -m launch.submit MODULE", description=__doc__)
    if module is None:
        raise UserError("the first word is the module to run, such as ckd_dist.distill (see --help)")
    config = load_config(LaunchConfig, mine)
    command = jobs.read_command(module, theirs)
    folder = job_folder(command)
    if config.executor == "slurm":
        slurm.require_slurm()
        jobs.preflight(config.slurm, config.cpus, [module], folder)
    jobs.check_store(command)
    name = module.rpartition(".")[2]
    executor = jobs.make_executor(name, config.slurm, config.cpus, folder, kind=config.executor)
    if config.dry_run:
        return show(command, config, executor)
    code = jobs.copy_code(folder / "code")
    options_file = folder / f"{name}_{time.strftime('%Y%m%d_%H%M%S')}.yaml"
    (job,) = jobs.submit(executor, [command.command_line(options_file.absolute())], [module], code, config.slurm)
    console.print(jobs.describe_code(code))
    log = folder / f"{job}_0_log"
    console.print(f"job {job}: {module}\nlogs: {log}.out, {log}.err\nfollow: tail -F {log}.out")
    console.print(f"cancel: {'scancel' if config.executor == 'slurm' else 'kill'} {job}")
    return follow(job, folder, config.executor) if config.wait else 0


def split(words: list[str]) -> tuple[str | None, list[str], list[str]]:
    """(module, words of its options, words of the job's options) of a command line."""
    theirs: list[str] = []
    mine: list[str] = []
    if not words or words[0].startswith("-"):
        return None, [], words
    into = theirs
    for word in words[1:]:
        if word in ("-h", "--help"):
            mine.append(word)
        elif word.startswith("--"):
            name, complete, _ = word[2:].partition("=")
            own = name in OWN or name.startswith("slurm.")
            (mine if own else theirs).append(word)
            into = mine if own and not complete else theirs
        else:
            into.append(word)
    return words[0], theirs, mine


def job_folder(command: Command) -> Path:
    """Where a job keeps its files: in the folder that the command makes, but beside a store."""
    options = command.options or {}
    if "run_dir" in options:
        return Path(options["run_dir"]) / "jobs"
    if "store" in options:
        return Path(f"{options['store'].rstrip('/')}.jobs")
    return Path("jobs")


def show(command: Command, config: LaunchConfig, executor) -> int:
    """What would be submitted, and what sbatch says to it."""
    console.print(f"python -m {command.module} {shlex.join(command.words)}", markup=False)
    if command.options:
        console.print(yaml.safe_dump(command.options, sort_keys=False), markup=False)
    if config.executor == "slurm":
        script = jobs.batch_script(executor)
        console.print(script, markup=False)
        console.print(jobs.try_script(script), markup=False)
    return 0


def follow(job: str, folder: Path, kind: str) -> int:
    """Show the state, and the last line of rank 0's log, until the job is over; returns its exit status."""
    result = folder / f"{job}.json"
    watch = slurm.Watch({job: result}) if kind == "slurm" else LocalWatch({job: result})
    before, printed = None, time.monotonic()
    with console.status("") as status:
        for states in watch.follow():
            state = states[job]
            line = last_line(folder / f"{job}_0_log.out")
            status.update(f"job {job}: {state}  {line}")
            due = not console.is_terminal and time.monotonic() - printed > 30
            if state != before or due:
                printed = time.monotonic()
                console.print(f"job {job}: {state}  {line if due else ''}".rstrip(), markup=False)
            before = state
    assert before is not None
    return report(job, before, folder)


def report(job: str, state: slurm.State, folder: Path) -> int:
    """Say how a job ended: its last line, or what it left on stderr; returns its exit status."""
    if state.name == "done":
        console.print(last_line(folder / f"{job}_0_log.out"), markup=False)
        return 0
    for line in failure(folder, job):
        console.print(line, markup=False)
    found = slurm.read_result(folder / f"{job}.json")
    return found["status"] if found and 0 < found["status"] < 256 else 1


def failure(folder: Path, job: str) -> list[str]:
    """The last lines of stderr of the rank that failed first, or of rank 0 where a job left no result."""
    result = slurm.read_result(folder / f"{job}.json")
    if result and result["status"]:
        return [f"rank {result['rank']} on {result['host']}:", *result["lines"]]
    path = folder / f"{job}_0_log.err"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return [f"the end of {path}:", *lines[-10:]]


def last_line(path: Path) -> str:
    """Of a command's own lines in a log."""
    if not path.exists():
        return ""
    return "".join(own_lines(path, max(0, path.stat().st_size - 4096))[-1:]).strip()


if __name__ == "__main__":
    run_process(main)

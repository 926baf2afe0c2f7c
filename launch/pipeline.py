"""Run a whole graph of jobs: data, teachers, caching, selection, students, report.

  python -m launch.pipeline --config configs/pipelines/fashion_mnist.yaml [--dry-run] [--wait] [--executor local]
  python -m launch.pipeline status --config ...             the state of every task
  python -m launch.pipeline logs [TASK ...] --config ...    where the logs are, and the end of those that failed
  python -m launch.pipeline cancel [TASK ...] --config ...  cancel what waits or runs

On SLURM all is submitted at once, and SLURM keeps the order: a task waits for those that it names in `after`; one that
fails cancels what needs it, and nothing else. A job is known by a hash of its resolved options and of the jobs before
it: the same command again submits only what is missing, failed or changed. An array longer than the cluster allows is
split. With --executor local, the tasks run on this machine, one after another. The jobs run copies of the code and
options as they are now.
"""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ckd_dist import lineage
from ckd_dist.core.errors import UserError, require
from ckd_dist.core.options import flag_words, load_config, option_words
from ckd_dist.core.process import run_process
from launch import jobs, local, slurm
from launch.graph import Job, PipelineConfig, Record, Records, Task, build, state_without_queue
from launch.slurm import State
from launch.submit import failure

console = Console(highlight=False, soft_wrap=True)
STYLES = {"done": "green", "running": "cyan", "failed": "red", "cancelled": "yellow"}


def main() -> int:
    """Run a subcommand, or submit; returns the exit status."""
    words = flag_words(option_words(sys.argv[1:]), *jobs.FLAGS)
    verb = words.pop(0) if words[:1] in (["status"], ["logs"], ["cancel"]) else "run"
    names: list[str] = []
    while verb in ("logs", "cancel") and words and not words[0].startswith("-"):
        names.append(words.pop(0))
    config = load_config(PipelineConfig, words, prog="python -m launch.pipeline", description=__doc__)
    pipeline = Pipeline(config)
    unknown = [name for name in names if name not in pipeline.tasks]
    require(not unknown, f"no task {unknown[:1]}: give some of {', '.join(pipeline.tasks)}")
    chosen = [task for name, task in pipeline.tasks.items() if name in (names or pipeline.tasks)]
    if verb == "status":
        states = pipeline.look()
        console.print(pipeline.table(states))
        return 0
    if verb == "logs":
        return pipeline.logs(chosen)
    if verb == "cancel":
        return pipeline.cancel(chosen)
    return pipeline.run()


class Pipeline:
    """A graph, and what is known of its jobs."""

    def __init__(self, config: PipelineConfig):
        self.config, self.folder = config, Path(config.run_dir)
        self.tasks = build(config)
        self.all_jobs = [job for task in self.tasks.values() for job in task.jobs]
        self._store = Records(self.folder / "tasks")
        self.records: dict[Job, Record] = {}
        for job in self.all_jobs:
            if (record := self._store.read(job)) is not None:
                self.records[job] = record

    # ----------------------------------------------------------------------------------- states

    def look(self) -> dict[Job, State]:
        """Every job's state; queries SLURM once for all, and again only for those that are in doubt."""
        states, queried = {}, {}
        for job in self.all_jobs:
            record = self.records.get(job)
            known = state_without_queue(job, record)
            if known is not None:
                states[job] = known
            else:
                assert record is not None
                queried[job] = record
        for kind, watch in (("slurm", slurm.Watch), ("local", local.LocalWatch)):
            mine = {job: record for job, record in queried.items() if record.executor == kind}
            if mine:
                if kind == "slurm":
                    slurm.require_slurm()
                found = watch({record.job_id: record.result for record in mine.values()}).settle()
                states.update({job: found[record.job_id] for job, record in mine.items()})
        return states

    def table(self, states: dict[Job, State]) -> Table:
        """The graph's tasks with the states of their jobs."""
        table = Table(title=str(self.folder), title_justify="left")
        for column in ("task", "jobs", "state", "job ids", "after"):
            table.add_column(column, justify="right" if column == "jobs" else "left", overflow="fold")
        for name, task in self.tasks.items():
            counts = Counter(states[job].name for job in task.jobs)
            notes = [states[job].note for job in task.jobs if states[job].note]
            cells = [f"{count if len(task.jobs) > 1 else ''} [{STYLES.get(state, 'dim')}]{state}[/]".strip()
                     for state, count in counts.items()]  # fmt: skip
            note = f" ({notes[0]})" if notes else ""
            ids = dict.fromkeys(self.records[job].job_id.split("_")[0] for job in task.jobs if job in self.records)
            table.add_row(
                name, str(len(task.jobs)), ", ".join(cells) + note, " ".join(ids), ", ".join(task.config.after)
            )
        return table

    # ----------------------------------------------------------------------------------- run

    def run(self) -> int:
        """Submit what is missing; with --wait or locally, stay to the end."""
        config = self.config
        if config.executor == "slurm":
            slurm.require_slurm()
            for name, task in self.tasks.items():
                try:
                    jobs.preflight(task.slurm, task.cpus, [task.config.module], self.folder)
                except UserError as error:
                    raise UserError(f"tasks.{name}: {error}") from None
        states = self.look()
        self._require_unchanged(states)
        missing = {job for job in self.all_jobs if states[job].name not in ("done", "pending", "running")}
        for task in self.tasks.values():  # once for an array: its jobs share the store
            for job in [job for job in task.jobs if job in missing][:1]:
                jobs.check_store(job.command)
        if config.dry_run:
            return self._dry_run(states, missing)
        if not missing:
            console.print(self.table(states))
            console.print("nothing to submit")
        else:
            self.code = jobs.copy_code(self.folder / "code")
            console.print(jobs.describe_code(self.code))
            if config.executor == "local":
                return self._run_here(states, missing)
            for task in self.tasks.values():
                self._submit(task, states, [job for job in task.jobs if job in missing])
            console.print(self.table(states))
            console.print(f"{len(missing)} of {len(self.all_jobs)} jobs submitted")
        if config.wait:
            return self._follow()
        if any(not state.final for state in states.values()):
            console.print(f"follow: python -m launch.pipeline status {shlex.join(sys.argv[1:])}")
        return 0

    def _require_unchanged(self, states: dict[Job, State]) -> None:
        """Raise `UserError` where what a job left was made of something else than what is there now."""
        seen = set()
        for job in self.all_jobs:
            if states[job].name != "done" or job.output is None or job.output in seen:
                continue
            seen.add(job.output)
            if change := lineage.changes(job.output):
                raise UserError(
                    f"tasks.{job.task}: {job.output} is done, but {change}: put back what it was, or remove "
                    f"{job.output} to have it made anew"
                )

    def _dry_run(self, states: dict[Job, State], missing: set[Job]) -> int:
        console.print(self.table(states))
        for task in self.tasks.values():
            count = sum(job in missing for job in task.jobs)
            if count:
                line = f"{task.name}: {count} jobs of {task.config.module}"
                if self.config.executor == "slurm":
                    line += f"; {jobs.try_script(jobs.batch_script(self._executor(task)))}"
                console.print(line, markup=False)
        console.print(f"{len(missing)} of {len(self.all_jobs)} jobs would be submitted")
        return 0

    def _executor(self, task: Task, dependency: str | None = None) -> Any:
        return jobs.make_executor(
            task.name, task.slurm, task.cpus, (self.folder / "jobs" / task.name).absolute(),
            kind=self.config.executor, dependency=dependency, limit=task.config.limit,
        )  # fmt: skip

    def _submit(self, task: Task, states: dict[Job, State], missing: list[Job]) -> None:
        """Submit jobs of a task, after all that must be done before."""
        before = [job for other in task.config.after for job in self.tasks[other].jobs if states[job].name != "done"]
        after_ok = [f"afterok:{self.records[job].job_id}" for job in before]
        size = slurm.max_array_size()
        chunks = [missing[start : start + size] for start in range(0, len(missing), size)]
        last: list[str] = []
        for chunk in chunks:
            # A limit is for the task: parts of a split array take turns.
            turn = [f"afterany:{job_id}" for job_id in last if task.config.limit]
            last = self._submit_here(task, chunk, ",".join([*after_ok, *turn]) or None)
            states.update({job: State("pending", "Dependency" if before else "") for job in chunk})

    def _submit_here(self, task: Task, chosen: list[Job], dependency: str | None = None) -> list[str]:
        executor = self._executor(task, dependency)
        lines = []
        for job in chosen:
            if job.command.module.startswith("data_prep.") and job.output is not None:
                job.output.parent.mkdir(parents=True, exist_ok=True)
            lines.append(job.command.command_line(self._store.path(job, "yaml").absolute()))
        ids = jobs.submit(executor, lines, [job.command.module for job in chosen], self.code, task.slurm)
        for job, job_id in zip(chosen, ids, strict=True):
            self.records[job] = Record(job_id, self.config.executor, Path(executor.folder))
            self._store.write(job, self.records[job])
        return ids

    def _run_here(self, states: dict[Job, State], missing: set[Job]) -> int:
        """Run jobs on this machine, one after another; those that need a failed one are left out."""
        for task in self.tasks.values():
            for job in (job for job in task.jobs if job in missing):
                before = [states[other] for name in task.config.after for other in self.tasks[name].jobs]
                if any(state.name != "done" for state in before):
                    states[job] = State("cancelled", "needs a task that failed")
                    continue
                self._submit_here(task, [job])
                record = self.records[job]
                console.print(f"{job.name}: log {record.log}", markup=False)
                for found in local.LocalWatch({record.job_id: record.result}).follow():
                    states[job] = found[record.job_id]
                console.print(f"{job.name}: {states[job]}", markup=False)
        return self._end(states)

    def _follow(self) -> int:
        """Show the table until all jobs are over; returns 1 where one failed."""
        ids = {record.job_id: job for job, record in self.records.items() if record.executor == "slurm"}
        states = {job: State("done", "was there") for job in self.all_jobs}
        watch = slurm.Watch({job_id: self.records[job].result for job_id, job in ids.items()})
        shown = None
        with Live(console=console, auto_refresh=False, transient=True) as live:
            for found in watch.follow():
                states.update({ids[job_id]: state for job_id, state in found.items()})
                if console.is_terminal:
                    live.update(self.table(states), refresh=True)
                    continue
                counts = Counter(state.name for state in states.values())
                line = ", ".join(f"{count} {name}" for name, count in counts.items())
                if line != shown:
                    console.print(line)
                    shown = line
        return self._end(states)

    def _end(self, states: dict[Job, State]) -> int:
        console.print(self.table(states))
        failed = [job for job in self.all_jobs if states[job].name == "failed"]
        for job in failed:
            self._print_failure(job)
        return 0 if all(state.name == "done" for state in states.values()) else 1

    def _print_failure(self, job: Job) -> None:
        record = self.records[job]
        console.print(f"{job.name}, job {record.job_id}:", style="red")
        for line in failure(record.folder, record.job_id):
            console.print(f"  {line}", markup=False)

    # ----------------------------------------------------------------------------------- logs, cancel

    def logs(self, chosen: list[Task]) -> int:
        """Print where the logs of jobs are, and the last lines of those that failed."""
        states = self.look()
        for task in chosen:
            for job in task.jobs:
                where = self.records[job].log if job in self.records else "no job yet"
                console.print(f"{job.name}: {states[job]}  {where}", markup=False)
                if states[job].name == "failed":
                    self._print_failure(job)
        return 0

    def cancel(self, chosen: list[Task]) -> int:
        """Cancel jobs that wait or run."""
        states = self.look()
        active = [job for task in chosen for job in task.jobs if states[job].name in ("pending", "running")]
        for kind, module in (("slurm", slurm), ("local", local)):
            ids = [self.records[job].job_id for job in active if self.records[job].executor == kind]
            if ids:
                module.cancel(ids)
        console.print(f"{len(active)} jobs cancelled")
        return 0


if __name__ == "__main__":
    run_process(main)

"""Train many students from one logit store, choose each teacher's best setting on held-out images, test the chosen.

  python -m ckd_dist.search --data.train train.beton --data.val holdout.beton --data.test test.beton \\
      --model.name resnet18 --teacher.store stores/teacher --grid.teachers '[[],[20],[40],[20,40]]' \\
      --grid.alphas [0.1,0.5] --grid.temperatures [1,2,4,8] --grid.seeds [0,1,2] --processes 8 --run_dir runs/search

Its options are those of distill; grid.* list the values to try, the same for every teacher. Students of one seed see
the same images in the same order, so they are trained side by side: one loader and one read of the store serve all of
them, and each ends with the weights that distill would give it, bitwise on a CPU. For each teacher and model the
setting of loss, alpha and temperature with the best mean top-1 over the seeds on data.val is chosen; data.test is
looked at once, at the end, for these.

run_dir holds students/, an ordinary run folder for each, and results.csv, a line for each. The same command again goes
on where it was. As a job array: with --part 1/16, --part 2/16, ..., and, once all are done, without it.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckd_dist import results
from ckd_dist.config import DistillConfig, KDConfig, SearchConfig, TeacherConfig, TrainDataConfig, require, to_dict
from ckd_dist.process import PARENT, STOPPED, StopRequest, run_command

if TYPE_CHECKING:
    import torch

    from ckd_dist.store.manifest import Manifest


@dataclass(frozen=True)
class Trial:
    """One student of a search."""

    model: str
    teacher: str
    """Its checkpoints, joined by +, or none."""
    weights_sha256: str | None
    """Of these checkpoints, joined by +."""
    setting: KDConfig | None
    """Loss, alpha and temperature; None without a teacher."""
    config: DistillConfig
    """What distill would train."""

    @property
    def name(self) -> str:
        """Of its run folder."""
        return Path(self.config.run_dir).name


def main(config: SearchConfig) -> None:
    # Imported here because torch takes seconds: only once the options are known to be good.
    from ckd_dist import dist, log, precision, students

    folder = Path(config.run_dir)
    number, parts = map(int, (config.part or "1/1").split("/"))
    if config.processes > 1:
        require("RANK" not in os.environ, "processes is for one plain process: leave it out under torchrun")
        require(config.part is None, "part and processes do not go together: give one of them")
        settled = precision.settle(config, folder)
        if not log.RunFolder(config.run_dir, shared_options(settled)).complete:
            share_out(settled)
    with dist.process_group() as device:
        config = precision.settle(config, began_in(folder))
        trials = list_trials(config)
        if config.part is None and config.processes == 1:  # parts may be at work all at once
            log.RunFolder(config.run_dir, shared_options(config))
        groups = side_by_side(trials, config.students_at_once, parts)[number - 1 :: parts]
        for count, group in enumerate(groups, start=1):
            missing = [trial for trial in group if not dist.on_main(partial(is_complete, trial))]
            if missing:
                log.say(f"group {count} of {len(groups)}: {', '.join(trial.name for trial in missing)}")
                students.train([trial.config for trial in missing], device)
        if config.part is not None:
            return
        table = folder / "results.csv"
        if not dist.on_main(table.exists):
            rows = choose(trials)
            if config.data.test:
                test(config, trials, rows, device)
            dist.on_main(lambda: results.write_table(table, rows))
        if dist.rank() == 0:
            show(results.read_table(table, "run_dir"))
            log.say(f"{table}: {len(trials)} students")


# ------------------------------------------------------------------------------------------- students


def list_trials(config: SearchConfig) -> list[Trial]:
    """Every student of the search; raises `UserError` for a checkpoint that the store lacks, or a setting that it does
    not serve."""
    from ckd_dist import checkpoint
    from ckd_dist.store import codecs
    from ckd_dist.store.manifest import Manifest

    grid = config.grid
    manifest = Manifest.load(Path(config.teacher.store or ""), "teacher.store")
    default = checkpoint.choose(manifest.members, config.teacher.checkpoints, "teacher.checkpoints")
    teachers = grid.teachers or [default]
    heard = [name for members in teachers for name in members] or default
    checkpoint.choose(manifest.members, heard, "grid.teachers")
    data = student_data(config, manifest, manifest.views(heard))
    hashes = {name: manifest.checkpoints[member]["weights_sha256"] for name, member in manifest.members.items()}
    trials: list[Trial] = []
    for members in teachers:
        teacher = replace(config.teacher, store=None, checkpoints=[], combine="logits")
        settings: list[KDConfig | None] = [None]
        if members:
            combine = config.teacher.combine if len(members) > 1 else "logits"
            teacher = replace(config.teacher, checkpoints=members, combine=combine)
            settings = [*list_settings(config)]
        for setting, model, seed in itertools.product(
            settings, grid.models or [config.model.name], grid.seeds or [config.seed]
        ):
            if setting:
                codecs.require_served(manifest.recorded, setting, teacher.at_once)
            weights = "+".join(hashes[name] for name in members) or None
            trials.append(make_trial(config, data, teacher, weights, setting, model, seed))
    return trials


def list_settings(config: SearchConfig) -> list[KDConfig]:
    """The combinations of loss, alpha and temperature that every teacher is tried with."""
    grid, kd = config.grid, config.kd
    losses, alphas = grid.losses or [kd.loss], grid.alphas or [kd.alpha]
    temperatures = grid.temperatures or [kd.temperature]
    settings = [
        replace(kd, loss=loss, alpha=alpha, temperature=temperature)
        for loss, alpha, temperature in itertools.product(losses, alphas, temperatures)
        if loss != "mse" or temperature == temperatures[0]  # mse has none
    ]
    if grid.trials is not None:
        settings = random.Random(config.seed).sample(settings, min(grid.trials, len(settings)))
    return settings


def make_trial(
    config: SearchConfig,
    data: TrainDataConfig,
    teacher: TeacherConfig,
    weights_sha256: str | None,
    setting: KDConfig | None,
    model: str,
    seed: int,
) -> Trial:
    """One student, with the options that distill would train it with."""
    label = "+".join(map(str, teacher.checkpoints)) or "none"
    name = f"{model}_teacher_{label.replace('/', '.')}"
    if setting:
        name += f"_{setting.loss}_alpha_{setting.alpha:g}_T_{setting.temperature:g}"
    values: dict[str, Any] = {f.name: getattr(config, f.name) for f in fields(DistillConfig)}
    values.update(data=data, model=replace(config.model, name=model), teacher=teacher, kd=setting or config.kd)
    values.update(seed=seed, run_dir=str(Path(config.run_dir) / "students" / f"{name}_seed_{seed}"))
    return Trial(model, label, weights_sha256, setting, DistillConfig(**values))


def student_data(config: SearchConfig, manifest: Manifest, views: int) -> TrainDataConfig:
    """The images of all students, views written out as the store has them, of every checkpoint `views`: for students
    without a teacher too."""
    from ckd_dist.data import view_options
    from ckd_dist.recipe import ViewRecipe

    values: dict[str, Any] = {f.name: getattr(config.data, f.name) for f in fields(TrainDataConfig)}
    cached = view_options(ViewRecipe.from_dict(manifest.recipe))
    cached.update(views=views, view_seed=manifest.view_seed)
    values.update({key: value for key, value in cached.items() if values[key] is None})
    return TrainDataConfig(**values)


def side_by_side(trials: list[Trial], at_once: int, parts: int) -> list[list[Trial]]:
    """Groups of up to `at_once` students of one seed, nearly even, and if it can be as many as fill the `parts`."""
    by_seed: dict[int, list[Trial]] = {}
    for trial in trials:
        by_seed.setdefault(trial.config.seed, []).append(trial)
    groups = {seed: -(-len(each) // at_once) for seed, each in by_seed.items()}
    while sum(groups.values()) % parts and any(groups[seed] < len(by_seed[seed]) for seed in groups):
        largest = max(groups, key=lambda seed: len(by_seed[seed]) / groups[seed])
        groups[largest] += 1
    return [by_seed[seed][start::count] for seed, count in groups.items() for start in range(count)]


def shared_options(config: SearchConfig) -> dict:
    """The options that make the results what they are: not how the work is shared out."""
    values = to_dict(config)
    return {key: value for key, value in values.items() if key not in ("processes", "part", "students_at_once")}


def is_complete(trial: Trial) -> bool:
    """Whether the student is trained out; raises `UserError` where its folder holds a run of other options."""
    from ckd_dist import log

    return log.is_complete(Path(trial.config.run_dir), to_dict(trial.config))


def began_in(folder: Path) -> Path:
    """The folder that tells the precision which a search began in: its own or, of parts that have no whole yet, that of
    any student."""
    from ckd_dist import log

    students = (path for path in sorted(folder.glob("students/*")) if log.saved_options(path))
    return folder if (folder / "config.yaml").exists() else next(students, folder)


# ------------------------------------------------------------------------------------------- processes


def share_out(config: SearchConfig) -> None:
    """Train the students in processes of this machine, a part each, and return when all are done. One that fails ends
    the others, and this process with its status; they end too when this process is killed, and save first when it is
    asked to stop."""
    import torch

    from ckd_dist import dist

    options = ["--config", str(Path(config.run_dir) / "config.yaml"), f"--students_at_once={config.students_at_once}"]
    threads = str(max(1, dist.cores_per_rank() // config.processes))
    workers, copies = [], []
    with StopRequest() as stop:
        try:
            for number in range(1, config.processes + 1):
                environment = {**os.environ, "OMP_NUM_THREADS": threads, PARENT: str(os.getpid())}
                environment.pop("CKD_DIST_CORES", None)  # of all of us
                if gpus := torch.cuda.device_count():
                    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
                    environment["CUDA_VISIBLE_DEVICES"] = visible[(number - 1) % gpus]
                part = f"{number}/{config.processes}"
                words = [sys.executable, "-m", "ckd_dist.search", *options, "--part", part]
                pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
                # A session of its own: Ctrl-C is for this process, which tells the others.
                worker = subprocess.Popen(words, env=environment, errors="replace", start_new_session=True, **pipes)
                workers.append(worker)
                copies.append(threading.Thread(target=_copy_lines, args=(worker, part), daemon=True))
                copies[-1].start()
            while any(worker.poll() is None for worker in workers) and not failures(workers):
                for worker in workers if stop.signal else ():
                    worker.send_signal(signal.SIGUSR2)  # again and again: it may still be at its imports
                time.sleep(0.1)
            if failed := failures(workers):
                raise SystemExit(failed[0] if failed[0] > 0 else 1)
        finally:
            for worker in workers:
                worker.kill()
            for copy in copies:
                copy.join()
    if any(worker.returncode for worker in workers):
        raise SystemExit(STOPPED)


def failures(workers: list[subprocess.Popen]) -> list[int]:
    """Exit statuses of parts that have ended otherwise than by their end or by SIGUSR2."""
    fine = (None, 0, STOPPED, -signal.SIGUSR2)
    return [worker.returncode for worker in workers if worker.returncode not in fine]


def _copy_lines(worker: subprocess.Popen, part: str) -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        print(f"{part}  {line}", end="", flush=True)


# ------------------------------------------------------------------------------------------- choice


def choose(trials: list[Trial]) -> list[dict]:
    """The rows of results.csv, without test figures: for each model and teacher, the setting with the best mean top-1
    on data.val over the seeds is chosen; of equals the one with the lower loss there, then the first."""
    from ckd_dist import log

    rows = []
    for trial in trials:
        summary = log.read_summary(Path(trial.config.run_dir))
        setting = {key: getattr(trial.setting, key, None) for key in ("loss", "alpha", "temperature")}
        figures = {f"val_{key}": getattr(summary, key) for key in ("top1", "top5", "loss")}
        took = {key: getattr(summary, key) for key in ("train_seconds", "side_by_side")}
        named = {"student": trial.name, "weights_sha256": trial.weights_sha256}
        named.update({"model": trial.model, "teacher": trial.teacher, **setting})
        rows.append({**named, "seed": trial.config.seed, "epochs": trial.config.epochs, **figures, **took})
    for _, same_teacher in results.grouped(rows, "model", "teacher"):
        means = {
            setting: (statistics.mean(r["val_top1"] for r in same), -statistics.mean(r["val_loss"] for r in same))
            for setting, same in results.grouped(same_teacher, "loss", "alpha", "temperature")
        }
        best = max(means, key=lambda setting: means[setting])
        for row in same_teacher:
            row["chosen"] = int((row["loss"], row["alpha"], row["temperature"]) == best)
    return rows


def test(config: SearchConfig, trials: list[Trial], rows: list[dict], device: torch.device) -> None:
    """Add the test figures of the chosen students to their rows; collective."""
    from ckd_dist import checkpoint, engine, models
    from ckd_dist.beton import open_beton
    from ckd_dist.loader import BetonLoader

    assert config.data.test is not None
    info = open_beton(config.data.test, "data.test", verify=config.data.verify)
    chosen = [(trial, row) for trial, row in zip(trials, rows, strict=True) if row["chosen"]]
    loader = None
    for start in range(0, len(chosen), config.students_at_once):
        group, networks = chosen[start : start + config.students_at_once], {}
        for trial, _ in group:
            path = checkpoint.checkpoint_path(trial.config.run_dir, trial.config.epochs)
            model, metadata = models.load_model(path, "run_dir")
            networks[str(path)] = engine.to_device(model, device)
        if loader is None:
            models.require_classes(metadata, info.num_classes, "data.test")
            as_evaluated = replace(config.data, image_size=None)  # at the size that figures on data.val are of
            loader = BetonLoader.for_evaluation(info, as_evaluated, metadata, device)
        for (_, row), figures in zip(group, engine.evaluate(networks, loader, config.amp).values(), strict=True):
            row.update({f"test_{key}": value for key, value in figures.items()})


def show(rows: list[dict]) -> None:
    """Print the chosen setting of every model and teacher, and what its students reached."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Top-1 of the chosen settings, %: mean ± deviation over seeds", title_justify="left")
    for column in ("student", "teacher", "loss", "alpha", "T", "seeds", "held out", "test"):
        table.add_column(column, justify="left" if column in ("student", "teacher", "loss") else "right")
    for (model, teacher), same in results.grouped([row for row in rows if row["chosen"]], "model", "teacher"):
        setting = ["" if same[0][key] is None else str(same[0][key]) for key in ("loss", "alpha", "temperature")]
        figures = []
        for key in ("val_top1", "test_top1"):
            values = [row[key] for row in same if row[key] is not None]
            figures.append(results.mean_and_deviation(values) if values else "")
        table.add_row(model, teacher, *setting, str(len(same)), *figures)
    Console(highlight=False, width=120).print(table)


if __name__ == "__main__":
    run_command(main, SearchConfig, "ckd_dist.search")

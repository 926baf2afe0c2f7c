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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckd_dist import identity, results
from ckd_dist.config import DistillConfig, KDConfig, SearchConfig, TeacherConfig, TrainDataConfig, require, to_dict
from ckd_dist.identity import Origin, read_lineage, require_same, saved_options
from ckd_dist.process import PARENT, STOPPED, StopRequest, run_command

if TYPE_CHECKING:
    import torch

    from ckd_dist.data import DatasetInfo
    from ckd_dist.store.manifest import Manifest
    from ckd_dist.students import Teacher


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


@dataclass(frozen=True)
class Search:
    """A search, with what it is made of."""

    config: SearchConfig
    """Its options, as they were resolved."""
    origin: Origin
    images: dict[str, DatasetInfo]
    """Of data.train, data.val and data.test."""
    teacher: Teacher
    trials: list[Trial]

    @property
    def student_images(self) -> dict[str, DatasetInfo]:
        """What students are made of: not the test images."""
        return {option: info for option, info in self.images.items() if option != "data.test"}

    def is_complete(self, trial: Trial) -> bool:
        """Whether the student is trained out; raises `UserError` where its folder holds a run of another origin."""
        from ckd_dist import run_folder, training

        config = trial.config
        origin = training.origin(config, config, self.student_images, self.teacher.inputs(config, config))
        return run_folder.is_complete(Path(config.run_dir), origin)

    def missing(self, trials: list[Trial]) -> list[Trial]:
        """Those of `trials` that are not complete; collective. A table of students of which some are gone goes."""
        from ckd_dist import dist

        def look() -> list[str]:
            require_same(Path(self.config.run_dir), self.origin)
            return [trial.name for trial in trials if not self.is_complete(trial)]

        names = dist.on_main(look)
        if names:
            dist.on_main(lambda: (Path(self.config.run_dir) / "results.csv").unlink(missing_ok=True))
        return [trial for trial in trials if trial.name in names]


def main(config: SearchConfig) -> None:
    # Imported here because torch takes seconds: only once the options are known to be good.
    from ckd_dist import dist, log, students
    from ckd_dist.run_folder import RunFolder

    number, parts = map(int, (config.part or "1/1").split("/"))
    search = None
    if config.processes > 1:
        require("RANK" not in os.environ, "processes is for one plain process: leave it out under torchrun")
        require(config.part is None, "part and processes do not go together: give one of them")
        search = prepare(config)
        if search.missing(search.trials):
            RunFolder(config.run_dir, search.origin)
            share_out(search.config)
    with dist.process_group() as device:
        search = search or prepare(config)
        groups = side_by_side(search.trials, config.students_at_once, parts)[number - 1 :: parts]
        missing = search.missing([trial for group in groups for trial in group])
        if config.part is None and config.processes == 1:  # parts may be at work all at once
            RunFolder(config.run_dir, search.origin)
        for count, group in enumerate(groups, start=1):
            if group := [trial for trial in group if trial in missing]:
                log.say(f"group {count} of {len(groups)}: {', '.join(trial.name for trial in group)}")
                students.train([trial.config for trial in group], search.student_images, device)
        if config.part is not None:
            return
        table = Path(config.run_dir) / "results.csv"
        rows = choose(search.trials)
        if not dist.on_main(lambda: table.exists() and is_of(results.read_table(table, "run_dir"), rows)):
            if config.data.test:
                test(search, rows, device)
            dist.on_main(lambda: results.write_table(table, rows))
        if dist.rank() == 0:
            show(results.read_table(table, "run_dir"))
            log.say(f"{table}: {len(search.trials)} students")


# ------------------------------------------------------------------------------------------- students


def prepare(asked: SearchConfig) -> Search:
    """What a search is to do; collective. Raises `UserError` for a checkpoint that the store lacks, or a setting that
    it does not serve."""
    from ckd_dist import checkpoint, dist, precision, training
    from ckd_dist.beton import open_images
    from ckd_dist.store.manifest import Manifest
    from ckd_dist.students import Teacher

    store = asked.teacher.store or ""
    manifest = Manifest.load(Path(store), "teacher.store")
    default = checkpoint.choose(manifest.members, asked.teacher.checkpoints, "teacher.checkpoints")
    teachers = asked.grid.teachers or [default]
    heard = list(dict.fromkeys(name for members in teachers for name in members)) or default
    checkpoint.choose(manifest.members, heard, "grid.teachers")
    began = began_in(Path(asked.run_dir))
    config = precision.settle(asked, began)
    if config.data.views is None:
        views = dist.on_main(lambda: saved_options(began).get("data.views")) or manifest.views(heard)
        config = replace(config, data=replace(config.data, views=views))
    teacher = Teacher(store, manifest)
    images = {
        option: teacher.match(info, option, config.data.map_classes)
        for option, info in open_images(config.data, "train", "val", "test").items()
    }
    origin = training.origin(asked, config, images, {"teacher.store": identity.store(store, manifest, heard)})
    origin = replace(origin, asked=shared_options(asked), settled=shared_options(config))
    return Search(config, origin, images, teacher, list_trials(config, manifest, teachers))


def list_trials(config: SearchConfig, manifest: Manifest, teachers: list[list[int | str]]) -> list[Trial]:
    """Every student of the search; raises `UserError` for a setting that the store does not serve."""
    from ckd_dist.store import codecs

    grid = config.grid
    data = student_data(config, manifest)
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


def student_data(config: SearchConfig, manifest: Manifest) -> TrainDataConfig:
    """The images of all students, views written out as the store has them: for students without a teacher too."""
    from ckd_dist.data import view_options
    from ckd_dist.recipe import ViewRecipe

    values: dict[str, Any] = {f.name: getattr(config.data, f.name) for f in fields(TrainDataConfig)}
    cached = {**view_options(ViewRecipe.from_dict(manifest.recipe)), "view_seed": manifest.view_seed}
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


def began_in(folder: Path) -> Path:
    """The folder that tells the precision which a search began in: its own or, of parts that have no whole yet, that of
    any student."""
    students = (path for path in sorted(folder.glob("students/*")) if saved_options(path))
    return folder if (folder / "config.yaml").exists() else next(students, folder)


# ------------------------------------------------------------------------------------------- processes


def share_out(config: SearchConfig) -> None:
    """Train the students in processes of this machine, a part each, and return when all are done. One that fails ends
    the others, and this process with its status; they end too when this process is killed, and save first when it is
    asked to stop."""
    import torch

    from ckd_dist import dist

    options = ["--config", str(Path(config.run_dir) / "config.yaml"), f"--students_at_once={config.students_at_once}"]
    options += [f"--amp={config.amp}", f"--data.views={config.data.views}"]
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
    from ckd_dist.run_folder import read_summary

    rows = []
    for trial in trials:
        folder = Path(trial.config.run_dir)
        summary, lineage = read_summary(folder), read_lineage(folder, "run_dir")
        setting = {key: getattr(trial.setting, key, None) for key in ("loss", "alpha", "temperature")}
        figures = {f"val_{key}": getattr(summary, key) for key in ("top1", "top5", "loss")}
        took = {key: getattr(summary, key) for key in ("train_seconds", "side_by_side")}
        named = {"student": trial.name, "weights_sha256": trial.weights_sha256}
        named.update({"model": trial.model, "teacher": trial.teacher, **setting})
        named["identity"] = lineage.identity if lineage else None
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


def is_of(table: list[dict], rows: list[dict]) -> bool:
    """Whether the rows of a results.csv are the `rows` of `choose`: of the same students, as they are now. Columns that
    it lacks, of an older version, are not compared."""
    lacking = {key for key in results.SINCE_OLDER if not any(line[key] for line in table)}
    kept = [key for key in results.COLUMNS if key not in lacking and not key.startswith("test_")]
    return [[line[key] for key in kept] for line in table] == [[row[key] for key in kept] for row in rows]


def test(search: Search, rows: list[dict], device: torch.device) -> None:
    """Add the test figures of the chosen students to their rows; collective."""
    from ckd_dist import checkpoint, engine, models
    from ckd_dist.loader import BetonLoader

    config, info = search.config, search.images["data.test"]
    chosen = [(trial, row) for trial, row in zip(search.trials, rows, strict=True) if row["chosen"]]
    loader = None
    for start in range(0, len(chosen), config.students_at_once):
        group, networks = chosen[start : start + config.students_at_once], {}
        for trial, _ in group:
            path = checkpoint.checkpoint_path(trial.config.run_dir, trial.config.epochs)
            model, metadata = models.load_model(path, "run_dir")
            networks[str(path)] = engine.to_device(model, device)
        if loader is None:
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

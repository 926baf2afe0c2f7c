"""The students of a search: which there are, what each is made of, and which are trained side by side."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckd_dist.core.identity import Origin, require_same, saved_options
from ckd_dist.core.options import to_dict
from ckd_dist.data.options import TrainDataConfig
from ckd_dist.nn.options import KDConfig
from ckd_dist.search.options import SearchConfig
from ckd_dist.train.options import DistillConfig, TeacherConfig

if TYPE_CHECKING:
    from ckd_dist.data.dataset import DatasetInfo
    from ckd_dist.store.manifest import Manifest
    from ckd_dist.train.teachers import CachedTeacher


HOW = ("processes", "part", "students_at_once", "race", "race_budget", "race_hours", "race_prior", "race_error")
"""Options of a search that say nothing of its students."""


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
    teacher: CachedTeacher
    trials: list[Trial]

    @property
    def student_images(self) -> dict[str, DatasetInfo]:
        """What students are made of: not the test images."""
        return {option: info for option, info in self.images.items() if option != "data.test"}

    def is_complete(self, trial: Trial) -> bool:
        """Whether the student is trained out; raises `UserError` where its folder holds a run of another origin."""
        from ckd_dist.core import run_folder
        from ckd_dist.train import setup
        from ckd_dist.train.students import teacher_inputs

        config = trial.config
        inputs = teacher_inputs(self.teacher, config, config)
        origin = setup.origin(config, config, self.student_images, inputs)
        return run_folder.is_complete(Path(config.run_dir), origin)

    def missing(self, trials: list[Trial]) -> list[Trial]:
        """Those of `trials` that are not complete; collective. A table of students of which some are gone goes."""
        from ckd_dist.core import dist

        def look() -> list[str]:
            require_same(Path(self.config.run_dir), self.origin)
            return [trial.name for trial in trials if not self.is_complete(trial)]

        names = dist.on_main(look)
        if names:
            dist.on_main(lambda: (Path(self.config.run_dir) / "results.csv").unlink(missing_ok=True))
        return [trial for trial in trials if trial.name in names]


def prepare(requested: SearchConfig) -> Search:
    """What a search is to do; collective. Raises `UserError` for a checkpoint that the store lacks, or a setting that
    it does not serve."""
    from ckd_dist.core import checkpoint, dist, precision
    from ckd_dist.data.beton import open_images
    from ckd_dist.store.manifest import Manifest
    from ckd_dist.train import calibration, setup, students
    from ckd_dist.train.teachers import CachedTeacher

    store = requested.teacher.store or ""
    manifest = Manifest.load(Path(store), "teacher.store")
    default = checkpoint.choose(manifest.members, requested.teacher.checkpoints, "teacher.checkpoints")
    teachers = requested.grid.teachers or [default]
    used = list(dict.fromkeys(name for members in teachers for name in members)) or default
    checkpoint.choose(manifest.members, used, "grid.teachers")
    began = began_in(Path(requested.run_dir))
    config = precision.resolve(requested, began)
    if config.data.views is None:
        views = dist.on_main(lambda: saved_options(began).get("data.views")) or manifest.views(used)
        config = replace(config, data=replace(config.data, views=views))
    teacher = CachedTeacher(store, manifest)
    images = {
        option: teacher.match(info, option, config.data.map_classes)
        for option, info in open_images(config.data, "train", "val", "test").items()
    }
    inputs = teacher.inputs(used)
    if held_out := config.teacher.calibration:
        calibration.open_calibration(held_out, used, images, teacher)  # refuses before anything is written
        inputs |= calibration.inputs(held_out, used)
    origin = setup.origin(requested, config, images, inputs)
    origin = replace(origin, requested=shared_options(requested), resolved=shared_options(config))
    trials = list_trials(config, manifest, teachers)
    students.require_labels_unused([trial.config for trial in trials], images["data.train"])
    return Search(config, origin, images, teacher, trials)


def list_trials(config: SearchConfig, manifest: Manifest, teachers: list[list[int | str]]) -> list[Trial]:
    """Every student of the search; raises `UserError` for a setting that the store does not serve."""
    from ckd_dist.store.codecs.targets import require_supported

    grid = config.grid
    data = student_data(config, manifest)
    hashes = {name: manifest.checkpoints[member]["weights_sha256"] for name, member in manifest.members.items()}
    trials: list[Trial] = []
    for members in teachers:
        teacher = replace(config.teacher, store=None, checkpoints=[], combine="logits", calibration=None)
        settings: list[KDConfig | None] = [None]
        if members:
            combine = config.teacher.combine if len(members) > 1 else "logits"
            teacher = replace(config.teacher, checkpoints=members, combine=combine)
            settings = [*list_settings(config)]
        for setting, model, seed in itertools.product(
            settings, grid.models or [config.model.name], grid.seeds or [config.seed]
        ):
            if setting:
                require_supported(manifest.recorded, setting, teacher.at_once)
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
    name = f"{re.sub(r'[^A-Za-z0-9_.-]', '.', model)}_teacher_{label.replace('/', '.')}"
    if setting:
        name += f"_{setting.loss}_alpha_{setting.alpha:g}_T_{setting.temperature:g}"
    values: dict[str, Any] = {f.name: getattr(config, f.name) for f in fields(DistillConfig)}
    values.update(data=data, model=replace(config.model, name=model), teacher=teacher, kd=setting or config.kd)
    values.update(seed=seed, run_dir=str(Path(config.run_dir) / "students" / f"{name}_seed_{seed}"))
    return Trial(model, label, weights_sha256, setting, DistillConfig(**values))


def student_data(config: SearchConfig, manifest: Manifest) -> TrainDataConfig:
    """The images of all students, views written out as the store has them: for students without a teacher too."""
    from ckd_dist.data.dataset import view_options
    from ckd_dist.data.recipe import ViewRecipe

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
    """The options that make students what they are: not how the work is shared out, nor how many of them a race
    needs."""
    values = to_dict(config)
    return {key: value for key, value in values.items() if key not in HOW}


def began_in(folder: Path) -> Path:
    """The folder that tells the precision which a search began in: its own or, of parts that have no whole yet, that of
    any student."""
    students = (path for path in sorted(folder.glob("students/*")) if saved_options(path))
    return folder if (folder / "config.yaml").exists() else next(students, folder)

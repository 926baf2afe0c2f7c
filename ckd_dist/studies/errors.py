"""How often a race errs, where the truth is known: with students of a teacher that ckd_dist.studies.trajectories left.

  python -m ckd_dist.studies.errors RUN_DIR/fashion/1

Ten equal candidates: a hundred students of one checkpoint, of seeds of their own, are dealt out among ten, five hundred
times, and the race's rule is played on what they answered. It should not tell them apart. One good among ten: the last
checkpoint against nine of the first nine epochs of a training like it; twenty races, each with seeds of its own, at a
tenth of the cost of trying all. It should find it. Writes errors.json beside the teacher; about 15 minutes on two CPU
cores.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ckd_dist.core.evidence import Equal, Errors, Planted
from ckd_dist.core.files import write_bytes_atomically
from ckd_dist.core.process import run_process
from ckd_dist.core.results import read_race
from ckd_dist.search import racing, rule
from ckd_dist.search.rule import Scores, Student
from ckd_dist.studies.commands import run_module
from ckd_dist.studies.trajectories import CROPS, EPOCHS, LAST, MODELS, STUDENTS, TEACHER, answers

EQUAL, STUDENTS_EACH, GAMES, RACES = 10, 10, 500, 20
ERROR = 0.05


def main() -> None:
    """Train what is missing, and write how often the rule was wrong."""
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if len(sys.argv) == 2 else 2)
    run = Path(sys.argv[1])
    text = json.dumps(asdict(Errors(equal(run), planted(run))), indent=1) + "\n"
    write_bytes_atomically(run / "errors.json", text.encode())
    print(text, end="")


def equal(run: Path) -> list[Equal]:
    """Races of equal candidates, of both rules."""
    rungs = racing.rungs_of(EPOCHS)
    pool = {rung.epochs: np.unpackbits(_pool(run, rung.epochs), axis=2)[0].astype(np.float32) for rung in rungs}
    found = []
    for share, in_order in ((racing.DEFAULT_BUDGET, False), (racing.DEFAULT_BUDGET, True), (0.6, True)):
        ends = _games(pool, share * racing.FULL_SEEDS * EQUAL, in_order)
        tested = [[drop.candidate for drop in end.drops if drop.tested] for end in ends]
        told_apart = sum(len(each) == EQUAL - 1 for each in tested)
        of = "race with a prior" if in_order else "race without one"
        found.append(Equal(of, share, GAMES, dropped=sum(0 in each for each in tested), told_apart=told_apart))
    return found


def _games(pool: dict[int, np.ndarray], budget: float, in_order: bool) -> list[rule.Outcome]:
    """Races of candidates that students of `pool`, epochs -> float32 [students, images], are dealt out among."""
    generator, ends = np.random.default_rng(0), []
    for _ in range(GAMES):
        dealt = {epochs: generator.permutation(len(own)).reshape(EQUAL, -1) for epochs, own in pool.items()}

        def scores_of(wanted: list[Student], dealt: dict[int, np.ndarray] = dealt) -> Scores:
            return {each: pool[each.epochs][dealt[each.epochs][each.candidate, each.seed]] for each in wanted}

        if in_order:
            ends.append(rule.race_in_order(range(EQUAL), EPOCHS, scores_of, lambda: budget, ERROR))
        else:
            ends.append(rule.race(EQUAL, racing.rungs_of(EPOCHS), scores_of, lambda: budget, ERROR))
    return ends


def _pool(run: Path, epochs: int) -> np.ndarray:
    """What a hundred students of the last checkpoint answer, of seeds that no others have."""
    seeds = json.dumps([*range(1000, 1000 + EQUAL * STUDENTS_EACH)])
    words = [*_images(run), "--grid.teachers", f"[[{LAST}]]", "--grid.seeds", seeds, "--epochs", epochs]
    words += ["--run_dir", run / "errors" / f"equal_{epochs}"]
    run_module(f"a hundred students of {epochs} epochs", "ckd_dist.search", *words)
    return next(value for key, value in answers(words).items() if key.endswith("correct"))


def planted(run: Path) -> Planted:
    """Races of one good teacher among ten."""
    images = ["--data.train", run.parent / "train.beton", "--data.val", run.parent / "holdout.beton"]
    young = [*TEACHER, "--epochs", 9, "--save_every", 1, "--seed", 200, "--run_dir", run / "errors" / "young"]
    run_module("a teacher of nine epochs", "ckd_dist.train_teacher", *images, *young)
    cache = ["--teacher.run", run / "errors" / "young", "--teacher.name", "young", "--views", EPOCHS, *CROPS]
    run_module("its logits", "ckd_dist.cache_logits", *images[:2], *cache, "--store", run / "store")
    candidates = json.dumps([*([f"young/{epoch}"] for epoch in range(1, 10)), [LAST]])
    races = []
    for number in range(RACES):
        folder = run / "errors" / f"race_{number}"
        words = ["--grid.teachers", candidates, "--epochs", EPOCHS, "--seed", 100 * number, "--run_dir", folder]
        more = ["--race", "--race_budget", 0.1 * racing.FULL_SEEDS * 10]
        run_module(f"race {number}", "ckd_dist.search", *_images(run), *words, *more)
        races.append(read_race(folder / "race.json", "RUN_DIR"))
    found = [list(race.choice) == [str(LAST)] for race in races]
    alone = [right and len(race.standing) == 1 for right, race in zip(found, races, strict=True)]
    cost = [race.cost / racing.FULL_SEEDS / 10 for race in races]
    return Planted(RACES, sum(found), sum(alone), float(np.mean(cost)))


def _images(run: Path) -> list[object]:
    images = ["--data.train", run.parent / "train.beton", "--data.val", run.parent / "holdout.beton"]
    return [*images, *STUDENTS, "--grid.models", json.dumps(MODELS[1:]), "--teacher.store", run / "store"]


if __name__ == "__main__":
    run_process(main)

"""What the study of several teachers makes of answers that are drawn here, so that the truth is known."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from ckd_dist.core.errors import UserError
from ckd_dist.core.evidence import joined, read_evidence
from ckd_dist.studies import evidence
from ckd_dist.studies.trajectories import CANDIDATES, EPOCHS, KEPT, LAST, MODELS, RUNGS, SEEDS, SHORT, TUNED_ON

IMAGES = 4000
BEST = CANDIDATES.index([KEPT[4]])


def answers(generator, top1, seeds):
    """Bits of students that are right with these probabilities."""
    return np.packbits(generator.random((len(top1), seeds, IMAGES)) < np.asarray(top1)[:, None, None], axis=2)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Two teachers of one task: candidate number `BEST` is best by 10 points, all others are alike; on short schedules
    the student without a teacher leads."""
    folder = tmp_path_factory.mktemp("bank")
    for seed in (1, 2):
        run, generator = folder / "fashion" / str(seed), np.random.default_rng(seed)
        truth = np.full(len(CANDIDATES), 0.6)
        truth[BEST] = 0.7
        early = truth - 0.2
        early[0] = 0.65
        lengths = SHORT if seed == TUNED_ON[1] else RUNGS[:-1]
        searches = {f"whole_{epochs}": (early, SHORT[epochs]) for epochs in lengths}
        searches |= {f"whole_{EPOCHS}": (truth, SEEDS), "sequence": ([0.62], SEEDS), "controls": ([0.61] * 3, SEEDS)}
        searches |= {f"last_T_{temperature}": ([0.6 + 0.01 * temperature], SEEDS) for temperature in (1, 2, 8)}
        if seed == TUNED_ON[1]:
            searches |= {f"trapezoid_{epochs}": (early, 3) for epochs in SHORT}
            searches["running"] = (truth, 2)
        found = {"own/correct": answers(generator, truth[1:], 1)[:, 0], "own/step": np.arange(10)[::-1]}
        found |= {f"own/{model.rpartition(':')[2]}": abs(np.arange(10) - 4) for model in MODELS}
        for name, (top1, seeds) in searches.items():
            for model in MODELS:
                key = f"{name}/{model.rpartition(':')[2]}"
                found[f"{key}/correct"] = answers(generator, top1, seeds)
                found[f"{key}/agreement"] = np.repeat([[np.nan], *truth[1:, None]], seeds, axis=1)
                found[f"{key}/loss"] = np.repeat(1 - np.asarray(top1, np.float32)[:, None], seeds, axis=1)
        run.mkdir(parents=True)
        np.savez_compressed(run / "answers.npz", allow_pickle=False, **found)
        write_logs(run, truth)
    return folder


def write_logs(run, truth):
    """What the teacher's training, its selection and the students that run along leave beside the answers."""
    (run / "teacher").mkdir()
    lines = [{"split": "val", "epoch": epoch - 1, "loss": 1 + abs(epoch - KEPT[4])} for epoch in KEPT]
    (run / "teacher" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = {"scores": {"raw": 0.0, "minmax": 0.0, "zscore": 0.0}, "entropy": 0.0, "calibration_error": 0.0}
    scores |= {"image_information": 0.0, "image_information_deviation": None, "label_information": 0.0}
    scores |= {"label_information_deviation": None, "conditional_mutual_information": 0.0, "agreement_with_last": 0.0}
    checkpoints = [
        {
            **scores,
            "epoch": epoch,
            "weights_sha256": str(epoch),
            "top1": float(epoch == KEPT[4]),
            "calibrated_loss": 1.0,
        }
        for epoch in KEPT
    ]
    selection = {"format": 1, "choice": LAST, "weights_sha256": str(LAST), "scaling": "raw", "weight": 1.0, "seed": 0}
    selection |= {"choices": {"raw": LAST, "minmax": LAST, "zscore": LAST}, "fixed": {"half": 30, "full": LAST}}
    selection |= {"layer": "features", "probe": {}, "constants": {}, "checkpoints": checkpoints}
    (run / "selection").mkdir()
    (run / "selection" / "selection.json").write_text(json.dumps(selection))
    for model in MODELS:
        for members, top1 in zip(CANDIDATES, truth, strict=True):
            for seed in range(evidence.FIRST):
                name = f"{model.replace(':', '.')}_teacher_{'+'.join(map(str, members)) or 'none'}"
                folder = run / "students" / "running" / "students" / f"{name}{'_kd_x' * bool(members)}_seed_{seed}"
                folder.mkdir(parents=True)
                values = {"top1": top1, "loss": -top1, "raw_top1": top1, "raw_loss": -top1}
                log = [json.dumps({"split": "val", "epoch": epoch, **values}) for epoch in range(EPOCHS)]
                (folder / "metrics.jsonl").write_text("\n".join(log) + "\n")


@pytest.fixture(scope="module")
def found(run_dir):
    """The evidence, as it is read again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["evidence", str(run_dir)])
        evidence.main()
    return read_evidence(run_dir / "evidence.json", "RUN_DIR")


def mean(cases):
    return np.mean([case.value for case in cases])


def test_ways_are_judged_by_students_that_they_did_not_look_at(found):
    of = {way.name: way for way in found.ways}
    assert {len(way.behind) for way in of.values()} == {4}  # two teachers, two kinds of students
    assert all(case.value == 0 for case in of["trying all, 3 seeds"].behind)
    assert mean(of["last checkpoint"].behind) == pytest.approx(10, abs=0.5)
    assert mean(of["last checkpoint"].regret) == pytest.approx(10, abs=0.5)
    assert mean(of["teacher's top-1"].behind) == pytest.approx(0, abs=0.01)
    assert mean(of["nearest to a student without a teacher"].behind) == pytest.approx(0, abs=0.01)
    assert of["smallest step from the one before"].behind == of["last checkpoint"].behind
    assert mean(of["a checkpoint at random"].behind) == pytest.approx(9, abs=0.5)
    for race in ("race without a prior, 15 %", "race with a prior, 10 %"):
        assert mean(of[race].behind) == pytest.approx(0, abs=0.5)


def test_what_is_known_of_other_trainings_stays(found):
    def only(teacher):
        ways = [replace(w, behind=of(w.behind, teacher), regret=of(w.regret, teacher)) for w in found.ways]
        series = {
            name: [replace(each, cases=of(each.cases, teacher)) for each in getattr(found, name)]
            for name in ("claims", "losses")
        }
        return replace(found, ways=ways, **series, predictors=found.predictors if teacher == TUNED_ON[1] else [])

    def of(cases, teacher):
        return [case for case in cases if case.teacher == teacher]

    assert joined(only(1), only(2), "OUT") == found == joined(found, only(1), "OUT")
    assert joined(only(2), only(1), "OUT") == found
    with pytest.raises(UserError, match="OUT: it is of another version"):
        joined(replace(found, ways=found.ways[1:]), found, "OUT")


def test_claims_are_the_differences_that_were_planted(found):
    of = {claim.name: mean(claim.cases) for claim in found.claims}
    for name, difference in {
        "best earlier checkpoint - last": 10,
        "checkpoint of the least held-out loss - last": 10,
        "half-way, then last - last": 2,
        "last, the best of four temperatures - last": 8,
        "best earlier checkpoint - last, the best of four temperatures": 2,
        "snapshot ensemble of two - full ensemble of two": -1,
        "teacher - none": 0,
    }.items():
        assert of[name] == pytest.approx(difference, abs=0.6), name


def test_predictors_are_rank_correlations_with_other_seeds(found):
    of = {series.name: series for series in found.predictors}
    assert all((case.task, case.teacher) == TUNED_ON for series in of.values() for case in series.cases)
    assert len(of) == 9 * len(SHORT) + 2 and all(-1 <= case.value <= 1 for s in of.values() for case in s.cases)
    assert mean(of["a short whole schedule: agreement, 5 %"].cases) > 0.3
    assert mean(of["the running student: top-1, 5 %"].cases) > mean(of["a short whole schedule: top-1, 5 %"].cases)

"""What the report says of tables whose answer is known, and its page in a browser."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import statistics
import subprocess

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from ckd_dist.core.errors import UserError
from ckd_dist.core.results import COLUMNS, read_table, write_table
from ckd_dist.report import __main__ as report
from ckd_dist.report import figures, findings, page
from tests.helpers.commands import ROOT

TOP1 = {
    "none": (80.0, 81.0, 80.5),
    "2": (82.0, 82.6, 82.2),
    "4": (85.0, 85.7, 85.3),
    "6": (84.0, 84.9, 84.1),
    "2+6": (86.1, 86.7, 86.4),
    "6+b/6": (84.1, 84.8, 84.3),
}
"""Test top-1 of the chosen students, a value a seed."""


def weights(teacher):
    """What stands for the sha256 of its checkpoints' weights."""
    return "+".join(f"weights of {name}" for name in teacher.split("+")) if teacher != "none" else None


def write_selection(folder, layer, image, scaling, choice, of="{}", **more):
    """selection.json of the epochs 2, 4 and 6."""
    checkpoints = [
        {
            "epoch": epoch, "weights_sha256": weights(of.format(epoch)), "image_information": i,
            "image_information_deviation": 0.01, "label_information": l, "label_information_deviation": None,
            "scores": {"raw": i + l, "minmax": 0.0, "zscore": 0.0}, "top1": t, "calibration_error": c, "entropy": e,
            "conditional_mutual_information": 0.1 * e, "agreement_with_last": t,
        }
        for epoch, i, l, t, c, e in zip(
            (2, 4, 6), image, (1.0, 1.5, 1.6), (80, 85, 90), (0.05, 0.01, 0.02), (0.9, 0.6, 0.3), strict=True
        )
    ]  # fmt: skip
    result = {
        "format": 1, "choice": choice, "weights_sha256": weights(of.format(choice)), "scaling": scaling, "weight": 1.0,
        "choices": {"raw": 6, "minmax": 4, "zscore": 4}, "fixed": {"half": 4, "full": 6}, "layer": layer, "seed": 0,
        "probe": {"steps": 9, "lr": 0.1, "repeats": 2}, "constants": {"label_entropy": 2.3},
        "checkpoints": checkpoints, **more,
    }  # fmt: skip
    folder.mkdir()
    (folder / "selection.json").write_text(json.dumps(result))


def test_a_race_is_shown_alone_and_beside_a_search(tmp_path, capsys, monkeypatch):
    drops = [
        {"candidate": 0, "epochs": 2, "seeds": 2, "behind": 0.1, "tested": True, "cost": 1.5},
        {"candidate": 2, "epochs": 8, "seeds": 3, "behind": 0.01, "tested": False, "cost": 4.0},
    ]
    race = {
        "format": 1,
        "choice": {"4": "x"},
        "candidates": ["A & B", "C", "D", "E", "F"],
        "leader": 1,
        "standing": [1, 3],
    }
    drops.append({"candidate": 4, "epochs": 0, "seeds": 0, "behind": None, "tested": False, "cost": 4.0})
    race |= {"drops": drops, "cost": 6.0, "verdict": ["these 2 cannot be told apart at this budget: C; E"], "seeds": 2}
    (tmp_path / "race").mkdir()
    (tmp_path / "race" / "race.json").write_text(json.dumps(race))
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path)])
    report.main()
    text = (tmp_path / "report" / "report.html").read_text()
    assert "The race race" in text and "cannot be told apart" in text and "race_race" in text
    assert (tmp_path / "report" / "race_race.png").stat().st_size > 10_000
    (tmp_path / "race" / "race.json").write_text(json.dumps({**race, "leader": 5}))
    with pytest.raises(UserError, match=r"RUNS: .*race\.json is damaged .*a number is of no candidate"):
        report.main()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Runs of a search of six teachers, two settings and three seeds, and of a selection at two layers."""
    runs = tmp_path_factory.mktemp("study") / "runs"
    rows = []
    for teacher, top1 in TOP1.items():
        for temperature in (None,) if teacher == "none" else (2.0, 4.0):
            for seed, value in enumerate(top1):
                chosen = temperature in (None, 4.0)
                row = dict.fromkeys(COLUMNS)
                name = f"{teacher.replace('/', '.')}_T{temperature}_{seed}"
                row.update(student=name, model="resnet8", teacher=teacher, seed=seed, epochs=3, chosen=int(chosen))
                row.update(val_top1=value - 2 + chosen, val_top5=99.0, val_loss=0.5, train_seconds=9.0, side_by_side=4)
                row.update(weights_sha256=weights(teacher))
                if temperature:
                    row.update(loss="kd", alpha=0.1, temperature=temperature)
                if chosen:
                    row.update(test_top1=value, test_top5=99.5, test_loss=0.4)
                rows.append(row)
                lines = [{"split": "val", "epoch": e, "step": e, "top1": value - 9 / (e + 1)} for e in range(3)]
                path = runs / "search" / "students" / row["student"] / "metrics.jsonl"
                path.parent.mkdir(parents=True)
                path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_table(runs / "search" / "results.csv", rows)
    write_selection(runs / "features", "features", (0.2, 0.3, 0.25), "raw", 6)
    write_selection(runs / "features.5", "features.5", (0.4, 0.3, 0.2), "zscore", 4)
    (runs / "features" / "cost.json").write_text(json.dumps({"seconds": 12.0, "student_seconds": 40.0, "share": 0.1}))
    spread = {"median": 1.0, "min": 0.9, "max": 1.2}
    ratios = {"plain": None, "store": spread}
    same = {"case": "epoch, resnet8", "unit": "images/s", "rate": spread, "limit": ""}
    rows = [{**same, "what": what, "reference": ratio and "plain", "ratio": ratio} for what, ratio in ratios.items()]
    where = {"device": "a CPU", "cores": 2, "threads": 2, "python": "3.11", "versions": {"torch": "2"}}
    bench = {"environment": where, "precision": "bfloat16", "machine": {}, "rows": rows}
    (runs / "bench.json").write_text(json.dumps(bench))
    return runs


def report_here(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["report", *map(str, words)])
    report.main()


def test_differences_are_paired_tested_and_adjusted(study):
    each = findings.student_groups(findings.read_study(study).rows)
    assert [one.teacher for one in each] == list(TOP1) and all(one.temperature in (None, 4.0) for one in each)
    base = findings.last_checkpoint(each)
    assert base is not None and base.teacher == "6" and base.top1 == TOP1["6"]
    found = dict(zip(TOP1, findings.differences(each, base), strict=True))
    assert found["6"] is None
    # Analysis of variance with teachers and seeds, by least squares with a column for each.
    values = np.array(list(TOP1.values()))
    design = np.concatenate([np.repeat(np.eye(6), 3, axis=0), np.tile(np.eye(3), (6, 1))], axis=1)
    effects = np.linalg.lstsq(design, values.ravel(), rcond=None)[0]
    noise = np.square(values.ravel() - design @ effects).sum() / (6 * 3 - 8)
    for teacher in ("none", "2+6", "6+b/6"):
        pairs = np.array(TOP1[teacher]) - np.array(TOP1["6"])
        assert found[teacher].mean == pytest.approx(pairs.mean())
        assert found[teacher].deviation == pytest.approx(pairs.std(ddof=1))
        assert found[teacher].p == pytest.approx(2 * stats.t.sf(abs(pairs.mean()) / np.sqrt(2 * noise / 3), 10))
        assert found[teacher].adjusted_p >= found[teacher].p
    assert not found["2+6"].within_noise and found["6+b/6"].within_noise
    two = [one for one in each if one.teacher in ("4", "6")]
    (paired,) = [difference for difference in findings.differences(two, base) if difference]
    assert paired.p == paired.adjusted_p == pytest.approx(stats.ttest_rel(TOP1["4"], TOP1["6"]).pvalue)


def test_holms_adjustment():
    assert findings.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert findings.holm([0.6, 0.9]) == [1.0, 1.0] and findings.holm([]) == []


def test_a_choice_is_judged_by_what_its_students_lose(study):
    everything = findings.read_study(study)
    first, second = (selected.result for selected in everything.selections)
    assert [first.layer, second.layer] == ["features", "features.5"] and not everything.notes
    each = findings.student_groups(everything.rows)
    ways = {way.name: way for way in findings.ways_to_choose(findings.in_common(each, first), first)}
    best = statistics.mean(TOP1["4"])
    for name, epoch in {
        "I(X;F) + I(Y;F), zscore": 4, "I(X;F)": 4, "I(Y;F)": 6, "least calibration error": 4, "largest entropy": 2,
        "half-way checkpoint": 4, "last checkpoint": 6, "students of all, on held-out images": 4,
    }.items():  # fmt: skip
        assert ways[name].epoch == epoch, name
        assert ways[name].regret == pytest.approx(best - statistics.mean(TOP1[str(epoch)])), name
    assert ways["I(X;F)"].correlation == pytest.approx(1) and ways["largest entropy"].correlation == pytest.approx(-0.5)
    assert ways["last checkpoint"].correlation is None
    assert findings.chosen_epochs(second, "zscore", [0.01, 100]) == [2, 6]


def test_a_rank_correlation_of_few_checkpoints_has_the_p_of_all_their_orders():
    for a in ([3, 1, 2], [3, 1, 4, 2], [1, 1, 2, 3, 2], [2, 4, 1, 3, 6, 5]):
        b = np.arange(len(a)) ** 2 // 2
        found, p = findings.spearman(np.array(a), b)
        everyone = np.array([stats.spearmanr(order, b).statistic for order in itertools.permutations(a)])
        tails = np.mean(everyone >= found - 1e-9), np.mean(everyone <= found + 1e-9)
        assert (found, p) == pytest.approx((stats.spearmanr(a, b).statistic, min(1, 2 * min(tails))))
    assert findings.spearman(np.arange(3), np.arange(3))[1] == pytest.approx(1 / 3)
    a = np.array([2, 1, 4, 3, 6, 5, 8, 7])
    assert findings.spearman(a, np.arange(8)) == pytest.approx(tuple(stats.spearmanr(a, np.arange(8))))


def stars(figure):
    """(x, label) of every star."""
    lines = [line for ax in figure.axes for line in ax.lines if line.get_marker() == "*"]
    return [(line.get_xdata()[0], line.get_label()) for line in lines]


def test_a_star_is_at_what_the_selection_chose_by_its_own_scaling(study):
    everything = findings.read_study(study)
    each = findings.student_groups(everything.rows)
    singles = [one for one in each if one.epoch]
    results = [selected.result for selected in everything.selections]
    raw = figures.checkpoints(each, singles, results[0], "test")
    assert stars(raw) == [(6, "chosen by I(X;F) + I(Y;F), raw")]
    plane = figures.information(results)
    assert [x for x, _ in stars(plane)] == [0.25, 0.3]
    assert ["raw" in ax.get_title() for ax in plane.axes] == [True, False]


@pytest.mark.parametrize(
    ("of", "table", "expected"),
    [
        ("{}", "older", "results.csv is of an older version and does not tell the weights that taught: whether"),
        ("other/{}", "today's", "selection.json is of another teacher: by their weights, none of its checkpoints"),
    ],
)
def test_a_selection_is_held_against_students_of_the_same_weights_only(
    study, tmp_path, monkeypatch, capsys, of, table, expected
):
    runs = shutil.copytree(study, tmp_path / "runs", ignore=shutil.ignore_patterns("metrics.jsonl", "features*"))
    write_selection(runs / "selection", "features", (0.2, 0.3, 0.25), "raw", 6, of)  # of the students' epochs
    if table == "older":
        path = runs / "search" / "results.csv"
        path.write_text("".join(line.rsplit(",", 2)[0] + "\n" for line in path.read_text().splitlines()))
    report_here(monkeypatch, runs)
    assert capsys.readouterr().out.count(expected) == 1
    text = (runs / "report" / "report.html").read_text(encoding="utf-8")
    assert text.count(expected) == 1 and "What each way to choose costs" not in text
    assert ("The information plane" in text) == (table == "older")
    write_selection(runs / "ours", "features.5", (0.2, 0.3, 0.25), "raw", 6)
    report_here(monkeypatch, runs)
    text = (runs / "report" / "report.html").read_text(encoding="utf-8")
    assert text.count(expected) == 1 and ("What each way to choose costs" in text) == (table != "older")


def open_page(browser, page, shot):
    """What a headless browser without network says of `page`; its picture goes to `shot`."""
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,4000",
        "--proxy-server=127.0.0.1:9", f"--user-data-dir={shot.parent / 'profile'}", "--enable-logging=stderr", "--v=0",
        f"--screenshot={shot}", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and shot.exists(), done.stderr[-2000:]
    return done.stderr


def test_the_page_needs_nothing_else_and_opens_without_errors(study, tmp_path, monkeypatch, capsys):
    report_here(monkeypatch, study, "--out", tmp_path / "report")
    assert "report.html: 33 students, 2 selections" in capsys.readouterr().out
    text = (tmp_path / "report" / "report.html").read_text()
    sources = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"' )>]{1,30})""", text)
    assert len(sources) == 7 and all(source.startswith("data:image/png;base64") for source in sources)
    for part in ("within noise", "n", "Holm", "85.33 ± 0.35", "10.0 % of training one student", "+2.07 ± 0.25"):
        assert part in text, part
    pictures = sorted((tmp_path / "report").glob("*.png"))
    assert len(pictures) == 7 and all(Image.open(path).size[0] >= 900 for path in pictures)
    table = (tmp_path / "report" / "table.md").read_text().splitlines()
    assert len(table) == 2 + len(TOP1) and len({line.count("|") for line in table}) == 1

    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    assert "CONSOLE" not in open_page(browser, tmp_path / "report" / "report.html", tmp_path / "shot.png")
    (tmp_path / "bad.html").write_text("<script>nothing.here()</script><img src=https://example.org/x.png>")
    assert "CONSOLE" in open_page(browser, tmp_path / "bad.html", tmp_path / "bad.png")  # it would be seen
    pixels = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB"), dtype=int)
    assert pixels.shape == (4000, 1000, 3)
    # The pictures are there: blue lines, orange stars, green squares, over the whole height of the page.
    for colour in ((0, 114, 178), (213, 94, 0), (0, 158, 115)):
        rows = np.flatnonzero((np.abs(pixels - colour).sum(2) < 30).any(axis=1))
        assert len(rows) > 20, colour
    assert np.flatnonzero((pixels < 128).any(axis=(1, 2))).max() > 3000


def changed(path, **values):
    """A change of fields of a JSON file; a field that becomes None is left out."""

    def change(runs):
        old = json.loads((runs / path).read_text())
        new = {key: value for key, value in {**old, **values}.items() if value is not None}
        (runs / path).write_text(json.dumps(new))

    return change


def rewritten(path, old, new):
    return lambda runs: (runs / path).write_text((runs / path).read_text().replace(old, new))


TABLE, SELECTION, CURVE = "search/results.csv", "features/selection.json", "search/students/4_T4.0_0/metrics.jsonl"


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda runs: (runs / TABLE).unlink(), "no results.csv under"),
        (lambda runs: shutil.copytree(runs / "search", runs / "again"), "name a folder with one search"),
        (lambda runs: shutil.rmtree(runs), "no such folder"),
        (rewritten(TABLE, "student,", "pupil,"), r"results\.csv is not a table of this version: its columns are pupil"),
        (
            rewritten(TABLE, "85.7", "high"),
            r"results\.csv is damaged \(test_top1 of student \d+: .* number.*: remove it",
        ),
        (rewritten(TABLE, "85.7", "nan"), r"results\.csv is damaged \(test_top1 of student \d+: .* finite"),
        (rewritten(TABLE, ",85.7", ""), r"results\.csv is damaged \(line \[\d+\] has not"),
        (lambda runs: (runs / TABLE).write_bytes(b"\xff\xfe"), r"results\.csv is damaged"),
        (lambda runs: (runs / SELECTION).write_text("{"), r"selection\.json is damaged .*: remove it, and run"),
        (lambda runs: (runs / SELECTION).write_text("[" * 10**5), r"selection\.json is damaged"),
        (
            changed(SELECTION, checkpoints=[]),
            r"selection\.json is damaged \(.*the choice is not one of the checkpoints",
        ),
        (changed(SELECTION, choice=None), r"selection\.json is damaged \(choice: Field required"),
        (changed(SELECTION, choice=4.0), r"selection\.json is damaged \(choice: .* integer"),
        (changed(SELECTION, format=2), r"selection\.json is damaged \(format: "),
        (
            rewritten(SELECTION, "0.25", "NaN"),
            r"selection\.json is damaged \(checkpoints\.2\.image_information: .* finite",
        ),
        (changed("features/cost.json", share="12 %"), r"cost\.json is damaged \(share: .*: remove it and selection"),
        (
            changed("bench.json", rows=None),
            r"bench\.json is damaged \(rows: .*: remove it, or run ckd_dist\.bench again",
        ),
        (rewritten("bench.json", "0.9", "0.0"), r"bench\.json is damaged \(rows\.0\.rate: .* not a rate"),
        (rewritten(CURVE, '"val", "epoch": 1', "5"), r"line 2 of .*metrics\.jsonl is damaged \(.*: remove the file"),
    ],
)
def test_what_is_no_study_is_refused_in_one_line(study, tmp_path, monkeypatch, spoil, expected):
    runs = shutil.copytree(study, tmp_path / "runs")
    spoil(runs)
    with pytest.raises(UserError) as refusal:
        report_here(monkeypatch, runs)
    assert re.fullmatch(rf"RUNS: .*{expected}.*", str(refusal.value)), refusal.value
    assert not (runs / "report").exists()


def test_every_number_of_the_documented_study_is_in_the_committed_results():
    each = findings.student_groups(read_table(ROOT / "configs" / "study" / "results" / "results.csv", ""))
    written = (ROOT / "docs" / "study.md").read_text().splitlines()
    assert len(each) == 15 and [line for line in written if line in page.markdown(each)] == page.markdown(each)

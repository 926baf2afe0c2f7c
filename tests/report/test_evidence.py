"""What the report says of a study of several teachers, on figures whose answer is known."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from scipy import stats

from ckd_dist.core.errors import UserError
from ckd_dist.core.evidence import Case, Equal, Errors, Evidence, Planted, Recipes, Series, Way
from ckd_dist.report import __main__ as report
from ckd_dist.report import evidence
from ckd_dist.studies import tables
from tests.helpers.commands import ROOT


def cases(*values):
    """Of two tasks, as many teachers as there are values for a task, and two kinds of students 0.2 apart."""
    return [
        Case(task, teacher, student, value + shift)
        for (task, teacher), value in zip((("a", 0), ("a", 1), ("b", 0), ("b", 1)), values, strict=False)
        for student, shift in (("one", -0.1), ("two", 0.1))
    ]


FOUND = Evidence(
    format=1,
    candidates=12,
    seeds=3,
    tuned_on=[("a", 0), ("b", 0)],
    ways=[
        Way("trying all, 3 seeds", 1.0, cases(0, 0, 0, 0), cases(0.1, 0.1, 0.1, 0.1)),
        Way("race without a prior, 15 %", 0.15, cases(9, 0.2, 9, 0.4), cases(9, 0.3, 9, 0.5)),
        Way("last checkpoint", 0.0, cases(1, 2, 3, 4), cases(1, 2, 3, 4)),
    ],
    claims=[Series("this - that", cases(1, 2, 3, 4)), Series("these - those", cases(-1, 2, 1, -2))],
    predictors=[Series("top-1, 5 %", cases(0.2)), Series("top-1, 10 %", cases(0.6)), Series("loss, 10 %", cases(0.4))],
    losses=[Series("6", cases(1, 2, 3, 4)), Series("12", cases(2, 1, 4, 3))],
    errors=Errors([Equal("race with a prior", 0.15, 100, dropped=5, told_apart=0)], Planted(20, 20, 10, 0.08)),
)


def test_means_and_intervals_are_over_the_trainings_of_teachers():
    of = evidence.summary(cases(1, 2, 3, 4))
    assert of.mean == pytest.approx(2.5) and of.count == 4  # eight cases, but four teachers
    low, high = stats.t.interval(0.95, 3, loc=2.5, scale=stats.sem([1, 2, 3, 4]))
    assert (of.mean - of.half, of.mean + of.half) == pytest.approx((low, high))
    assert of.detectable == pytest.approx((stats.t.ppf(0.975, 3) + stats.t.ppf(0.8, 3)) * stats.sem([1, 2, 3, 4]))
    assert evidence.summary(cases(1)).words == "+1.00"


def test_tables_leave_out_the_teachers_that_the_race_was_tuned_on():
    ways, claims, predictors, errors = evidence.tables(FOUND).values()
    assert "2 trainings" in ways.text and "tuned on" in ways.text
    assert ways.head[-2:] == ["a", "b"]
    half = float(stats.t.ppf(0.975, 1)) * 0.1
    race = ["race without a prior, 15 %", "15", f"+0.30 ± {half:.2f}", f"+0.40 ± {half:.2f}", "+0.20", "+0.40"]
    assert ways.rows[1] == race
    assert [row[2] for row in claims.rows] == ["differs", "within noise"]
    assert claims.rows[0][3:5] == ["+1.50", "+3.50"]
    assert predictors.rows == [["top-1", "0.20", "0.60"], ["loss", "", "0.40"]]
    low, high = stats.beta.ppf(0.025, 5, 96), stats.beta.ppf(0.975, 6, 95)
    dropped = f"5.0 % ({100 * low:.1f} to {100 * high:.1f})"
    assert errors.rows == [["race with a prior, 15 %", dropped, "0.0 % (0.0 to 3.6)"]]
    assert claims.markdown()[1] == "| --- | --- | --- | --- | --- | --- |"


def test_parts_of_a_recipe_are_compared_with_the_plain_one():
    found = Recipes(
        1, Series("plain", cases(80, 82, 50, 52)), [Series("a part", cases(1, 2, 3, 4)), Series("b", cases(1))]
    )
    table = evidence.recipes(found)
    half = float(stats.t.ppf(0.975, 3) * stats.sem([1, 2, 3, 4]))
    assert table.head == ["recipe", "points", "", "a", "b"]
    assert table.rows[0] == ["plain", "", "", "81.00", "51.00"]
    of_two = f"{float(stats.t.ppf(0.975, 1) * stats.sem([1, 2])):.2f}"
    assert table.rows[1] == ["a part", f"+2.50 ± {half:.2f}", "differs", f"+1.50 ± {of_two}", f"+3.50 ± {of_two}"]
    assert table.rows[2] == ["b", "+1.00", "", "+1.00", ""]
    assert "(2 of a, 2 of b)" in table.text


def test_the_report_shows_evidence_alone(tmp_path, monkeypatch):
    (tmp_path / "evidence.json").write_text(json.dumps(asdict(FOUND)))
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path)])
    report.main()
    text = (tmp_path / "report" / "report.html").read_text()
    for table in evidence.tables(FOUND).values():
        assert table.title in text
    for name in ("ways", "claims"):
        assert (tmp_path / "report" / f"evidence_{name}.png").stat().st_size > 10_000
    (tmp_path / "evidence.json").write_text(json.dumps({**asdict(FOUND), "ways": 3}))
    with pytest.raises(UserError, match=r"RUNS: .*evidence\.json is damaged"):
        report.main()


@pytest.mark.parametrize("page", ["README.md", "docs/study.md", "docs/choosing-a-teacher.md", "docs/speed.md"])
def test_tables_of_the_documentation_are_those_of_the_results(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = Path(page).read_text(encoding="utf-8")
    assert tables.BLOCK.search(text)
    assert tables.written(text) == text, "run make study"
    with pytest.raises(UserError, match="there are students"):
        tables.written("<!-- table: none of them -->\n<!-- end of table -->\n")

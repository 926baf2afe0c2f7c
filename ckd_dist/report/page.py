"""The report's page: what a study says, in words, tables and pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ckd_dist.core.evidence import Evidence
from ckd_dist.core.results import mean_and_deviation
from ckd_dist.report import evidence, figures
from ckd_dist.report.findings import (
    Difference,
    StudentGroup,
    Study,
    differences,
    in_common,
    last_checkpoint,
    student_groups,
    ways_to_choose,
)


def write(study: Study, out: Path) -> None:
    """Write the page, its pictures and the table."""
    each = student_groups(study.rows)
    sections: list[str] = []
    pictures: dict[str, bytes] = {}
    for model in dict.fromkeys(one.model for one in each):
        sections += list(_model_sections(study, [one for one in each if one.model == model], pictures))
    for name, race in study.races.items():
        shown = _picture(figures.race(race), f"race_{name.replace('/', '_')}".removesuffix("_."), pictures)
        sections.append(_section(f"The race {name}".removesuffix(" ."), *map(_paragraph, race.verdict), shown))
    if study.evidence:
        sections += list(_evidence_sections(study.evidence, pictures))
    sections += list(_selection_sections(study, pictures))
    if study.bench and (figure := figures.time(study.bench)):
        sections.append(_section("Cached against online", _picture(figure, "time", pictures), TIME_TEXT))
    if study.notes:
        sections.append(_section("Left out", *map(_paragraph, study.notes)))
    if study.rows:
        rows = f"<details><summary>{len(study.rows)} rows</summary>{_all_rows(study.rows)}</details>"
        sections.append(_section("All students", rows))
    content = PAGE.format(title=html.escape(str(study.search)), body="\n".join(sections))
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        (out / f"{name}.png").write_bytes(picture)
    (out / "report.html").write_text(content, encoding="utf-8")
    (out / "table.md").write_text("\n".join(markdown(each)) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------- text


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], bold: int | None = None) -> str:
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = []
    for number, row in enumerate(rows):
        style = " class=chosen" if number == bold else ""
        lines.append(f"<tr{style}>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>")
    return f"<div class=wide><table><thead><tr>{cells}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


HEAD = ("teacher", "loss", "alpha", "T", "n", "held out, %", "test, %", "minus the last checkpoint", "p", "")


def comparison(each: Sequence[StudentGroup]) -> list[list[str]]:
    """A row for each teacher of one model: setting, n, mean and deviation, and the difference from the last
    checkpoint with a paired test."""
    base = last_checkpoint(each)
    compared = differences(each, base) if base else [None] * len(each)
    rows = []
    for one, difference in zip(each, compared, strict=True):
        setting = ["" if value is None else f"{value}" for value in (one.loss, one.alpha, one.temperature)]
        test = mean_and_deviation(one.test) if one.test else ""
        rows.append([one.teacher, *setting, str(len(one.val)), mean_and_deviation(one.val), test, *_judged(difference)])
    return rows


def _judged(difference: Difference | None) -> list[str]:
    if difference is None:
        return ["", "", ""]
    deviation = "" if difference.deviation is None else f" ± {difference.deviation:.2f}"
    p = "" if difference.adjusted_p is None else _p_value(difference.adjusted_p)
    return [f"{difference.mean:+.2f}{deviation}", p, "within noise" if difference.within_noise else "differs"]


def _p_value(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def markdown(each: Sequence[StudentGroup]) -> list[str]:
    """The comparison of every model as a table for a README."""
    lines = [f"| student | {' | '.join(HEAD)} |", "|---" * (len(HEAD) + 1) + "|"]
    for model in dict.fromkeys(one.model for one in each):
        for row in comparison([one for one in each if one.model == model]):
            lines.append(f"| {' | '.join([model, *row])} |")
    return lines


def _all_rows(rows: Sequence[dict]) -> str:
    keys = [key for key in rows[0] if key not in ("weights_sha256", "identity")]
    texts = [
        ["" if row[k] is None else f"{row[k]:.4g}" if isinstance(row[k], float) else str(row[k]) for k in keys]
        for row in rows
    ]
    return _table(keys, texts)


# ------------------------------------------------------------------------------------------- sections


def _model_sections(study: Study, each: list[StudentGroup], pictures: dict[str, bytes]) -> Iterator[str]:
    """Everything about the students of one model."""
    model = each[0].model
    split = "test" if any(one.test for one in each) else "held-out"
    singles = sorted((one for one in each if one.epoch is not None), key=lambda one: one.epoch or 0)
    selection = next((s.result for s in study.selections if in_common(singles, s.result)), None)
    pairs = in_common(singles, selection) if selection else []
    settings = len({(row["loss"], row["alpha"], row["temperature"]) for row in study.rows if row["teacher"] != "none"})
    seeds = len({row["seed"] for row in study.rows})
    base = last_checkpoint(each)
    yield _section(
        f"{model}: students of every teacher",
        _paragraph(
            f"Every teacher had the same {settings} settings of loss, alpha and temperature, {seeds} seeds each; the "
            "best mean top-1 on held-out images chose its setting. Mean ± deviation over seeds. The difference is "
            "paired by seed; p of a two-sided paired test, the noise pooled over the teachers (a randomised block "
            "design), adjusted for their number (Holm). The deviations are the students': each teacher comes from one "
            "training."
        ),
        _paragraph(_headline(each, split)),
        _table(HEAD, comparison(each), bold=each.index(base) if base else None),
    )
    name = f"{model}_".replace("/", "_")
    if len(singles) > 1:
        figure = figures.checkpoints(each, singles, selection, split)
        yield _section("Student against teacher checkpoint", _picture(figure, f"{name}checkpoints", pictures))
    ensembles = [one for one in each if "+" in one.teacher]
    if ensembles and base:
        figure = figures.ensembles(base, ensembles, split)
        yield _section("Student against ensemble size", _picture(figure, f"{name}ensembles", pictures))
    if selection and len(pairs) > 1:
        ways = ways_to_choose(pairs, selection)
        figure = figures.regret(ways, [one for _, one in pairs])
        rows = []
        for way in sorted(ways, key=lambda way: way.regret):
            correlation = ["", ""]
            if way.correlation is not None and way.p is not None:
                correlation = [f"{way.correlation:+.2f}", _p_value(way.p)]
            rows.append([way.name, str(way.epoch), f"{way.regret:.2f}", *correlation])
        text = (
            f"Regret: {split} top-1 of the best checkpoint's students minus that of the chosen one's, in points. The "
            f"best of {len(pairs)} noisy means is partly luck, so even the right choice has some. Spearman's rank "
            f"correlation of the score with the students' top-1 over {len(pairs)} checkpoints, its p not adjusted."
        )
        yield _section(
            "What each way to choose costs",
            _paragraph(text),
            _picture(figure, f"{name}regret", pictures),
            _table(("choice by", "epoch", "regret", "rank correlation", "p"), rows),
        )
    curves = figures.curves(study, sorted(each, key=lambda one: -one.mean), base)
    if curves:
        yield _section("Learning curves", _picture(curves, f"{name}curves", pictures))


def _headline(each: Sequence[StudentGroup], split: str) -> str:
    """What the table says, in words."""
    base = last_checkpoint(each)
    if base is None:
        return ""
    compared = [(one, found) for one, found in zip(each, differences(each, base), strict=True) if found]
    parts = [f"last checkpoint {base.mean:.2f} %"]
    for what, belongs in (
        ("best other checkpoint, {}:", lambda one: one.epoch is not None),
        ("best ensemble, {}:", lambda one: "+" in one.teacher),
        ("no teacher:", lambda one: one.teacher == "none"),
    ):
        if candidates := [pair for pair in compared if belongs(pair[0])]:
            one, found = max(candidates, key=lambda pair: pair[0].mean)
            noise = "within noise" if found.within_noise else f"p {_p_value(found.adjusted_p or 0.0)}"
            parts.append(f"{what.format(one.teacher)} {one.mean:.2f} %, {found.mean:+.2f} ({noise})")
    return f"Students' top-1 on {split} images: {'; '.join(parts)}."


def _evidence_sections(found: Evidence, pictures: dict[str, bytes]) -> Iterator[str]:
    """Everything about a study of several teachers."""
    shown = {"ways": [evidence.plane(found)], "claims": [evidence.own_losses(found)]}
    for name, table in evidence.tables(found).items():
        drawn = [_picture(figure, f"evidence_{name}", pictures) for figure in shown.get(name, [])]
        yield _section(table.title, _paragraph(table.text), *drawn, _table(table.head, table.rows))


def _selection_sections(study: Study, pictures: dict[str, bytes]) -> Iterator[str]:
    """Everything about the choice by mutual information."""
    if not study.selections:
        return
    first, selections = study.selections[0], [selected.result for selected in study.selections]
    text = ""
    if cost := first.cost:
        text = (
            f"The selection took {cost.seconds:.0f} s, {100 * cost.share:.1f} % of training one student from "
            f"each of the {len(first.result.checkpoints)} checkpoints."
        )
    yield _section(
        "The information plane",
        _paragraph(
            "Estimates by probes, in nats, with the deviation over the probes' seeds; the numbers are epochs. The star "
            "is the checkpoint that the selection chose, by the scaling and the weight of I(Y;F) that it was made with."
        ),
        _paragraph(text),
        _picture(figures.information(selections), "information", pictures),
    )
    yield _section(
        "How the choice moves with scaling, weight and layer",
        _paragraph("The chosen epoch against the weight of I(Y;F), for every scaling; one panel for each layer."),
        _picture(figures.choice(selections), "choice", pictures),
    )


TIME_TEXT = _paragraph(
    "Time of an epoch over that of plain training of the same student: interleaved epochs in one process, median, "
    "least and most. Caching's own time is not in it: ckd_dist.store plan tells from how many students on it pays."
)


# ------------------------------------------------------------------------------------------- pictures


def _picture(figure: Figure, name: str, pictures: dict[str, bytes]) -> str:
    """A figure as an element of the page, and as PNG among the pictures."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150, metadata={"Software": None})
    pictures[name] = content.getvalue()
    data = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ckd_dist: {title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 0 auto;
  padding: 1rem; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ddd; }}
img {{ max-width: 100%; height: auto; display: block; }}
table {{ border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.25rem 0.6rem; text-align: left; border-bottom: 1px solid #eee; white-space: nowrap; }}
tr.chosen {{ background: #f2f6fa; }} .wide {{ overflow-x: auto; }} summary {{ cursor: pointer; }}
</style>
</head>
<body>
<h1>Distillation from checkpoints: {title}</h1>
{body}
</body>
</html>
"""

"""Write the tables of README.md and docs/ that come from results, from the results that are kept in configs/study.

  python -m ckd_dist.studies.tables        at the root of the repository

A table stands between the lines <!-- table: NAME --> and <!-- end of table -->, which is where it is written anew.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from ckd_dist.core.errors import require
from ckd_dist.core.evidence import read_evidence, read_recipes
from ckd_dist.core.files import write_bytes_atomically
from ckd_dist.core.process import run_process
from ckd_dist.core.results import read_bench, read_table
from ckd_dist.report import evidence, page, speed
from ckd_dist.report.findings import StudentGroup, student_groups

RESULTS = Path("configs/study/results")
BLOCK = re.compile(r"(?<=<!-- table: )([\w ]+) -->\n.*?(?=<!-- end of table -->)", re.DOTALL)


def main() -> None:
    """Write what is not as it should be, and say so."""
    if sys.argv[1:]:
        print(__doc__)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    require(RESULTS.is_dir(), f"{RESULTS} is not here: run it at the root of the repository")
    for path in (Path("README.md"), *sorted(Path("docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        made = written(text)
        if made != text:
            write_bytes_atomically(path, made.encode())
        print(f"{path}: {len(BLOCK.findall(text))} tables{', written anew' if made != text else ''}")


def written(text: str) -> str:
    """A page with its tables made anew; raises `UserError` for one that has no such name."""

    def table(match: re.Match) -> str:
        name = match[1]
        require(name in TABLES, f"<!-- table: {name} -->: there are {', '.join(TABLES)}")
        return "\n".join([f"{name} -->", "", *TABLES[name](), "", ""])

    return BLOCK.sub(table, text)


@cache
def _students() -> list[StudentGroup]:
    return student_groups(read_table(RESULTS / "results.csv", "results"))


@cache
def _evidence() -> dict[str, evidence.Table]:
    return evidence.tables(read_evidence(RESULTS / "evidence.json", "results"))


def _of_evidence(name: str) -> list[str]:
    return _with_text(_evidence()[name])


def _with_text(table: evidence.Table) -> list[str]:
    return [*table.markdown(), "", *textwrap.wrap(table.text, 128)]


def _few_columns() -> list[str]:
    """Of the comparison what is of interest to somebody who looks in: no teacher, half-way, last, ensembles of two."""
    head, *rows = [[row[place] for place in (0, 6, 7, 8, 9)] for row in (page.HEAD, *page.comparison(_students()))]
    rows = [row for row in rows if row[0] in ("none", "10", "20") or row[0].count("+") == 1]
    return evidence.Table("", "", head, rows).markdown()


IN_SHORT = (
    "trying all, 3 seeds",
    "race with a prior, 15 %",
    "race without a prior, 15 %",
    "teacher's top-1",
    "Algorithm 1, raw",
    "last checkpoint",
    "a checkpoint at random",
)


def _few_ways() -> list[str]:
    table = _evidence()["ways"]
    rows = [row[:3] for row in table.rows if row[0] in IN_SHORT]
    return table._replace(head=table.head[:3], rows=rows).markdown()


TABLES: dict[str, Callable[[], list[str]]] = {
    "students": lambda: page.markdown(_students()),
    "students in short": _few_columns,
    "ways in short": _few_ways,
    "speed": lambda: _with_text(speed.every(read_bench(RESULTS / "bench.json", "results"))),
    "speed in short": lambda: _with_text(speed.in_short(read_bench(RESULTS / "bench.json", "results"))),
    "recipes": lambda: _with_text(evidence.recipes(read_recipes(RESULTS / "recipes.json", "results"))),
    **{name: partial(_of_evidence, name) for name in ("ways", "claims", "predictors", "errors")},
}
"""Name -> its lines."""


if __name__ == "__main__":
    run_process(main)

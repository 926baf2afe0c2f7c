"""Write one page about a study: which checkpoint teaches best, how to choose it, what it costs, and what is noise.

  python -m ckd_dist.report RUNS [--out FOLDER]

RUNS is a folder of runs: under it, at any depth, at least one run of ckd_dist.search and, beside it, runs of
select_teacher (several layers may be there) and of bench. FOLDER, by default RUNS/report, gets report.html, a page that
needs nothing else; its pictures as PNG files; table.md, its main table; and lineage.json, what it was made of. Needs
matplotlib: pip install 'ckd_dist[report]'.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ckd_dist.core import identity
from ckd_dist.core.errors import UserError
from ckd_dist.core.files import file_sha256
from ckd_dist.core.options import Parser, option_words
from ckd_dist.core.process import run_process


def main() -> None:
    """Read the command line, write the page."""
    parser = Parser(prog="python -m ckd_dist.report", description=__doc__)
    parser.add_argument("runs", type=Path, metavar="RUNS")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (RUNS/report)")
    options = parser.parse_args(option_words(sys.argv[1:]))
    try:
        from ckd_dist.report import findings, page
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise UserError("matplotlib is not installed: pip install 'ckd_dist[report]'") from None
    study = findings.read_study(options.runs)
    out = options.out or options.runs / "report"
    page.write(study, out)
    inputs = {os.path.relpath(path, options.runs): identity.file(path, file_sha256(path)) for path in study.files}
    identity.Origin(inputs=inputs).write(out)
    for note in study.notes:
        print(f"left out: {note}")
    print(f"{out / 'report.html'}: {len(study.rows)} students, {len(study.selections)} selections")


if __name__ == "__main__":
    run_process(main)

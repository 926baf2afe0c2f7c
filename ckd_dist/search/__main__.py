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

With --race it does not train all of them to the end: all settings of all teachers begin with short schedules, those
that are behind by more than the noise are dropped, the others go on to more seeds and longer schedules. It says which
teaches best, or which cannot be told apart, and writes race.json, which distill takes as --teacher.selection.
"""

from __future__ import annotations

import os
from pathlib import Path

from ckd_dist.core import results
from ckd_dist.core.errors import require
from ckd_dist.core.process import run_command
from ckd_dist.search.choice import choose, is_of, show, test
from ckd_dist.search.options import SearchConfig
from ckd_dist.search.processes import share_out
from ckd_dist.search.trials import Search, prepare, side_by_side


def main(config: SearchConfig) -> None:
    """Train, choose and test students; show the choice."""
    # Imported here because torch takes seconds: only once the options are known to be good.
    from ckd_dist.core import console, dist
    from ckd_dist.core.run_folder import RunFolder
    from ckd_dist.train import students

    number, parts = map(int, (config.part or "1/1").split("/"))
    search = None
    if config.processes > 1:
        require("RANK" not in os.environ, "processes is for one plain process: leave it out under torchrun")
        require(config.part is None, "part and processes do not go together: give one of them")
        search = prepare(config)
        if config.race or search.missing(search.trials):
            RunFolder(config.run_dir, search.origin)
            share_out(search.config)
    if config.race:
        race(config, search, number, parts)
        return
    with dist.process_group() as device:
        search = search or prepare(config)
        groups = side_by_side(search.trials, config.students_at_once, parts)[number - 1 :: parts]
        missing = search.missing([trial for group in groups for trial in group])
        if config.part is None and config.processes == 1:  # parts may be at work all at once
            RunFolder(config.run_dir, search.origin)
        for count, group in enumerate(groups, start=1):
            if group := [trial for trial in group if trial in missing]:
                console.say(f"group {count} of {len(groups)}: {', '.join(trial.name for trial in group)}")
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
            console.say(f"{table}: {len(search.trials)} students")


def race(config: SearchConfig, search: Search | None, number: int, parts: int) -> None:
    """Run a race to its end, of which this process has part `number` of `parts`; show and write how it ended."""
    from ckd_dist.core import dist
    from ckd_dist.core.run_folder import RunFolder
    from ckd_dist.search import racing
    from ckd_dist.search.verdict import report

    with dist.process_group() as device:
        search = search or prepare(config)
        entered = racing.prepare(search)
        if config.part is None and config.processes == 1:
            RunFolder(config.run_dir, search.origin)
        outcome = racing.run(entered, device, number, parts)
        if number == 1:
            dist.on_main(lambda: report(entered, outcome))


if __name__ == "__main__":
    run_command(main, SearchConfig, "ckd_dist.search")

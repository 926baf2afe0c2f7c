"""A selection that is killed ends with the numbers of one that never was."""

from __future__ import annotations

import json

from tests.helpers.commands import command_line, kill_and_repeat
from tests.helpers.selection import select_here


def test_a_killed_selection_ends_with_the_numbers_of_one_that_never_was(chosen, tmp_path, capsys):
    words, _ = chosen
    words = [*words, "--probe.steps", 130, "--probe.repeats", 1, "--teacher.checkpoints", "[2,3]"]
    words += ["--data.batch_size", 16]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = select_here(*words, "--run_dir", whole)
    left = sorted(path.name for path in whole.iterdir())
    assert left == [".lock", "config.yaml", "cost.json", "env.json", "lineage.json", "selection.json"]

    def saves():  # counts each save once
        path = killed / "probes.pt"
        seen.add(path.stat().st_mtime_ns if path.exists() else 0)
        return len(seen)

    seen: set[int] = set()
    command = command_line("ckd_dist.select_teacher", *words, "--run_dir", killed)
    kill_and_repeat(command, saves, kills=[2])
    assert json.loads((killed / "selection.json").read_text()) == expected
    assert not (killed / "probes.pt").exists()
    capsys.readouterr()
    assert select_here(*words, "--run_dir", killed) == expected
    assert "complete already" in capsys.readouterr().out

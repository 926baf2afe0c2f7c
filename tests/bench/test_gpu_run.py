"""The half hour on a GPU, rehearsed: what fails or takes too long does not keep the rest from being run."""

from __future__ import annotations

import time

import psutil

from ckd_dist.bench import gpu


def test_a_stage_that_fails_or_hangs_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    hangs = "import subprocess, sys; p = subprocess.Popen(['sleep', '1000']); print(p.pid, flush=True); p.wait()"
    wanted = [
        gpu.Stage("right", 0.5, ["-c", "print('first'); print('second')"], 1),
        gpu.Stage("wrong", 0.5, ["-c", "raise SystemExit('broken')"], 5),
        gpu.Stage("too long", 0.3, ["-c", hangs], 5),
        gpu.Stage("last", 0.5, ["-c", "print('to the end')"], 5),
    ]
    monkeypatch.setattr(gpu, "stages", lambda out: wanted)
    monkeypatch.setattr("sys.argv", ["gpu", str(tmp_path), "--minutes", "0.5"])
    started = time.monotonic()
    assert gpu.main() == 1
    assert time.monotonic() - started < 100  # the command that hangs would take 1000
    summary = (tmp_path / "summary.md").read_text()
    assert "## right: done" in summary and "second" in summary and "first" not in summary
    assert "## wrong: failed with status 1" in summary and "broken" in summary
    assert "## too long: out of time" in summary and "to the end" in summary
    started_by_it = int((tmp_path / "too_long.log").read_text().split()[0])
    if psutil.pid_exists(started_by_it):  # ended, and not yet taken note of by init
        assert psutil.Process(started_by_it).status() == psutil.STATUS_ZOMBIE
    assert "rehearsal" in summary or "CUDA" in summary


def test_every_stage_is_a_command_that_there_is(tmp_path):
    stages = gpu.stages(tmp_path)
    assert sum(stage.share for stage in stages) <= 1.0
    modules = {str(stage.words[1]) for stage in stages}
    assert modules == {"pytest", "ckd_dist.studies.quickstart", "ckd_dist.bench.profile", "ckd_dist.bench"}

"""Files and processes of a writing: killed, stopped, side by side; what it says."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import psutil

from data_prep.progress import Progress
from tests.helpers.commands import ENVIRONMENT, ROOT
from tests.helpers.data_prep import (
    Fork,
    assert_refused,
    forks,
    photo,
    pipes,
    read,
    run_as_program,
    save,
    wait_for_workers,
    with_companions,
    write,
    write_folder,
)


def test_a_beton_never_stands_beside_the_json_or_the_digests_of_another(tmp_path, photos, monkeypatch):
    out = tmp_path / "x.beton"
    write_folder(photos, out, "--subset", 10)
    states = []

    def replace(path: Path, target: Path) -> None:
        os.replace(path, target)
        states.append({
            path.name: count(path)
            for path, count in (
                (out, lambda path: len(read(path).labels)),
                (Path(f"{out}.json"), lambda path: json.loads(path.read_text())["count"]),
                (Path(f"{out}.digests.npy"), lambda path: len(np.load(path))),
            )
            if path.exists()
        })  # fmt: skip

    monkeypatch.setattr(Path, "replace", replace)
    write_folder(photos, out, "--subset", 20)
    assert {value for state in states for value in state.values()} == {20}
    assert [out.name in state for state in states] == [False, False, True] and len(states[-1]) == 3


def test_a_killed_worker_ends_the_program_with_one_line(tmp_path):
    known, workers = frozenset(forks(os.getpid())), []

    def kill_one() -> None:
        workers.extend(wait_for_workers(os.getpid(), known))
        os.kill(workers[1], signal.SIGKILL)
        if not ended.wait(20):  # hangs: let it fail instead
            os.kill(workers[0], signal.SIGKILL)

    ended = threading.Event()
    killer = threading.Thread(target=kill_one)
    killer.start()
    result = write(*pipes(tmp_path))
    in_time = killer.is_alive()
    ended.set()
    killer.join()
    assert in_time
    assert_refused(result, "error: --workers: a writer process died (SIGKILL)", "fewer workers")
    assert os.listdir(tmp_path / "out") == []
    assert not any(psutil.pid_exists(worker) for worker in workers)


def test_a_signal_while_workers_are_forked_is_not_lost(tmp_path):
    argv = pipes(tmp_path)

    def run_with_signal() -> None:
        os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGTERM))
        run_as_program(argv)

    done = Fork(run_with_signal, tmp_path / "log").wait()
    assert done.status == 128 + signal.SIGTERM
    assert done.err == "imagefolder test: 128 of 128 images, classes: 1\n" and done.out == ""
    assert os.listdir(tmp_path / "out") == []


def test_sigterm_ends_the_workers_and_leaves_no_files(tmp_path):
    argv = pipes(tmp_path)
    program = Fork(lambda: run_as_program(argv), tmp_path / "log")
    try:
        workers = wait_for_workers(program.process.pid)
        assert len(os.listdir(tmp_path / "out")) == 1  # the temporary file
        program.process.terminate()
    finally:
        done = program.wait()
    assert done.status == 128 + signal.SIGTERM
    assert done.err == "imagefolder test: 128 of 128 images, classes: 1\n" and done.out == ""
    assert os.listdir(tmp_path / "out") == []
    assert not any(psutil.pid_exists(worker) for worker in workers)


def test_what_a_killed_writer_left_goes_at_the_next_write_and_that_of_a_living_one_stays(tmp_path, photos):
    os.mkfifo(tmp_path / "wnids.txt")  # keeps its readers waiting
    out = tmp_path / "out" / "x.beton"
    out.parent.mkdir()
    command = [sys.executable, "-m", "data_prep.write_beton", "--dataset", "tiny_imagenet", "--split", "test"]
    writers, files = [], []
    for _ in range(2):
        writers.append(subprocess.Popen([*command, "--root", tmp_path, "--out", out], cwd=ROOT, env=ENVIRONMENT))
        while len(names := set(os.listdir(out.parent)) - set(files)) < 1:
            time.sleep(0.01)
        files += names
    try:
        time.sleep(0.1)  # its lock comes right after its file
        writers[0].kill()
        writers[0].wait()
        for kind in ("json", "digests"):  # as if it had come that far
            (out.parent / files[0].replace("data", kind)).touch()
        write_folder(photos, out, "--subset", 5)
        assert set(os.listdir(out.parent)) == with_companions("x.beton") | {files[1]}
        writers[1].terminate()
        assert writers[1].wait(20) == 128 + signal.SIGTERM
        assert set(os.listdir(out.parent)) == with_companions("x.beton")
    finally:
        for writer_ in writers:
            writer_.kill()


def test_names_are_utf8_whatever_the_locale(tmp_path):
    folder = tmp_path / "é"
    for name in ("Zebra", "ä", os.fsdecode(b"\xff")):
        save(folder / "in" / name / "ö.png", photo(8, 8, seed=1))
    here = write_folder(folder / "in", folder / "here.beton")
    # Python then takes ASCII for names and texts; the encoding of stdout is that of a terminal which shows no more.
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "data_prep.write_beton", "--dataset", "imagefolder", "--split", "test"]
    command += ["--root", folder / "in", "--out", folder / "there.beton"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT | locale, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "there.beton: 3 images" in done.stdout
    there = json.loads((folder / "there.beton.json").read_text(encoding="utf-8"))
    assert there["classes"] == ["Zebra", "ä", "\\xff"]
    assert there == here


def test_help_shows_examples_without_importing_torch():
    script = (
        "import sys, data_prep.write_beton as w\n"
        "try: w.main(['--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules or 'ffcv' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    examples = [line for line in done.stdout.splitlines() if line.startswith("  python -m data_prep.write_beton --")]
    assert len(examples) >= 6
    for example in examples:
        write_beton_options = example.split()[3:]
        assert "--dataset" in write_beton_options and "--out" in write_beton_options


def test_progress_redraws_one_line_on_a_terminal_and_writes_few_lines_elsewhere(monkeypatch):
    clock = iter(np.arange(0, 10_000, 0.05))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))

    def show(terminal: bool) -> str:
        with redirect_stderr(io.StringIO()) as screen:
            screen.isatty = lambda: terminal
            with Progress("writing", 1000) as progress:
                for done in range(1, 1001):
                    progress.update(done)
        return screen.getvalue()

    terminal, log = show(True), show(False)
    assert terminal.count("\n") == 1 and terminal.count("\r") > 100
    assert "[####################] 100 %  1,000/1,000 images" in terminal
    assert "\r" not in log and 3 <= log.count("\n") <= 6
    assert "images/s" in log and " left" in log

"""Reading ahead: an epoch's records are in memory, checked, before they are needed, and are those of the files."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter

import numpy as np
import psutil
import pytest

from ckd_dist.bench.limited import limited_memory
from ckd_dist.core import memory
from ckd_dist.core.errors import UserError
from ckd_dist.store.ahead import ReadAhead
from ckd_dist.store.manifest import Manifest
from ckd_dist.store.reader import StoreReader
from ckd_dist.store.size import shard_size
from tests.helpers.commands import ENVIRONMENT, PROGRAMS, ROOT, command_line, run
from tests.helpers.here import cache_here, store_here
from tests.helpers.stores import cache_options, damage_at, old_format
from tests.helpers.training import same_weights

EPOCHS = (0, 1, 1, 0)
"""The view of each."""


def view_bytes(store):
    """Of one view of one checkpoint."""
    manifest = Manifest.load(store, "")
    return sum(shard_size(manifest, shard) for shard in manifest.shards("epoch_0003", 0))


def options(fashion, run_dir, store, *more):
    images = ["--data.train", fashion["train"], "--data.val", fashion["holdout"], "--data.batch_size", 64]
    model = ["--model.name", "resnet8", "--epochs", 3, "--optim.lr", 0.05, "--kd.temperature", 4]
    return [*images, *model, "--teacher.store", store, "--run_dir", run_dir, *more]


@pytest.mark.parametrize(
    ("views", "in_memory", "said"),
    [
        (4, "both", "in memory, while"),
        (2, "its own", "in memory, when"),
        (1, "nothing", "row by row"),
        (0, "nothing", ""),
    ],
)
def test_what_fits_into_the_budget_is_read_from_memory(copy, store, capsys, views, in_memory, said):
    reader, plain = StoreReader(str(copy), [1, 3]), StoreReader(str(store), [1, 3])
    ahead = ReadAhead(reader, [reader.views_of([0, 1], view) for view in EPOCHS], views * view_bytes(store))
    assert said in capsys.readouterr().out.replace("\n", " ")
    ids = np.random.default_rng(0).permutation(1201)
    for epoch, view in enumerate(EPOCHS):
        ahead.begin(epoch)
        ahead._finish()  # what would be done by the time that an epoch has passed
        if in_memory != "nothing":
            (copy / "epoch_0003").rename(copy / "gone")
        np.testing.assert_array_equal(reader.rows(ids, view), plain.rows(ids, view))
        if in_memory == "both" and epoch == 0:
            np.testing.assert_array_equal(reader.rows(ids, 1), plain.rows(ids, 1))
        elif in_memory == "its own":
            with pytest.raises(UserError, match="is missing"):
                reader.rows(ids, 1 - view)
        if in_memory != "nothing":
            (copy / "gone").rename(copy / "epoch_0003")


def test_no_more_is_held_than_the_budget(store):
    reader = StoreReader(str(store), [1, 2, 3])
    budget = 3 * view_bytes(store)
    ahead = ReadAhead(
        reader, [{("epoch_0001", 0)}, {("epoch_0001", 1), ("epoch_0002", 0)}, {("epoch_0003", 0)}], budget
    )
    for epoch in range(3):
        ahead.begin(epoch)
        ahead._finish()
        assert sum(held.memory.size for held in reader._held.values()) <= budget
        assert len(reader._held) == (3, 3, 1)[epoch]


@pytest.mark.parametrize("budget", [0, 10**9])
@pytest.mark.parametrize("nproc", [0, 2])
def test_damage_of_a_later_view_ends_the_training_before_that_view(copy, fashion, tmp_path, nproc, budget):
    damage_at(copy / "epoch_0003" / "view_0001" / "samples_00000250-00000499.npy", 2000)
    words = options(fashion, tmp_path / "run", copy, "--teacher.read_ahead", budget / 1e9, "--save_every", 1)
    started = time.monotonic()
    done = run("ckd_dist.distill", *words, nproc=nproc, status=1 if nproc else 2)
    assert time.monotonic() - started < 120
    message = "teacher.store: .*view_0001/samples_00000250-00000499.npy does not match its checksum: run .*store repair"
    lines = [line for line in done.stderr.splitlines() if "does not match" in line]
    assert 1 <= len(lines) <= max(1, nproc) and all(re.search(message, line) for line in lines), done.stderr
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").glob("epoch*"))] == ["epoch_0001.pt"]
    shutil.rmtree(copy / "epoch_0003" / "view_0001")
    done = run("ckd_dist.distill", *options(fashion, tmp_path / "new", copy), status=2)
    assert "is missing" in done.stderr and not (tmp_path / "new").exists()


def test_a_student_is_the_same_however_its_records_are_read(store, fashion, tmp_path):
    for name, more in {
        "files": [],
        "ahead": ["--teacher.read_ahead", 1],
        "late": ["--teacher.read_ahead", 3e-5],
    }.items():
        run("ckd_dist.distill", *options(fashion, tmp_path / name, store, *more))
    last = [tmp_path / name / "checkpoints" / "epoch_0003.pt" for name in ("files", "ahead", "late")]
    assert same_weights(last[0], last[1]) and same_weights(last[0], last[2])
    # It is no part of what a run is: one that began without goes on with it.
    run("ckd_dist.distill", *options(fashion, tmp_path / "files", store, "--teacher.read_ahead", 1, "--epochs", 3))


@pytest.mark.parametrize("budget", [0, 10**9])
def test_ranks_of_a_node_read_each_file_once_and_share_the_memory(store, budget):
    done = run(str(PROGRAMS / "read_ahead.py"), store, budget, nproc=3)
    read = json.loads(done.stdout.splitlines()[-1])
    assert all(len(own) for own in read)
    counts = Counter(path for own in read for path in own)
    views = ("view_0000", "view_0001")
    again = {f"{store}/{c}/{v}" for c in ("epoch_0001", "epoch_0003") for v in views}
    assert {os.path.dirname(path) for path in counts} == again
    # With memory for two views, the first comes again for the last epoch only.
    for path, count in counts.items():
        assert count == (2 if budget and "view_0000" in path else 1)


def test_a_killed_rank_takes_the_memory_and_the_others_with_it(store, fashion, tmp_path):
    words = options(fashion, tmp_path / "run", store, "--teacher.read_ahead", 1, "--epochs", 200, "--log_every", 1)
    process = subprocess.Popen(
        command_line("ckd_dist.distill", *words, nproc=2), env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            time.sleep(0.1)
        ranks = psutil.Process(process.pid).children()
        assert any("memfd:ckd_dist" in each.path for each in ranks[0].memory_maps())
        ranks[1].send_signal(signal.SIGKILL)
        assert process.wait(60) != 0
        assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in ranks)
    finally:
        process.kill()


def test_the_memory_of_a_control_group_is_the_limit(store):
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory.limit() <= machine
    code = (
        "from ckd_dist.core import memory; from ckd_dist.store.reader import StoreReader;"
        f"print(memory.limit(), StoreReader({str(store)!r}, []).outgrows_memory)"
    )
    try:
        with limited_memory() as group:
            join = f'echo $$ > {group}/cgroup.procs && exec {command_line("x")[0]} -c "{code}"'
            done = subprocess.run(["sh", "-c", join], capture_output=True, text=True, cwd=ROOT, check=True)
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    limit, outgrows = done.stdout.split()
    assert int(limit) == pytest.approx(1e9, abs=4096) and outgrows == "False"


def test_a_store_of_an_older_version_is_read_extended_checked_and_packed(copy, store, fashion, teacher, tmp_path):
    old_format(copy)
    ids = np.arange(1201)
    np.testing.assert_array_equal(StoreReader(str(copy), [3]).rows(ids, 1), StoreReader(str(store), [3]).rows(ids, 1))
    cache_here(*cache_options(fashion, teacher, copy, "--views", 3))
    kinds = [
        set(json.loads(path.read_text())) & {"sha256", "xxh3_128"} for path in sorted(copy.rglob("samples_*.json"))
    ]
    assert Counter(map(tuple, kinds)) == {("sha256",): 30, ("xxh3_128",): 15}
    assert json.loads((copy / "manifest.json").read_text())["format"] == 5
    assert store_here("verify", copy) == 0
    assert store_here("pack", copy, tmp_path / "a.tar", "--licence", "none") == 0
    assert store_here("unpack", tmp_path / "a.tar", tmp_path / "unpacked") == 0
    damage_at(copy / "epoch_0003" / "view_0000" / "samples_00000250-00000499.npy", 2000)
    with pytest.raises(UserError, match=r"view_0000/samples_00000250-00000499\.npy does not match its checksum"):
        StoreReader(str(copy), [3]).rows(ids, 0)
    assert store_here("verify", copy) == 1
    repair = ["--teacher.run", teacher, "--data.train", fashion["train"], "--data.batch_size", 64]
    assert store_here("repair", copy, *repair) == 0 and store_here("verify", copy) == 0

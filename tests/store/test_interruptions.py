"""A caching that is killed, stopped or out of room leaves nothing wrong, and the next one completes it."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import time
from contextlib import contextmanager

import pytest

from ckd_dist.store.__main__ import main as store_command
from tests.helpers.commands import ENVIRONMENT, ROOT, command_line, kill_and_repeat, run
from tests.helpers.here import cache_here
from tests.helpers.stores import VIEWS, cache_options, contents


def test_a_killed_caching_ends_with_the_same_bytes(store, fashion, teacher, tmp_path):
    path = tmp_path / "killed"
    command = command_line("ckd_dist.cache_logits", *cache_options(fashion, teacher, path), nproc=2)
    kill_and_repeat(command, lambda: len(list(path.glob("epoch_*/view_*/*.npy"))), kills=[0, 6, 18], seed=2)
    assert contents(path) == contents(store)


@pytest.mark.slow
def test_a_caching_killed_60_times_ends_with_the_same_bytes(fashion, teacher, tmp_path):
    more = ["--shard_size", 13, "--codec", "topk", "--k", 4]
    run("ckd_dist.cache_logits", *cache_options(fashion, teacher, tmp_path / "whole", *more))
    path = tmp_path / "killed"
    command = command_line("ckd_dist.cache_logits", *cache_options(fashion, teacher, path, *more), nproc=2)
    shards = 3 * VIEWS * -(-1201 // 13)
    kills = [0] * 6 + [i * (shards - 60) // 54 for i in range(54)]
    kill_and_repeat(command, lambda: len(list(path.glob("epoch_*/view_*/*.npy"))), kills, seed=5, longest=0.05)
    assert len(contents(path)) == 2 * shards + 2  # manifest and lock
    assert contents(path) == contents(tmp_path / "whole")


@contextmanager
def full_disk(limit=4096):
    """A limit on the size of files stands in for a full disk: writes fail in the same way, for any user."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", ["cache_logits", "convert"])
def test_a_full_disk_is_told_with_the_file_and_leaves_nothing_and_the_next_run_completes(
    store, fashion, teacher, tmp_path, command
):
    path = tmp_path / "full"
    words = ["convert", store, path, "--data.train", fashion["train"], "--codec", "dense", "--dtype", "bfloat16"]
    work = {
        "cache_logits": lambda: cache_here(*cache_options(fashion, teacher, path)),
        "convert": lambda: store_command(list(map(str, words))),
    }[command]
    with full_disk(), pytest.raises(OSError, match="File too large") as error:
        work()
    assert error.value.filename == str(path / "epoch_0001" / "view_0000" / "samples_00000000-00000249.npy")
    assert sorted(contents(path)) == [".lock", "manifest.json"]
    work()
    assert contents(path).keys() == contents(store).keys()
    assert command == "convert" or contents(path) == contents(store)


def test_a_folder_that_cannot_be_written_ends_with_one_line(fashion, teacher, tmp_path):
    (tmp_path / "ours").mkdir(mode=0o555)
    # Root may write everywhere, unless it gives that capability away.
    plain_user = ["setpriv", "--inh-caps=-dac_override", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    command = command_line("ckd_dist.cache_logits", *cache_options(fashion, teacher, tmp_path / "ours" / "store"))
    done = subprocess.run(
        [*plain_user, *command], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 2
    assert done.stderr == f"error: rank 0: Permission denied: {tmp_path / 'ours' / 'store'}\n"


def test_a_vanished_rank_ends_the_other_with_one_line_and_the_next_run_completes(store, fashion, teacher, tmp_path):
    path = tmp_path / "left"
    command = command_line("ckd_dist.cache_logits", *cache_options(fashion, teacher, path))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = []
    for rank in "01":
        environment = {**ENVIRONMENT, **group, "RANK": rank, "LOCAL_RANK": rank}
        ranks.append(subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    while not list(path.glob("epoch_*/view_*/.*.tmp")):
        assert all(process.poll() is None for process in ranks)
        time.sleep(0.002)
    ranks[1].kill()
    _, errors = ranks[0].communicate(timeout=60)
    ranks[1].communicate()
    assert ranks[0].returncode == 76 and errors == "error: rank 0: stopped, another rank has failed\n", errors
    cache_here(*cache_options(fashion, teacher, path))
    assert contents(path) == contents(store)


def test_a_caching_told_to_stop_ends_at_once_and_goes_on(store, fashion, teacher, tmp_path):
    words = command_line("ckd_dist.cache_logits", *cache_options(fashion, teacher, tmp_path / "store"))
    process = subprocess.Popen(words, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list(tmp_path.rglob("*.npy")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=30) == 75
    run("ckd_dist.cache_logits", *cache_options(fashion, teacher, tmp_path / "store"))
    assert contents(tmp_path / "store") == contents(store)

"""Several writers of one store at the same time, dead ones among them."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import psutil
import pytest

from ckd_dist.core.errors import UserError
from ckd_dist.core.files import NewFile
from ckd_dist.store.check import shard_fault
from ckd_dist.store.creation import merged, open_store
from ckd_dist.store.manifest import Manifest
from ckd_dist.store.writer import ShardWriter, is_written, locked
from tests.helpers.commands import ENVIRONMENT, ROOT, command_line
from tests.helpers.here import cache_here
from tests.helpers.stores import cache_options, contents


def at_once(work, arguments):
    """Call `work` with each of `arguments` in a process of its own, all at one moment, which `work` waits for by the
    function that it is given."""
    fork = multiprocessing.get_context("fork")
    go = fork.Event()
    processes = [fork.Process(target=work, args=(go.wait, *each)) for each in arguments]
    for process in processes:
        process.start()
    go.set()
    for process in processes:
        process.join()
        assert process.exitcode == 0


def test_commands_that_add_to_a_store_at_the_same_time_do_not_harm_each_other(copy):
    manifest = Manifest.load(copy, "")
    shutil.rmtree(copy)

    def add(wait, name, values):
        wanted = replace(manifest, checkpoints={name: values})
        wait()
        merged(copy, wanted)  # as a command looks before it waits for its turn
        with locked(copy):
            open_store(copy, merged(copy, wanted))

    wanted = {f"{run}/{name}": values for run in "abcdefgh" for name, values in manifest.checkpoints.items()}
    at_once(add, wanted.items())
    assert Manifest.load(copy, "").checkpoints == dict(sorted(wanted.items()))


def test_of_writers_of_one_shard_the_first_wins_and_its_checksum_is_its_own(store, tmp_path):
    manifest = Manifest.load(store, "")
    shards = manifest.checkpoint_shards("epoch_0001")[:4]

    def write(wait, value):
        for shard in shards:
            writer = ShardWriter(tmp_path, shard, manifest)
            writer.append(np.full((shard.count, 20), value, dtype=np.uint8))
            wait()
            writer.commit()

    at_once(write, [(value,) for value in range(8)])
    assert [shard_fault(tmp_path, manifest, shard) for shard in shards] == [None] * 4
    assert len(contents(tmp_path)) == 2 * 4 + 1  # and the lock


def test_a_kill_between_checksum_and_shard_leaves_no_shard(copy, monkeypatch):
    manifest = Manifest.load(copy, "")
    shard = manifest.shards("epoch_0001", 0)[0]
    shard.path(copy).with_suffix(".json").unlink()  # the shard itself is of another writer
    writer = ShardWriter(copy, shard, manifest)
    writer.append(np.zeros((shard.count, 20), dtype=np.uint8))
    publish = NewFile.publish

    def kill(new):
        if new.path == shard.path(copy):
            raise KeyboardInterrupt
        publish(new)

    monkeypatch.setattr(NewFile, "publish", kill)
    with pytest.raises(KeyboardInterrupt):
        writer.commit()
    assert not is_written(copy, shard)
    assert shard_fault(copy, manifest, shard).endswith(".npy is missing")


def test_identical_cachings_at_once_all_end_well_and_a_killed_one_harms_none(store, fashion, teacher, tmp_path):
    path = tmp_path / "shared"
    command = command_line("ckd_dist.cache_logits", *cache_options(fashion, teacher, path))
    first, *others = (
        subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for _ in range(3)
    )
    while not any(file.path.endswith(".tmp") for file in psutil.Process(first.pid).open_files()):
        assert first.poll() is None
    first.kill()
    for process in (first, *others):
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0 or process is first, errors.decode()
    cache_here(*cache_options(fashion, teacher, path))  # removes what the first has left
    assert contents(path) == contents(store)


def test_what_a_dead_writer_left_is_removed_and_is_not_taken_for_written(copy, store, fashion, teacher, monkeypatch):
    folder = copy / "epoch_0001" / "view_0000"
    (folder / "samples_00000000-00000249.npy").unlink()
    left = [
        copy / ".manifest.json.5eed.tmp",
        folder / ".samples_00000000-00000249.npy.5eed.tmp",
        folder / ".old.npy.tmp",
    ]
    for path in left:
        path.touch()
        os.truncate(path, 10**6)
    alive = NewFile(folder / "samples_00000000-00000249.npy")
    words = cache_options(fashion, teacher, copy)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 100, 100))
        with pytest.raises(UserError, match=r"needs 5\.42 kB more, the disk has 100 bytes free"):
            cache_here(*words)
    cache_here(*words)
    assert alive.temporary.exists() and not any(path.exists() for path in left)
    alive.discard()
    assert contents(copy) == contents(store)

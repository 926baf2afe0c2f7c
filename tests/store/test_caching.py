"""The logit store: the same bytes whoever writes it and however often that is interrupted; nothing wrong is read."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from ckd_dist.bench import storing
from ckd_dist.core.errors import TrainingError, UserError
from ckd_dist.core.files import NewFile
from ckd_dist.core.options import load_config
from ckd_dist.data import dataset
from ckd_dist.data.loader import BetonLoader
from ckd_dist.nn import forward, models
from ckd_dist.nn.options import KDConfig
from ckd_dist.store import codecs, recording
from ckd_dist.store import manifest as manifests
from ckd_dist.store.__main__ import main as store_command
from ckd_dist.store.check import shard_fault
from ckd_dist.store.manifest import Manifest
from ckd_dist.store.options import CacheConfig
from ckd_dist.store.reader import StoreReader
from ckd_dist.store.writer import ShardWriter, is_written, locked, merged, open_store
from tests.helpers.commands import ENVIRONMENT, ROOT, command_line, kill_and_repeat, run
from tests.helpers.here import cache_here
from tests.helpers.stores import VIEWS, cache_options, contents

CPU = torch.device("cpu")


def records(store, fashion, epochs, ids, view):
    return StoreReader(str(store), epochs, dataset.read_info(fashion["train"], "")).rows(np.asarray(ids), view)


def rows(store, fashion, epochs, ids, view):
    """Logits of one checkpoint of a dense store."""
    return records(store, fashion, epochs, ids, view)[:, 0].copy().view(np.float16).astype(np.float32)


def test_the_store_is_complete_and_any_tool_reads_it(store):
    shards = sorted(store.glob("epoch_*/view_*/*.npy"))
    assert len(shards) == 3 * VIEWS * 5
    arrays = [np.load(path) for path in shards[:5]]
    assert [len(array) for array in arrays] == [250, 250, 250, 250, 201]
    assert all(array.dtype == np.float16 and array.shape[1] == 10 for array in arrays)
    for path in shards:
        sidecar = json.loads(path.with_suffix(".json").read_text())
        assert sidecar["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        samples = f"samples_{sidecar['first']:08d}-{sidecar['last']:08d}.npy"
        assert path.parts[-3:] == (sidecar["checkpoint"], f"view_{sidecar['view']:04d}", samples)


@pytest.mark.parametrize("device", ["cpu", "cuda"])  # in whose way: the thread needs no GPU
def test_records_reach_the_disk_in_order_and_bad_logits_do_not(device, store, tmp_path):
    manifest = Manifest.load(store, "")
    shard = manifest.shards(next(iter(manifest.checkpoints)), 0)[0]
    logits = torch.from_numpy(np.load(shard.path(store))).float()

    def write(logits):
        with recording.Disk(torch.device(device)) as disk:
            writer = ShardWriter(tmp_path, shard, manifest)
            for part in logits.split(7):
                disk.append(writer, manifest.recorded.encode(part), part)
            disk.commit(writer)
            disk.finish()

    for bad in (torch.nan, torch.inf, -70000):
        with pytest.raises(TrainingError, match="float16 cannot hold"):
            write(torch.cat([logits[:-1], torch.full((1, 10), bad)]))
        assert not shard.path(tmp_path).exists()
    write(logits)
    for name in (shard.path(store), shard.path(store).with_suffix(".json")):
        assert (tmp_path / name.relative_to(store)).read_bytes() == name.read_bytes()


def test_records_are_the_teachers_answers_to_the_students_images(store, fashion, teacher):
    info = dataset.read_info(fashion["train"], "")
    model, _ = models.load_model(teacher / "checkpoints" / "epoch_0002.pt", "")
    recipe = dataset.train_recipe(load_config(CacheConfig, cache_options(fashion, teacher, store)).data, info)
    ids = np.random.default_rng(0).permutation(info.count)[:333]
    from ckd_dist.data.options import LoaderConfig

    loader = BetonLoader(info, LoaderConfig(), recipe, batch_size=50, image_size=28, device=CPU)
    amp = Manifest.load(store, "").forward["amp"]
    for view in range(VIEWS):
        for batch in loader.batches(ids, view, lambda ids, view: records(store, fashion, [2], ids, view)):
            answers = forward.forward_logits(forward.to_device(model, CPU), batch.images, amp)
            cached = codecs.Dense(10).decode(batch.teacher_records[:, 0], 1.0)
            torch.testing.assert_close(cached, answers.half().float(), rtol=2e-3, atol=2e-3)


def test_content_does_not_depend_on_world_size_or_batch_size(store, fashion, teacher, tmp_path):
    run("ckd_dist.cache_logits", *cache_options(fashion, teacher, tmp_path / "other", "--data.batch_size", 50), nproc=3)
    ours, theirs = contents(store), contents(tmp_path / "other")
    assert ours.keys() == theirs.keys()
    assert ours["manifest.json"] == theirs["manifest.json"]
    for name in ours:
        if name.endswith(".npy"):
            a, b = (np.load(folder / name).astype(np.float32) for folder in (store, tmp_path / "other"))
            np.testing.assert_allclose(a, b, rtol=2**-10, atol=2**-10)
        elif name.endswith(".json") and name != "manifest.json":
            a, b = (json.loads((folder / name).read_text()) for folder in (store, tmp_path / "other"))
            assert {k: v for k, v in a.items() if k != "sha256"} == {k: v for k, v in b.items() if k != "sha256"}


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


def test_checkpoints_and_views_can_be_added_later(store, fashion, teacher, tmp_path, capsys):
    path = tmp_path / "grown"
    few = cache_options(fashion, teacher, path)
    cache_here(*few, "--teacher.checkpoints", "[3]", "--views", 1)
    cache_here(*few, "--teacher.checkpoints", "[1,3]")
    cache_here(*few, "--teachers-at-once", 2)
    assert contents(path) == contents(store)
    capsys.readouterr()
    cache_here(*few)
    assert "7206 of 7206 records are there already" in capsys.readouterr().out
    assert contents(path) == contents(store)


def as_format_2(store):
    """Rewrite the manifest as earlier versions did: views of the store, not of a checkpoint; no classes, no paths."""
    path = store / "manifest.json"
    values = {**json.loads(path.read_text()), "format": 2}
    for key in ("checksum", "classes", "paths"):
        del values[key]
    (values["views"],) = {checkpoint.pop("views") for checkpoint in values["checkpoints"].values()}
    path.write_text(json.dumps({**values, "checksum": manifests._checksum(values)}))


def test_a_store_of_format_2_is_read_and_added_to(copy, store, fashion, teacher):
    as_format_2(copy)
    assert Manifest.load(copy, "") == replace(Manifest.load(store, ""), classes=[], paths={})
    assert store_command(["verify", str(copy)]) == 0
    cache_here(*cache_options(fashion, teacher, copy, "--teacher.checkpoints", "[3]", "--views", VIEWS + 1))
    assert [each["views"] for each in Manifest.load(copy, "").checkpoints.values()] == [VIEWS, VIEWS, VIEWS + 1]
    assert store_command(["verify", str(copy)]) == 0
    before, after = contents(store), contents(copy)
    assert len(after) == len(before) + 2 * 5
    assert all(after[name] == digest for name, digest in before.items() if name != "manifest.json")


def test_an_ensemble_is_the_mean_of_its_members_and_the_default_is_the_last(store, fashion):
    ids = [5, 1200, 3, 700, 5]
    single = {epoch: rows(store, fashion, [epoch], ids, 1) for epoch in (1, 2, 3)}
    both = torch.from_numpy(records(store, fashion, [1, 3], ids, 1))
    for kd, combine, expected in (
        (KDConfig(), "logits", (single[1] + single[3]) / 2),
        (KDConfig(loss="mse"), "logits", (single[1] + single[3]) / 2),
    ):
        mean = codecs.teacher_logits(codecs.Dense(10), both, kd, combine=combine)
        np.testing.assert_array_equal(mean, expected)
    np.testing.assert_array_equal(rows(store, fashion, [], ids, 1), single[3])
    np.testing.assert_array_equal(single[2][1], np.load(next(store.glob("epoch_0002/view_0001/*1200.npy")))[200])


def test_a_reader_keeps_no_file_open_and_maps_the_view_at_hand_alone(store, fashion):
    reader = StoreReader(str(store), [1, 2, 3], dataset.read_info(fashion["train"], ""))
    before = len(os.listdir("/proc/self/fd"))
    found = [reader.rows(np.arange(1201), view) for view in (0, 1, 0)]
    assert len(os.listdir("/proc/self/fd")) == before
    np.testing.assert_array_equal(found[0], found[2])
    maps = Path("/proc/self/maps").read_text()
    assert maps.count(f"{store}/") == maps.count(f"{store}/epoch_0001/view_0000/") * 3 == 3 * 5


def test_a_used_reader_may_go_to_another_process(store, fashion):
    reader = StoreReader(str(store), [3], dataset.read_info(fashion["train"], ""))
    unused = pickle.dumps(reader)
    rows = reader.rows(np.arange(100), 1)
    assert pickle.dumps(reader) == unused  # nothing of this process's memory
    np.testing.assert_array_equal(pickle.loads(unused).rows(np.arange(100), 1), rows)


@pytest.mark.parametrize("ids", [[-1], [0, 1201], [2**40]])
def test_samples_that_a_store_does_not_have_are_refused(store, fashion, ids):
    with pytest.raises(IndexError, match=r"the store has 0 to 1200"):
        records(store, fashion, [3], ids, 0)


def test_a_shard_that_is_transposed_is_not_read(copy, fashion):
    path = copy / "epoch_0003" / "view_0000" / "samples_00000000-00000249.npy"
    np.save(path, np.load(path).T)
    with pytest.raises(UserError, match=r"teacher\.store: .*249\.npy is no shard of this store .*Fortran order"):
        records(copy, fashion, [3], [0], 0)


def test_a_store_of_something_else_is_refused(copy, store, fashion, teacher, tmp_path):
    holdout = dataset.read_info(fashion["holdout"], "")
    with pytest.raises(UserError, match="is of images with content_hash"):
        StoreReader(str(store), [], holdout)
    with pytest.raises(UserError, match=r"teacher\.checkpoints: no checkpoint of epoch 7; there are 1, 2, 3"):
        rows(store, fashion, [7], [0], 0)
    before = contents(copy)
    for more, expected in (
        (["--seed", 5], "view_seed 0, this command has 5"),
        (["--data.flip", "false"], r"recipe\.flip 0\.5, this command has 0\.0"),
        (["--amp", "float16"], r"forward\.amp (bfloat16|off), this command has float16"),
        (["--shard_size", 99], "shard_size 250, this command has 99"),
        (["--data.train", fashion["holdout"]], r"dataset\.content_hash"),
    ):
        with pytest.raises(UserError, match=expected):
            cache_here(*cache_options(fashion, teacher, copy, *more))
    assert contents(copy) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and has no manifest"):
        cache_here(*cache_options(fashion, teacher, tmp_path / "mine"))


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


@pytest.mark.slow
def test_a_store_of_imagenets_size_is_written_verified_and_read(tmp_path):
    rows = storing.measure_reading(tmp_path / "store", storing.IMAGENET)  # compares every row that it reads
    assert "2.56 GB" in rows[0].case
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 12e9


# ------------------------------------------------------------------------------------------- several writers


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
        with pytest.raises(UserError, match=r"needs 5\.45 kB more, the disk has 100 bytes free"):
            cache_here(*words)
    cache_here(*words)
    assert alive.temporary.exists() and not any(path.exists() for path in left)
    alive.discard()
    assert contents(copy) == contents(store)


def test_ranks_wait_for_the_last_one_however_long_it_takes(store):
    run(str(ROOT / "tests" / "programs" / "uneven_ranks.py"), store, nproc=2)


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

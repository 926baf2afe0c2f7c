"""The logit store: the same bytes whoever writes it and however often that is interrupted; nothing wrong is read."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, VIEWS, cache_options, command_line, contents, kill_and_repeat, run

from ckd_dist import cache_logits, caching, data, engine, models
from ckd_dist.bench import storing
from ckd_dist.config import CacheConfig, KDConfig, TrainingError, UserError, load_config
from ckd_dist.loader import BetonLoader
from ckd_dist.store import codecs
from ckd_dist.store.manifest import Manifest
from ckd_dist.store.reader import StoreReader
from ckd_dist.store.writer import ShardWriter, locked, merged, open_store

CPU = torch.device("cpu")


def cache_here(*arguments):
    cache_logits.main(load_config(CacheConfig, [str(word) for word in arguments]))


def records(store, fashion, epochs, ids, view):
    return StoreReader(str(store), epochs, data.read_info(fashion["train"], "")).rows(np.asarray(ids), view)


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
        with caching.Disk(torch.device(device)) as disk:
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
    info = data.read_info(fashion["train"], "")
    model, _ = models.load_model(teacher / "checkpoints" / "epoch_0002.pt", "")
    recipe = data.train_recipe(load_config(CacheConfig, cache_options(fashion, teacher, store)).data, info)
    ids = np.random.default_rng(0).permutation(info.count)[:333]
    from ckd_dist.config import LoaderConfig

    loader = BetonLoader(info, LoaderConfig(), recipe, batch_size=50, image_size=28, device=CPU)
    amp = Manifest.load(store, "").forward["amp"]
    for view in range(VIEWS):
        for batch in loader.batches(ids, view, lambda ids, view: records(store, fashion, [2], ids, view)):
            answers = engine.forward_logits(engine.to_device(model, CPU), batch.images, amp)
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
    assert len(contents(path)) == 2 * shards + 1
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


def test_a_store_of_something_else_is_refused(copy, store, fashion, teacher, tmp_path):
    holdout = data.read_info(fashion["holdout"], "")
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


def test_a_full_disk_ends_with_one_line_and_the_next_run_completes(store, fashion, teacher, tmp_path):
    path = tmp_path / "full"
    command = command_line("ckd_dist.cache_logits", *cache_options(fashion, teacher, path))
    # A limit on the size of files stands in for a full disk: writes fail in the same way, for any user.
    limited = ["bash", "-c", "trap '' XFSZ; ulimit -f 4; exec \"$@\"", "bash", *command]
    done = subprocess.run(
        limited, env={**ENVIRONMENT, "NUMBA_CACHE_DIR": ""}, cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 2 and done.stderr.startswith("error: rank 0: File too large"), done.stderr[-2000:]
    assert done.stderr.count("\n") == 1
    assert not list(path.glob("epoch_*/view_*/samples*.npy"))
    cache_here(*cache_options(fashion, teacher, path))
    assert contents(path) == contents(store)


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


def test_commands_that_add_to_a_store_at_the_same_time_do_not_harm_each_other(copy):
    manifest = Manifest.load(copy, "")
    shutil.rmtree(copy)
    go = multiprocessing.get_context("fork").Event()

    def add(name, values):
        wanted = replace(manifest, checkpoints={name: values})
        go.wait()
        merged(copy, wanted)  # as a command looks before it waits for its turn
        with locked(copy):
            open_store(copy, merged(copy, wanted))

    wanted = {f"{run}/{name}": values for run in "abcdefgh" for name, values in manifest.checkpoints.items()}
    processes = [multiprocessing.get_context("fork").Process(target=add, args=item) for item in wanted.items()]
    for process in processes:
        process.start()
    go.set()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert Manifest.load(copy, "").checkpoints == dict(sorted(wanted.items()))


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

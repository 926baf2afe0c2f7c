"""`python -m ckd_dist.store`: plan, info, verify, repair, convert."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from ckd_dist.core.errors import UserError
from ckd_dist.store import plan
from ckd_dist.store.manifest import Manifest
from ckd_dist.store.size import store_size
from ckd_dist.store.writer import ShardWriter, make_room
from tests.helpers.commands import run
from tests.helpers.here import cache_here, store_here
from tests.helpers.stores import VIEWS, cache_options, contents


def size_and_files(folder):
    sizes = [path.stat().st_size for path in folder.rglob("[!.]*") if path.is_file()]
    return sum(sizes), len(sizes)


# ------------------------------------------------------------------------------------------- plan, info


def test_plan_knows_the_size_to_the_byte_and_writes_nothing(store, fashion, teacher, tmp_path):
    words = cache_options(fashion, teacher, tmp_path / "planned", "--json")
    found = json.loads(run("ckd_dist.store", "plan", *words, nproc=2).stdout)
    assert (found["bytes"], found["files"]) == size_and_files(store)
    assert found["missing_records"] == 3 * VIEWS * 1201
    assert found["largest_shard_bytes"] == max(path.stat().st_size for path in store.rglob("*.npy"))
    assert found["seconds"] > 0 and found["students"] >= 1 and found["free_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_plan_of_a_store_that_is_there_tells_what_is_missing(copy, topk, fashion, teacher, capsys):
    shutil.rmtree(copy / "epoch_0002" / "view_0001")
    before = contents(copy)
    assert store_here("plan", *cache_options(fashion, teacher, copy)) == 0
    out = capsys.readouterr().out
    assert "1,201" in out and "caching pays" in out and contents(copy) == before
    manifest = Manifest.load(topk, "")
    assert store_size(manifest) == size_and_files(topk)
    with pytest.raises(UserError, match=r"codec\.name dense, this command has topk"):
        store_here("plan", *cache_options(fashion, teacher, copy, "--codec", "topk", "--k", 4))


def test_what_does_not_fit_on_the_disk_is_refused_before_it_is_begun(fashion, teacher, tmp_path, monkeypatch, capsys):
    full = shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    words = cache_options(fashion, teacher, tmp_path / "store")
    with pytest.raises(UserError, match=r"needs 1[0-9]{2} kB more, the disk has 100 kB free: make room"):
        cache_here(*words)
    assert store_here("plan", *words) == 1
    assert "it does not fit" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_plan_shows_what_codecs_would_keep(fashion, teacher, tmp_path, monkeypatch, capsys):
    words = cache_options(fashion, teacher, tmp_path / "planned", "--views", 1)
    assert store_here("plan", *words, "--json") == 0
    assert json.loads(capsys.readouterr().out)["choices"] == []  # ten classes: dense is the smallest
    monkeypatch.setattr(plan, "DENSE_PAYS", 5)
    assert store_here("plan", *words, "--json", "--trial_seconds", 20, "--codec", "transform", "--bytes", 6) == 0
    choices = json.loads(capsys.readouterr().out)["choices"]
    sizes = [(each["keeps"]["codec"]["name"], each["keeps"]["bytes"]) for each in choices]
    assert sizes == [("dense", 20), *(("transform", size) for size in (6, 16, 28, 54)), ("topk", 52)]
    lost = {each["keeps"]["bytes"]: each["keeps"]["lost"]["4"] for each in choices}
    assert 1 > lost[6] > lost[16] and max(lost[size] for size in (16, 20, 28, 54)) < 1e-3
    assert all(each["store_bytes"] > 3 * 1201 * each["keeps"]["bytes"] for each in choices)
    assert store_here("plan", *words, "--trial_seconds", 1e-6) == 0
    assert "--trial_seconds 1" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())


def test_info_tells_what_is_there(copy, topk, capsys):
    next(copy.glob("epoch_0002/*1/*1200.npy")).unlink()
    assert store_here("info", copy, "--json") == 0
    whole = json.loads(capsys.readouterr().out)
    assert [member["written"] for member in whole["checkpoints"]] == [VIEWS * 5, VIEWS * 5 - 1, VIEWS * 5]
    assert store_here("info", topk) == 0
    out = capsys.readouterr().out
    assert "topk, k 4" in out and "10 of 10" in out


# ------------------------------------------------------------------------------------------- verify, repair


def damage(store):
    """Bad shards: a flipped bit, a missing JSON, a missing file; a folder and a FIFO in the place of files, a file in
    that of a folder."""
    bad = [
        store / "epoch_0001" / "view_0000" / "samples_00000500-00000749.npy",
        store / "epoch_0002" / "view_0001" / "samples_00000000-00000249.json",
        store / "epoch_0003" / "view_0001" / "samples_00001000-00001200.npy",
    ]
    content = bytearray(bad[0].read_bytes())
    content[-1] ^= 1
    bad[0].write_bytes(content)
    bad[1].unlink()
    bad[2].unlink()
    folder = bad[2].with_name("samples_00000250-00000499.json")
    folder.unlink()
    (folder / "notes").mkdir(parents=True)
    fifo = bad[2].with_name("samples_00000500-00000749.npy")
    fifo.unlink()
    os.mkfifo(fifo)
    view = store / "epoch_0002" / "view_0000"
    shutil.rmtree(view)
    view.touch()
    return [
        f"{bad[0]} does not match its checksum",
        *(f"{view}/samples_{i:08d}-{min(i + 249, 1200):08d}.json cannot be read" for i in range(0, 1201, 250)),
        f"{bad[1]} is missing",
        f"{folder} is not a regular file",
        f"{fifo} is not a regular file",
        f"{bad[2]} is missing",
    ]


def test_verify_names_every_bad_shard_and_repair_mends_them_and_nothing_else(copy, store, fashion, teacher):
    assert "30 of 30 shards are good" in run("ckd_dist.store", "verify", copy).stdout
    expected = damage(copy)
    times = {path: path.stat().st_mtime_ns for path in copy.rglob("*.npy")}
    found = json.loads(run("ckd_dist.store", "verify", copy, "--json", status=1).stdout)
    assert found["shards"] == 30
    assert [line.removesuffix(" (Not a directory)") for line in found["bad"]] == expected
    mend = ["repair", copy, "--teacher.run", teacher, "--data.train", fashion["train"], "--data.batch_size", 64]
    out = run("ckd_dist.store", *mend, nproc=2).stdout
    assert all(line in out for line in expected) and "2402 records" in out.replace(",", "")
    assert contents(copy) == contents(store)
    assert sum(path.stat().st_mtime_ns != times.get(path) for path in copy.rglob("*.npy")) == 10
    assert store_here(*mend) == 0
    assert contents(copy) == contents(store)


@pytest.mark.parametrize("codec", [(), ("--codec", "topk", "--k", 4), ("--codec", "sampled", "--k", 5)])
def test_verify_with_the_teacher_finds_records_of_other_images(from_dense, copy, fashion, teacher, codec, capsys):
    store = from_dense(*codec) if codec else copy
    with_teacher = ["verify", store, "--teacher.run", teacher, "--data.train", fashion["train"], "--records", 60]
    assert store_here(*with_teacher) == 0
    assert "180 of 180 records are the teacher's, within 0.1" in capsys.readouterr().out
    # A caching that mixed up its images writes shards with good checksums.
    manifest = Manifest.load(store, "")
    for shard in manifest.checkpoint_shards("epoch_0002"):
        records = np.load(shard.path(store)).reshape(shard.count, -1).view(np.uint8)
        make_room(store, shard)
        writer = ShardWriter(store, shard, manifest)
        writer.append(np.roll(records, 1, axis=0))
        writer.commit()
    assert store_here("verify", store) == 0
    assert store_here(*with_teacher, "--json") == 1
    off = json.loads(capsys.readouterr().out.split("\n", 1)[1])["off"]
    assert len(off) >= 30 and all(where.startswith("epoch_0002, view ") for where, _ in off)


def test_another_run_or_other_images_cannot_verify_or_repair_a_store(copy, store, fashion, teacher, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(teacher, other)
    shutil.copy(other / "checkpoints" / "epoch_0003.pt", other / "checkpoints" / "epoch_0001.pt")
    damage(copy)
    before = contents(copy)
    for images, run_dir, expected in (
        ("train", other, r"teacher\.run: .*epoch_0001\.pt has weights .*, the store's epoch_0001 is of weights"),
        ("holdout", teacher, r"STORE: .* is of images with content_hash"),
    ):
        words = ["--teacher.run", run_dir, "--data.train", fashion[images]]
        with pytest.raises(UserError, match=expected):
            store_here("repair", copy, *words)
        with pytest.raises(UserError, match=expected):
            store_here("verify", store, *words)
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["verify", "STORE/epoch_0001"], "error: STORE: .* is not a logit store"),
        (["verify", "STORE", "--teacher.run", "x"], "--teacher.run needs the images: give --data.train too"),
        (["repair", "STORE"], "the following arguments are required: --teacher.run, --data.train"),
        (["convert", "STORE", "NEW", "--codec", "topk", "--data.train", "X"], "k goes with --codec topk"),
        (["delete", "STORE"], "invalid choice: 'delete'"),
        (["plan", "--stroe", "x"], "unknown option --stroe; did you mean --store?"),
    ],
)
def test_bad_command_lines_are_refused_in_one_line(store, words, expected):
    done = run("ckd_dist.store", *[word.replace("STORE", str(store)) for word in words], status=2)
    assert re.search(expected, done.stderr), done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------- convert


def test_a_converted_store_is_the_cached_one_but_for_the_order_of_equal_logits(topk, from_dense):
    path = from_dense("--codec", "topk", "--k", 4)
    converted, cached = Manifest.load(path, ""), Manifest.load(topk, "")
    assert converted == replace(cached, paths=converted.paths)
    assert converted.paths.keys() == {"STORE", "data.train"} and cached.paths.keys() == {"teacher.run", "data.train"}
    same, records = 0, 0
    for shard in topk.rglob("*.npy"):
        a, b = np.load(shard), np.load(path / shard.relative_to(topk))
        for field in ("logits", "log_sum_exp", "mean", "std"):
            np.testing.assert_array_equal(a[field], b[field])
        same, records = same + (a["classes"] == b["classes"]).all(1).sum(), records + len(a)
    assert same > 0.98 * records
    before = contents(path)
    assert from_dense("--codec", "topk", "--k", 4) == path  # a second time there is nothing left to do
    assert contents(path) == before


def test_converts_may_run_at_once_and_in_several_processes(store, fashion, from_dense, tmp_path):
    whole = from_dense("--codec", "topk", "--k", 4)
    words = ["--data.train", fashion["train"], "--codec", "topk", "--k", 4]
    run("ckd_dist.store", "convert", store, tmp_path / "shared", *words, nproc=2)
    assert contents(tmp_path / "shared") == contents(whole)
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=store_here, args=("convert", store, tmp_path / "both", *words)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert contents(tmp_path / "both") == contents(whole)


def test_bfloat16_halves_the_digits_not_the_range(store, from_dense):
    path = from_dense("--codec", "dense", "--dtype", "bfloat16")
    name = "epoch_0003/view_0001/samples_00000250-00000499.npy"
    bits = np.load(path / name)
    assert bits.dtype == np.uint16
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_allclose(values, np.load(store / name).astype(np.float32), rtol=2**-8)


def test_convert_refuses_what_it_cannot_do(store, topk, fashion, tmp_path):
    for words, expected in (
        ((topk, "--codec", "sampled", "--k", 4), "has codec topk, convert reads dense stores only"),
        ((store, "--codec", "dense"), "already: choose another codec"),
        ((store, "--codec", "topk", "--k", 11), "k is 11, the images have 10 classes"),
    ):
        source, *codec = words
        with pytest.raises(UserError, match=expected):
            store_here("convert", source, tmp_path / "new", "--data.train", fashion["train"], *codec)
    assert not (tmp_path / "new").exists()

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
import torch

from ckd_dist import distill
from ckd_dist.core.errors import UserError
from ckd_dist.core.options import load_config
from ckd_dist.data import dataset
from ckd_dist.data.options import LoaderConfig
from ckd_dist.search import trials
from ckd_dist.search.options import SearchConfig
from ckd_dist.store import verify
from ckd_dist.store.manifest import Manifest
from ckd_dist.store.writer import ShardWriter, make_room, store_size
from ckd_dist.train.options import DistillConfig
from tests.helpers.commands import run
from tests.helpers.here import cache_here, store_here
from tests.helpers.stores import VIEWS, cache_options, contents


def size_and_files(folder):
    sizes = [path.stat().st_size for path in folder.rglob("[!.]*") if path.is_file()]
    return sum(sizes), len(sizes)


@pytest.fixture
def from_dense(store, fashion, tmp_path):
    def convert(*codec):
        path = tmp_path / "converted"
        assert store_here("convert", store, path, "--data.train", fashion["train"], *codec) == 0
        return path

    return convert


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
        (["verify", "STORE", "--teacher.run", "x"], "--teacher.run and --data.train go together"),
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


# ------------------------------------------------------------------------------------------- students


def distill_here(fashion, run_dir, store, *more):
    images = ["--data.train", fashion["train"], "--data.val", fashion["holdout"], "--data.batch_size", 64]
    model = ["--model.name", "resnet8", "--epochs", 2, "--optim.lr", 0.05, "--log_every", 1]
    words = [*images, *model, "--teacher.store", store, "--run_dir", run_dir, *more]
    distill.main(load_config(DistillConfig, [str(word) for word in words]))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "train"]


def test_views_belong_to_a_checkpoint(copy, store, fashion, teacher, tmp_path, capsys):
    cache_here(*cache_options(fashion, teacher, copy, "--teacher.checkpoints", "[3]", "--views", 3))
    assert store_here("verify", copy) == 0 and store_here("info", copy, "--json") == 0
    out = capsys.readouterr().out
    assert "35 of 35 shards are good" in out
    assert [each["views"] for each in json.loads(out[out.index("\n{") :])["checkpoints"]] == [2, 2, 3]
    few = ["--teacher.checkpoints", "[2]", "--epochs", 1]
    extended, before = (distill_here(fashion, tmp_path / of.parent.name, of, *few) for of in (copy, store))
    assert [line["loss"] for line in extended] == [line["loss"] for line in before]
    for names, views, fewest in (
        ("[2]", 3, "2 views of epoch 2"),
        ("[3,1]", 3, "2 views of epoch 1"),
        ("[3]", 4, "3 v"),
    ):
        more = ["--teacher.checkpoints", names, "--data.views", views]
        with pytest.raises(UserError, match=rf"data\.views is {views}, .* holds {fewest}"):
            distill_here(fashion, tmp_path / "none", copy, *more)
    searched = ["--data.train", fashion["train"], "--data.val", fashion["holdout"], "--model.name", "resnet8"]
    searched += ["--teacher.store", copy, "--run_dir", tmp_path / "search", "--grid.teachers"]
    for teachers, views in (("[[3]]", 3), ("[[3],[],[1,3]]", 2)):
        config = load_config(SearchConfig, [str(word) for word in [*searched, teachers]])
        assert {trial.config.data.views for trial in trials.prepare(config).trials} == {views}
    # While views are being added, those that were there go on teaching.
    shutil.rmtree(copy / "epoch_0003" / "view_0002")
    assert distill_here(fashion, tmp_path / "meanwhile", copy, "--data.views", 2, "--epochs", 1)
    with pytest.raises(UserError, match=r"view_0002/.* is missing"):
        distill_here(fashion, tmp_path / "none", copy)
    mend = ["repair", copy, "--teacher.run", teacher, "--data.train", fashion["train"], "--data.batch_size", 64]
    assert store_here(*mend) == 0 and store_here("verify", copy) == 0
    words = ["--data.train", fashion["train"], "--codec", "topk", "--k", 4]
    assert store_here("convert", copy, tmp_path / "topk", *words) == 0
    assert len(list((tmp_path / "topk").rglob("*.npy"))) == 35


@pytest.mark.parametrize("loss", ["kd", "standardized"])
def test_a_student_of_topk_is_that_of_dense_within_the_codecs_error(store, topk, fashion, tmp_path, loss, capsys):
    more = ["--kd.loss", loss, "--kd.temperature", 4]
    dense = distill_here(fashion, tmp_path / "dense", store, *more)
    capsys.readouterr()
    sparse = distill_here(fashion, tmp_path / "topk", topk, *more)
    assert "warning" not in capsys.readouterr().out
    assert dense[0]["ce"] == sparse[0]["ce"]  # the same images
    # The six classes left out count as one, so the divergence is smaller, not larger.
    assert 0.4 * dense[0]["kd"] < sparse[0]["kd"] < 1.02 * dense[0]["kd"]
    assert sparse[-1]["kd"] < 0.8 * sparse[0]["kd"] and sparse[-1]["top1"] > 20


def test_a_temperature_at_which_topk_kept_little_is_said(topk, fashion, tmp_path, capsys):
    distill_here(fashion, tmp_path / "run", topk, "--kd.temperature", 100, "--epochs", 1)
    assert "warning: at kd.temperature 100 the 4 classes kept hold 4" in capsys.readouterr().out


def test_a_student_learns_from_sampled_classes(from_dense, fashion, tmp_path):
    store = from_dense("--codec", "sampled", "--k", 3, "--sample_temperature", 2)
    lines = distill_here(fashion, tmp_path / "run", store, "--kd.temperature", 2)
    assert lines[-1]["kd"] < 0.9 * lines[0]["kd"] and lines[-1]["top1"] > 20


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            ["--kd.loss", "mse"],
            "kd.loss mse needs the logits of all 10 classes, and 4 are kept; a store of codec dense can",
        ),
        (["--kd.loss", "dist"], "a store of codec dense can serve it"),
        (["--kd.loss", "standardized", "--teacher.checkpoints", "[1,3]"], "a store of codec dense can serve it"),
    ],
)
def test_a_loss_that_the_store_cannot_serve_is_refused_before_the_first_step(topk, fashion, tmp_path, more, expected):
    with pytest.raises(UserError, match=f"teacher.store: its codec is topk: .*{expected}"):
        distill_here(fashion, tmp_path / "run", topk, *more)
    assert not (tmp_path / "run").exists()


def test_checkpoints_teach_one_after_another(store, fashion, tmp_path, capsys):
    order = ["--teacher.checkpoints", "[3,1]", "--teacher.combine", "sequence"]
    sequence = distill_here(fashion, tmp_path / "sequence", store, *order)
    assert "teachers in sequence: epochs 3, 1" in capsys.readouterr().out
    first = distill_here(fashion, tmp_path / "first", store, "--teacher.checkpoints", "[3]")
    steps = len(first) // 2
    assert [line["loss"] for line in sequence[:steps]] == [line["loss"] for line in first[:steps]]
    assert sequence[steps]["loss"] != first[steps]["loss"] and sequence[steps]["ce"] == first[steps]["ce"]
    more = ["--teacher.checkpoints", "[1,2,3]", "--teacher.combine", "sequence"]
    with pytest.raises(UserError, match=r"3 checkpoints cannot all have a share of 2 epochs"):
        distill_here(fashion, tmp_path / "short", store, *more)


def test_cached_and_online_ensembles_by_probability_and_weight_are_the_same(store, teacher, fashion, tmp_path):
    mix = ["--teacher.checkpoints", "[1,3]", "--teacher.combine", "probabilities", "--teacher.weights", "[3,1]"]
    cached = distill_here(fashion, tmp_path / "cached", store, *mix, "--epochs", 1)
    online = ["--teacher.store", "null", "--teacher.run", teacher, "--data.views", VIEWS]
    online = distill_here(fashion, tmp_path / "online", store, *mix, *online, "--epochs", 1)
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(cached, online, strict=True)) < 2e-3
    plain = distill_here(fashion, tmp_path / "plain", store, *mix[:2], "--epochs", 1)
    assert plain[0]["kd"] != cached[0]["kd"]


def test_images_that_decode_differently_are_noticed_and_said(copy, fashion, teacher, tmp_path, capsys):
    manifest = Manifest.load(copy, "")
    assert len(manifest.images) == 4 and set(manifest.images) == {"0", "400", "800", "1200"}
    manifest.images["400"] = "0" * 64
    manifest.save(copy)
    distill_here(fashion, tmp_path / "run", copy, "--epochs", 1)
    said = "warning: image 400 decodes here to other pixels than when the store was written"
    assert capsys.readouterr().out.count(said) == 1
    cache_here(*cache_options(fashion, teacher, copy))
    assert capsys.readouterr().out.count(said) == 1
    info = dataset.read_info(fashion["train"], "")
    assert verify.recompute(copy, info, str(teacher), manifest.members, LoaderConfig(), torch.device("cpu"), 8) == []
    assert capsys.readouterr().out.count(said) == 1

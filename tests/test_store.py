"""The logit store: the same bytes whoever writes it and however often that is interrupted; nothing wrong is read."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import VIEWS, cache_options, command_line, contents, kill_and_repeat, run

from ckd_dist import cache_logits, data, engine, models
from ckd_dist.config import CacheConfig, KDConfig, UserError, load_config
from ckd_dist.store import codecs
from ckd_dist.store.reader import StoreReader

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


def test_records_are_the_teachers_answers_to_the_students_images(store, fashion, teacher):
    info = data.read_info(fashion["train"], "")
    model, _ = models.load_model(teacher / "checkpoints" / "epoch_0002.pt", "")
    recipe = data.train_recipe(load_config(CacheConfig, cache_options(fashion, teacher, store)).data, info)
    ids = np.random.default_rng(0).permutation(info.count)[:333]
    from ckd_dist.config import LoaderConfig

    loader = data.BetonLoader(info, LoaderConfig(), recipe, batch_size=50, image_size=28, device=CPU)
    for view in range(VIEWS):
        for batch in loader.batches(ids, view, lambda ids, view: records(store, fashion, [2], ids, view)):
            answers = engine.forward_logits(engine.to_device(model, CPU), batch.images, "bfloat16")
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
    kill_and_repeat(command, lambda: len(list(path.glob("epoch_*/view_*/*.npy"))), kills=[0, 1, 6, 12, 18, 24], seed=2)
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
    cache_here(*few)
    assert contents(path) == contents(store)
    capsys.readouterr()
    cache_here(*few)
    assert "9006 of 7206" not in capsys.readouterr().out  # nothing left to write
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
        (["--amp", "off"], r"forward\.amp bfloat16, this command has off"),
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


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda shard: flip_bit(shard), "does not match its checksum"),
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-7]), "does not match its checksum"),
        (lambda shard: shard.unlink(), "is missing"),
        (lambda shard: shard.with_suffix(".json").unlink(), "is missing"),
        (lambda shard: shard.with_suffix(".json").write_text("{"), "is damaged"),
        (lambda shard: shutil.copy(next(shard.parent.glob("*1200.npy")), shard), "does not match its checksum"),
        (lambda shard: [shutil.copy(p, shard.parent) for p in shard.parent.parent.glob("view_0000/*")], "has view 0"),
    ],
    ids=["flipped bit", "truncated", "missing", "no sidecar", "bad sidecar", "another shard", "another view"],
)  # fmt: skip
def test_a_damaged_store_is_refused_by_the_name_of_the_file(copy, fashion, damage, expected):
    damage(copy / "epoch_0003" / "view_0001" / "samples_00000250-00000499.npy")
    with pytest.raises(
        UserError, match=rf"teacher\.store: .*view_0001.*{expected}.*run python -m ckd_dist.store repair"
    ):
        rows(copy, fashion, [3], [0], 0)
    rows(copy, fashion, [2], [0], 0)  # the other checkpoints are good


def test_verify_names_every_bad_shard_and_the_next_caching_mends_what_was_deleted(copy, store, fashion, teacher):
    whole = json.loads(run("ckd_dist.store", "info", copy, "--json").stdout)
    assert [member["written"] for member in whole["checkpoints"]] == [VIEWS * 5] * 3
    assert "30 of 30 shards are good" in run("ckd_dist.store", "verify", copy).stdout
    bad = [
        copy / "epoch_0001" / "view_0000" / "samples_00000500-00000749.npy",
        next(copy.glob("epoch_0003/*1/*1200.npy")),
    ]
    flip_bit(bad[0])
    bad[1].unlink()
    found = json.loads(run("ckd_dist.store", "verify", copy, "--json", status=1).stdout)
    assert found == {"shards": 30, "bad": [f"{bad[0]} does not match its checksum", f"{bad[1]} is missing"]}
    bad[0].unlink()
    cache_here(*cache_options(fashion, teacher, copy))
    assert contents(copy) == contents(store)
    refused = run("ckd_dist.store", "verify", copy / "epoch_0001", status=2)
    assert refused.stderr.startswith("error: STORE: ") and refused.stderr.count("\n") == 1


def test_a_damaged_manifest_is_refused(copy, fashion):
    manifest = copy / "manifest.json"
    values = json.loads(manifest.read_text())
    for text, expected in (
        ("{", "is damaged"),
        (json.dumps({**values, "format": 2}), "has format 2, this version reads 1"),
        (json.dumps({**values, "view_seed": 9}), "has identity"),
        (json.dumps({k: v for k, v in values.items() if k != "recipe"}), "is damaged"),
    ):
        manifest.write_text(text)
        with pytest.raises(UserError, match=expected):
            rows(copy, fashion, [3], [0], 0)


def test_a_full_disk_ends_with_one_line_and_the_next_run_completes(store, fashion, teacher, tmp_path):
    import subprocess

    from conftest import ENVIRONMENT, ROOT

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

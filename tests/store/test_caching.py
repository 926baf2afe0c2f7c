"""Caching logits: the same bytes whoever writes them, in one go or in many."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import xxhash

from ckd_dist.core.errors import TrainingError
from ckd_dist.store import manifest as manifests
from ckd_dist.store.__main__ import main as store_command
from ckd_dist.store.background import BackgroundWriter
from ckd_dist.store.manifest import Manifest
from ckd_dist.store.writer import ShardWriter
from tests.helpers.commands import ROOT, run
from tests.helpers.here import cache_here
from tests.helpers.stores import VIEWS, cache_options, contents

CPU = torch.device("cpu")


def test_the_store_is_complete_and_any_tool_reads_it(store):
    shards = sorted(store.glob("epoch_*/view_*/*.npy"))
    assert len(shards) == 3 * VIEWS * 5
    arrays = [np.load(path) for path in shards[:5]]
    assert [len(array) for array in arrays] == [250, 250, 250, 250, 201]
    assert all(array.dtype == np.float16 and array.shape[1] == 10 for array in arrays)
    for path in shards:
        sidecar = json.loads(path.with_suffix(".json").read_text())
        assert sidecar["xxh3_128"] == xxhash.xxh3_128_hexdigest(path.read_bytes())
        samples = f"samples_{sidecar['first']:08d}-{sidecar['last']:08d}.npy"
        assert path.parts[-3:] == (sidecar["checkpoint"], f"view_{sidecar['view']:04d}", samples)


@pytest.mark.parametrize("device", ["cpu", "cuda"])  # in whose way: the thread needs no GPU
def test_records_reach_the_disk_in_order_and_bad_logits_do_not(device, store, tmp_path):
    manifest = Manifest.load(store, "")
    shard = manifest.shards(next(iter(manifest.checkpoints)), 0)[0]
    logits = torch.from_numpy(np.load(shard.path(store))).float()

    def write(logits):
        with BackgroundWriter(torch.device(device)) as disk:
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


def test_ranks_wait_for_the_last_one_however_long_it_takes(store):
    run(str(ROOT / "tests" / "programs" / "uneven_ranks.py"), store, nproc=2)

"""A store of two runs is verified and repaired run by run."""

from __future__ import annotations

import shutil

import pytest

from ckd_dist.core.errors import UserError
from ckd_dist.store.manifest import Manifest
from tests.helpers.here import store_here


def test_a_store_of_two_runs_is_verified_and_repaired_run_by_run(fashion, teacher, two_runs, tmp_path, capsys):
    store = shutil.copytree(two_runs, tmp_path / "store")
    manifest = Manifest.load(store, "")
    assert list(manifest.members) == [1, 2, 3, "other/1"]
    shard = manifest.shards("other/epoch_0001", 1)[0]
    before = shard.path(store).read_bytes()
    shard.path(store).unlink()
    base = [store, "--data.train", fashion["train"], "--teacher.run"]
    assert store_here("repair", *base, teacher) == 0
    assert "nothing to repair" in capsys.readouterr().out and not shard.path(store).exists()
    with pytest.raises(UserError, match=r"the store's other/epoch_0001 is of weights"):
        store_here("repair", *base, teacher, "--teacher.name", "other")
    assert store_here("repair", *base, two_runs.parent / "run", "--teacher.name", "other") == 0
    assert shard.path(store).read_bytes() == before
    words = [*base, two_runs.parent / "run", "--records", 16]
    assert store_here("verify", *words, "--teacher.name", "other") == 0
    assert "16 of 16 records are the teacher's" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"teacher\.name: the store holds no such run; named runs are other"):
        store_here("verify", *words, "--teacher.name", "third")

"""Reading a store: records are the teacher's answers to the images asked for, and nothing else is read."""

from __future__ import annotations

import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from ckd_dist.bench import storing
from ckd_dist.core.errors import UserError
from ckd_dist.core.options import load_config
from ckd_dist.data import dataset
from ckd_dist.data.loader import BetonLoader
from ckd_dist.nn import forward, models
from ckd_dist.nn.options import KDConfig
from ckd_dist.store.codecs import Dense, targets
from ckd_dist.store.manifest import Manifest
from ckd_dist.store.options import CacheConfig
from ckd_dist.store.reader import StoreReader
from tests.helpers.here import cache_here
from tests.helpers.stores import VIEWS, cache_options, contents
from tests.helpers.views import CPU


def records(store, fashion, epochs, ids, view):
    return StoreReader(str(store), epochs, dataset.read_info(fashion["train"], "")).rows(np.asarray(ids), view)


def rows(store, fashion, epochs, ids, view):
    """Logits of one checkpoint of a dense store."""
    return records(store, fashion, epochs, ids, view)[:, 0].copy().view(np.float16).astype(np.float32)


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
            cached = Dense(10).decode(batch.teacher_records[:, 0], 1.0)
            torch.testing.assert_close(cached, answers.half().float(), rtol=2e-3, atol=2e-3)


def test_an_ensemble_is_the_mean_of_its_members_and_the_default_is_the_last(store, fashion):
    ids = [5, 1200, 3, 700, 5]
    single = {epoch: rows(store, fashion, [epoch], ids, 1) for epoch in (1, 2, 3)}
    both = torch.from_numpy(records(store, fashion, [1, 3], ids, 1))
    for kd, combine, expected in (
        (KDConfig(), "logits", (single[1] + single[3]) / 2),
        (KDConfig(loss="mse"), "logits", (single[1] + single[3]) / 2),
    ):
        mean = targets.teacher_logits([Dense(10)] * 2, both, kd, combine=combine)
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
    rows = reader.rows(np.arange(100), 1)
    assert vars(pickle.loads(pickle.dumps(reader)))["_mapped"] == {}  # nothing of this process's memory
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(reader)).rows(np.arange(100), 1), rows)


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


@pytest.mark.slow
def test_a_store_of_imagenets_size_is_written_verified_and_read(tmp_path):
    rows = storing.measure_reading(tmp_path / "store", storing.IMAGENET)  # compares every row that it reads
    assert "2.56 GB" in rows[0].case
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 12e9

"""A view is a pure function of (seed, view, sample): the promise that everything else stands on."""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from numba.core import event
from torchvision.transforms import RandomResizedCrop

from ckd_dist import data
from ckd_dist.config import LoaderConfig, UserError
from ckd_dist.views import ViewRecipe, view

CPU = torch.device("cpu")
RRC = ViewRecipe(kind="random_resized_crop")
PAD = ViewRecipe(kind="pad_crop")


def loader(path, recipe, size, *, batch_size=32, seed=0, **options):
    info = data.read_info(path, "data.train")
    config = LoaderConfig(**options)
    return data.BetonLoader(info, config, recipe, batch_size=batch_size, image_size=size, device=CPU, view_seed=seed)


def digests(beton_loader, ids, view_id):
    return {
        int(sample): hashlib.sha256(image.numpy().tobytes()).hexdigest()
        for batch in beton_loader.batches(ids, view_id)
        for sample, image in zip(batch.ids, batch.images, strict=True)
    }


@pytest.mark.parametrize(("name", "recipe", "size"), [("photographs", RRC, 48), ("fashion", PAD, 40)])
def test_bytes_do_not_depend_on_batch_size_workers_order_or_cache(name, recipe, size, request):
    path = request.getfixturevalue(name)
    path = path if isinstance(path, Path) else path["train"]
    count = data.read_info(path, "data.train").count
    first = None
    for batch_size, workers, os_cache in ((1, 2, True), (7, 1, False), (64, 2, False), (50, 1, True)):
        beton_loader = loader(path, recipe, size, batch_size=batch_size, workers=workers, os_cache=os_cache)
        for ids, view_id in itertools.product((np.arange(count), data.shuffled_ids(count, batch_size, 1)), (0, 5)):
            found = {(view_id, i): d for i, d in digests(beton_loader, ids, view_id).items()}
            first = first or {}
            for key, digest in found.items():
                assert first.setdefault(key, digest) == digest, (key, batch_size, workers, os_cache)
    assert len(first) == 2 * count


def test_bytes_do_not_depend_on_world_size(photographs, tmp_path):
    count = data.read_info(photographs, "data.train").count
    alone = digests(loader(photographs, RRC, 48), np.arange(count), 2)
    for world in (2, 3):
        run(str(ROOT / "tests/programs/view_digests.py"), photographs, 48, 2, tmp_path, nproc=world)
        ranks = [json.loads(path.read_text()) for path in sorted(tmp_path.glob(f"{world}_*.json"))]
        assert len(ranks) == world
        assert {int(i): d for part in ranks for i, d in part.items()} == alone


def test_other_views_seeds_and_samples_differ(photographs):
    ids = np.arange(60)
    first = digests(loader(photographs, RRC, 48), ids, 0)
    for seed, view_id in ((0, 1), (1, 0), (1 << 40, 0), (0, 1 << 20)):
        other = digests(loader(photographs, RRC, 48, seed=seed), ids, view_id)
        assert sum(first[i] == other[i] for i in first) == 0, (seed, view_id)
    boxes = {view(RRC, 0, v, s, 500, 400) for v in range(20) for s in range(50)}
    assert len(boxes) == 1000


def test_epochs_do_not_recompile(photographs):
    beton_loader = loader(photographs, RRC, 48)
    digests(beton_loader, np.arange(8), 0)
    with event.install_recorder("numba:compile") as recorder:
        for view_id in range(1, 5):
            digests(beton_loader, np.arange(30), view_id)
    assert recorder.buffer == []


def test_random_resized_crop_draws_as_torchvision_does():
    height, width, n = 375, 500, 20_000
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    drawn = [view(RRC, 1, 0, sample, height, width) for sample in range(n)]
    ours = np.array([box for box, _ in drawn])

    def figures(boxes):
        top, left, h, w = boxes.T.astype(float)
        shares = (
            h * w / (height * width),
            np.log(w / h),
            top / np.maximum(height - h, 1),
            left / np.maximum(width - w, 1),
        )
        return np.array([np.quantile(share, [0.05, 0.25, 0.5, 0.75, 0.95]) for share in shares])

    # The standard error of a quantile of 20,000 draws is at most 0.006 here, and of their difference 0.008.
    np.testing.assert_allclose(figures(ours), figures(theirs), atol=0.03)
    assert (ours[:, 0] >= 0).all() and (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] >= 0).all() and (ours[:, 1] + ours[:, 3] <= width).all()
    assert abs(np.mean([flip for _, flip in drawn]) - 0.5) < 0.02


def test_random_resized_crop_falls_back_to_the_centre_as_torchvision_does():
    narrow = ViewRecipe(kind="random_resized_crop", scale=(1.0, 1.0))
    for height, width in ((40, 400), (400, 40)):
        expected = RandomResizedCrop.get_params(torch.empty(3, height, width), [1.0, 1.0], [3 / 4, 4 / 3])
        assert view(narrow, 0, 0, 0, height, width)[0] == expected


def test_pad_crop_is_the_padded_shifted_mirrored_image(fashion):
    ids = np.arange(400)
    plain = loader(fashion["train"], ViewRecipe(kind="center_crop", flip=0.0), 28)
    padded = loader(fashion["train"], PAD, 28, seed=9)
    offsets = set()
    for original, cropped in zip(plain.batches(ids), padded.batches(ids, 3), strict=True):
        scale, shift = (v.numpy() for v in (plain._scale, plain._shift))
        for sample, before, after in zip(original.ids, original.images.numpy(), cropped.images.numpy(), strict=True):
            (top, left, h, w), flip = view(PAD, 9, 3, int(sample), 28, 28)
            offsets.add((top, left))
            pixels = np.pad(np.rint((before - shift[0]) / scale[0]), ((0, 0), (4, 4), (4, 4)))
            window = pixels[:, top + 4 : top + 4 + h, left + 4 : left + 4 + w]
            np.testing.assert_array_equal(window[..., ::-1] if flip else window, np.rint((after - shift[0]) / scale[0]))
    assert len(offsets) > 70  # of 81


def test_pad_crop_of_images_of_different_sizes_is_refused(photographs):
    from ckd_dist.config import ViewDataConfig

    info = data.read_info(photographs, "data.train")
    with pytest.raises(UserError, match=r"data\.augment pad_crop"):
        data.train_recipe(ViewDataConfig(train=str(photographs), augment="pad_crop"), info)


def test_an_error_in_the_loader_thread_reaches_the_user(photographs):
    def rows(ids, view_id):
        raise RuntimeError("no such row")

    with pytest.raises(RuntimeError, match="no such row"):
        list(loader(photographs, RRC, 48).batches(np.arange(101), 0, rows))


def test_leaving_an_epoch_early_ends_its_thread(photographs):
    beton_loader = loader(photographs, RRC, 48, batch_size=4)
    threads = threading.active_count()
    for _ in range(3):
        batches = beton_loader.batches(np.arange(101))
        next(batches)
        batches.close()
    assert threading.active_count() == threads


def test_a_batch_stays_as_it_is_when_later_ones_come(fashion):
    beton_loader = loader(fashion["train"], PAD, 28, batch_size=16)
    kept = list(beton_loader.batches(np.arange(320)))
    again = [(b.images.clone(), b.labels.clone(), b.ids.clone()) for b in beton_loader.batches(np.arange(320))]
    for batch, (images, labels, ids) in zip(kept, again, strict=True):
        assert torch.equal(batch.images, images) and torch.equal(batch.labels, labels) and torch.equal(batch.ids, ids)
    assert [b.ids.tolist() for b in kept] == [list(range(i, i + 16)) for i in range(0, 320, 16)]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_share_every_global_batch(world, monkeypatch):
    count, batch_size, parts = 103, 10, []
    for rank in range(world):
        monkeypatch.setattr(data.dist, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(data.dist, "world_size", lambda: world)
        share = data.rank_share(batch_size)
        assert share.stop - share.start in (batch_size // world, -(-batch_size // world))
        parts.append(data.train_ids(count, batch_size, 5, 2).reshape(10, -1))
        np.testing.assert_array_equal(
            data.train_ids(count, batch_size, 5, 2, first_step=4).reshape(6, -1), parts[-1][4:]
        )
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), data.shuffled_ids(count, 5, 2)[:100].reshape(10, 10))


@pytest.mark.parametrize(
    ("name", "recipe", "size"), [("photographs", RRC, 48), ("fashion", PAD, 28), ("fashion", PAD, 40)]
)
def test_a_view_decoded_alone_is_that_of_the_loader(name, recipe, size, request):
    path = request.getfixturevalue(name)
    info = data.read_info(path if isinstance(path, Path) else path["train"], "")
    ids = np.array([5, 0, 77, 3])
    (batch,) = loader(info.path, recipe, size, seed=9).batches(ids, 4)
    alone = torch.from_numpy(data.decode_view(info, recipe, 9, 4, ids, size))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (info.mean, info.std))
    torch.testing.assert_close(batch.images, (alone.permute(0, 3, 1, 2) / 255 - mean) / std, rtol=0, atol=1e-5)

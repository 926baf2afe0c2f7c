"""A view is a pure function of (seed, view, sample): the promise that everything else stands on."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numba.core import event
from torchvision.transforms import RandomErasing, RandomResizedCrop
from torchvision.transforms.v2 import functional

from ckd_dist.core.errors import UserError
from ckd_dist.data import dataset
from ckd_dist.data.ffcv_repairs import IMAGE_MODES
from ckd_dist.data.loader import decode_view, read_labels
from ckd_dist.data.order import shuffled_ids
from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.data.views.draws import CONTRAST, SATURATION, beta_quantiles, stream_key, uniform
from ckd_dist.data.views.geometry import view
from ckd_dist.data.views.mixing import mixes
from ckd_dist.data.views.render import render
from tests.helpers.commands import ROOT, run
from tests.helpers.views import EVERYTHING, PAD, RRC, digests, loader


@pytest.mark.parametrize(
    ("name", "recipe", "size"),
    [
        ("photographs", RRC, 48),
        ("photographs", replace(RRC, **EVERYTHING), 48),
        ("fashion", replace(PAD, mixup=1.0), 40),
    ],
)
def test_bytes_do_not_depend_on_batch_size_workers_order_or_cache(name, recipe, size, request):
    path = request.getfixturevalue(name)
    path = path if isinstance(path, Path) else path["train"]
    count = dataset.read_info(path, "data.train").count
    first = None
    for batch_size, workers, os_cache in ((1, 2, True), (7, 1, False), (64, 2, False), (50, 1, True)):
        os_cache = os_cache or recipe.mixes
        beton_loader = loader(path, recipe, size, batch_size=batch_size, workers=workers, os_cache=os_cache)
        for ids, view_id in itertools.product((np.arange(count), shuffled_ids(count, batch_size, 1)), (0, 5)):
            found = {(view_id, i): d for i, d in digests(beton_loader, ids, view_id).items()}
            first = first or {}
            for key, digest in found.items():
                assert first.setdefault(key, digest) == digest, (key, batch_size, workers, os_cache)
    assert len(first) == 2 * count


def test_bytes_do_not_depend_on_world_size(photographs, tmp_path):
    count = dataset.read_info(photographs, "data.train").count
    recipe = replace(RRC, **EVERYTHING)
    alone = digests(loader(photographs, recipe, 48), np.arange(count), 2)
    for world in (2, 3):
        arguments = (photographs, 48, 2, tmp_path, json.dumps(recipe.to_dict()))
        run(str(ROOT / "tests/programs/view_digests.py"), *arguments, nproc=world)
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


def test_neither_epochs_nor_loaders_recompile(photographs):
    beton_loader = loader(photographs, RRC, 48)
    digests(beton_loader, np.arange(8), 0)
    with event.install_recorder("numba:compile") as recorder:
        for view_id in range(1, 5):
            digests(beton_loader, np.arange(30), view_id)
        for recipe, size in ((replace(RRC, **EVERYTHING), 48), (ViewRecipe(kind="center_crop"), 32)):
            digests(loader(photographs, recipe, size), np.arange(30), 0)
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
    from ckd_dist.data.options import ViewDataConfig

    info = dataset.read_info(photographs, "data.train")
    with pytest.raises(UserError, match=r"data\.augment pad_crop"):
        dataset.train_recipe(ViewDataConfig(train=str(photographs), augment="pad_crop"), info)


def shown(recipe, view_id, height, width, size):
    """A view of a raw image of random pixels, uint8 [size, size, 3]."""
    pixels = np.random.default_rng(0).integers(0, 256, height * width * 3, dtype=np.uint8)
    field = np.array([(IMAGE_MODES["raw"], height, width)], [("mode", "u1"), ("height", "u2"), ("width", "u2")])[0]
    return render(lambda sample: (pixels, field), 1, recipe, 0, view_id, 0, size)


@pytest.mark.parametrize(("height", "width", "size"), [(32, 64, 64), (64, 32, 32), (28, 28, 28), (32, 32, 40)])
def test_evaluation_shows_of_a_small_image_what_training_shows(height, width, size):
    info = dataset.DatasetInfo(
        path=Path(), dataset="", split="", count=1, num_classes=1, content_hash="", mean=(0, 0, 0), std=(1, 1, 1),
        min_size=(height, width), max_size=(height, width),
    )  # fmt: skip
    found = shown(dataset.eval_recipe(info, "pad_crop"), 0, height, width, size)
    unmoved = next(n for n in itertools.count() if view(PAD, 0, n, 0, height, width) == ((0, 0, height, width), False))
    np.testing.assert_array_equal(found, shown(PAD, unmoved, height, width, size))
    square = shown(ViewRecipe(kind="center_crop", flip=0.0), 0, height, width, size)
    assert (found == square).all() == (height == width)
    cropped = shown(dataset.eval_recipe(info, "random_resized_crop"), 0, height, width, size)
    np.testing.assert_array_equal(cropped, square)


def decoded(path, recipe, ids, size=48, view_id=1):
    """Views of samples as int64 [n, size, size, 3]."""
    return decode_view(dataset.read_info(path, ""), recipe, 3, view_id, np.asarray(ids), size).astype(np.int64)


def bounds(mask):
    """The smallest box around what is true, as slices."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)) if len(rows) else (slice(0), slice(0))


@pytest.mark.parametrize(("kind", "alpha"), [("mixup", 0.2), ("mixup", 1.0), ("cutmix", 1.0)])
def test_a_mixed_view_is_made_of_the_views_of_two_samples(photographs, kind, alpha):
    info = dataset.read_info(photographs, "")
    single = replace(RRC, color_jitter=0.4, erase=0.5)
    recipe, ids = replace(single, **{kind: alpha}), np.arange(60)
    others, weights, _ = mixes(recipe, 3, 1, ids, info.count)
    assert len(set(others)) > 40 and others.min() >= 0 and others.max() < info.count
    own, theirs, close = decoded(photographs, single, ids), decoded(photographs, single, others), []
    for image, a, b, weight in zip(decoded(photographs, recipe, ids), own, theirs, weights, strict=True):
        if kind == "mixup":
            w = round(256 * weight)
            np.testing.assert_array_equal(image, (w * a + (256 - w) * b + 128) >> 8)
        else:
            pasted = (image != a).any(axis=2)
            box = bounds(pasted)
            assert (image[box] == b[box]).all()
            # Its edges are rounded to whole pixels, or may fall on some that are equal in both images.
            assert pasted.sum() / 48**2 < 1 - weight + 0.05
            if pasted.mean() > 0.02:
                close.append(image[box].size / image.size > 1 - weight - 0.05)
    assert kind == "mixup" or np.mean(close) > 0.9
    (batch,) = loader(photographs, recipe, 48, seed=3, batch_size=64).batches(ids, 1)
    np.testing.assert_array_equal(batch.mixed.labels, read_labels(info)[others])
    np.testing.assert_array_equal(batch.mixed.weights, weights)
    answers = torch.from_numpy(read_labels(info)[others])
    expected = 100 * (1 - batch.mixed.weights + batch.mixed.weights * (answers == batch.labels))
    torch.testing.assert_close(batch.top1(answers), expected)


def test_weights_of_mixing_are_drawn_from_beta():
    for alpha in (0.2, 1.0, 2.0):
        quantiles, drawn = beta_quantiles(alpha) / 256, torch.distributions.Beta(alpha, alpha).sample((100_000,))
        at = np.linspace(0.05, 0.95, 19)
        np.testing.assert_allclose(np.quantile(quantiles, at), np.quantile(drawn.numpy(), at), atol=0.01)
    ids, both = np.arange(100_000), replace(RRC, mixup=1.0, cutmix=1.0)
    others, weights, _ = mixes(both, 0, 0, ids, 1000)
    assert np.bincount(others, minlength=1000).min() > 50
    # A box of side r, its centre anywhere, covers r - r^2 / 4 of a side: the mean of its square, r^2 being uniform.
    assert abs(np.mean(weights) - (0.5 + 1 - (0.5 - 0.2 + 1 / 48)) / 2) < 0.005


def test_colours_change_as_torchvision_changes_them(photographs):
    ids, jitter = np.arange(40), replace(RRC, color_jitter=0.6)
    plain, changed = decoded(photographs, RRC, ids), decoded(photographs, jitter, ids)
    for sample, before, after in zip(ids, plain, changed, strict=True):
        key = stream_key(3, 1, int(sample))
        b, c, s = (0.4 + 1.2 * uniform(np.uint64(key), n) for n in (CONTRAST - 1, CONTRAST, SATURATION))
        image = torch.from_numpy(before).byte().permute(2, 0, 1)
        image = functional.adjust_saturation(functional.adjust_contrast(functional.adjust_brightness(image, b), c), s)
        # Ours in float64, theirs in float32: a value that is nearly whole may be rounded down to another one.
        assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - after).max() <= 3
    assert (plain != changed).mean() > 0.9


def test_boxes_are_erased_as_torchvision_erases_them(photographs):
    boxes = []
    for view_id in range(8):
        every = np.arange(101)
        plain = decoded(photographs, RRC, every, view_id=view_id)
        erased = decoded(photographs, replace(RRC, erase=0.75), every, view_id=view_id)
        for before, after in zip(plain, erased, strict=True):
            changed = (before != after).any(axis=2)
            if changed.any():
                box = bounds(changed)
                assert (after[box] == after[box][0, 0]).all() and changed[box].mean() > 0.5
                boxes.append(changed[box].shape)
    assert abs(len(boxes) / (8 * 101) - 0.75) < 0.06
    torch.manual_seed(0)
    theirs = [
        RandomErasing.get_params(torch.empty(3, 48, 48), (0.02, 0.33), (0.3, 3.3), [0.0])[2:4] for _ in range(5000)
    ]
    for ours, expected in ((np.array(boxes), np.array(theirs)),):
        for figure in (lambda x: np.log(x.prod(axis=1)), lambda x: np.log(x[:, 0] / x[:, 1])):
            assert abs(figure(ours).mean() - figure(expected).mean()) < 0.1
            assert abs(figure(ours).std() - figure(expected).std()) < 0.1


def test_a_view_is_the_same_at_every_size(photographs):
    recipe = replace(RRC, **EVERYTHING)
    ids = np.arange(101)
    large, small = decoded(photographs, recipe, ids, 96), decoded(photographs, recipe, ids, 48)
    pooled = large.reshape(101, 48, 2, 48, 2, 3).mean(axis=(2, 4))
    other = decoded(photographs, recipe, ids, 48, view_id=2)
    assert np.abs(pooled - small).mean() < 0.2 * np.abs(pooled - other).mean()
    beton_loader = loader(photographs, recipe, 96, seed=3, batch_size=101)
    (batch,) = beton_loader.batches(ids, 1, image_size=48)
    (again,) = loader(photographs, recipe, 48, seed=3, batch_size=101).batches(ids, 1)
    assert torch.equal(batch.images, again.images)

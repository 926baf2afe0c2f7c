"""What policies draw is what torchvision's draw, and does to an image what torchvision does."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, autoaugment, functional

import ckd_dist
from ckd_dist.data.loader import read_labels
from ckd_dist.data.views import magnitudes
from ckd_dist.data.views.draws import BLUR, BLUR_DEVIATION, GRAYSCALE, SOLARIZE, stream_key, uniform
from ckd_dist.data.views.geometry import view
from ckd_dist.data.views.magnitudes import NAMES, REFERENCE
from ckd_dist.data.views.mixing import mixes
from ckd_dist.data.views.policies import drawn, operate
from tests.helpers.views import PAD, RRC, loader

TABLES = {
    "trivial_augment": autoaugment.TrivialAugmentWide()._augmentation_space(31),
    "rand_augment": autoaugment.RandAugment()._augmentation_space(31, (REFERENCE, REFERENCE)),
    "auto_augment": autoaugment.AutoAugment()._augmentation_space(10, (REFERENCE, REFERENCE)),
}
"""Operation -> strengths, and whether there are two directions, as torchvision has them for views of 224 px."""
SIZE = 32
y, x, c = np.ogrid[:SIZE, :SIZE, :3]
PATTERNS = [((x * (3 + i) + y * (7 * i % 5 + 1) + 40 * c + (x * y >> i % 4)) % 256).astype(np.uint8) for i in range(20)]
"""Images that are the same with every version of every library."""


def images(size):
    """Images uint8 [size, size, 3] of every kind: noise, smooth, dark and of low contrast, of one value, of three."""
    rng = np.random.default_rng(size)
    y, x, c = np.ogrid[:size, :size, :3]
    return [
        rng.integers(0, 256, (size, size, 3), dtype=np.uint8),
        (128 + 60 * (np.sin(x / 5) + np.cos(y / 7 + c))).astype(np.uint8),
        rng.integers(10, 50, (size, size, 3), dtype=np.uint8),
        np.full((size, size, 3), 77, dtype=np.uint8),
        (100 * rng.integers(0, 3, (size, size, 3)) + 5).astype(np.uint8),
    ]


def as_torchvision(image, name, strength):
    """An operation of torchvision's policies: uint8 [size, size, 3]."""
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    return autoaugment._apply_op(tensor, name, strength, InterpolationMode.NEAREST, None).permute(1, 2, 0).numpy()


def blurred(image, deviation, reach):
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    return functional.gaussian_blur(tensor, [2 * reach + 1] * 2, [deviation] * 2).permute(1, 2, 0).numpy()


def changed(image, name, first, second=0.0):
    image = image.copy()
    operate(image, NAMES.index(name), float(first), float(second))
    return image


@pytest.mark.parametrize("policy", TABLES)
def test_tables_are_torchvisions(policy):
    table, checked = magnitudes.magnitudes(policy), 0
    for name, (strengths, _) in TABLES[policy].items():
        ours = table[NAMES.index(name)]
        if strengths.ndim == 0:
            continue
        if name == "Rotate":
            ours = np.rad2deg(np.arctan2(ours[:, 0], ours[:, 1]))
        else:
            ours = ours[:, 0]
        # Ours in float64, theirs in float32.
        np.testing.assert_allclose(ours, strengths.double().numpy(), rtol=1e-6, atol=1e-5, err_msg=name)
        checked += 1
    assert checked == 11
    if policy == "auto_augment":
        theirs = autoaugment.AutoAugment().policies
        ours = [[(NAMES[int(op)], p, int(n)) for op, p, n in pair] for pair in magnitudes.pairs(policy)]
        assert ours == [[(name, p, n or 0) for name, p, n in pair] for pair in theirs]


@pytest.mark.parametrize("policy", ["trivial_augment", "rand_augment"])
@pytest.mark.parametrize("size", [16, 33, 48])
def test_every_operation_is_torchvisions(policy, size):
    table, differing = magnitudes.magnitudes(policy), {}
    for name, (strengths, two_ways) in {**TABLES[policy], "Invert": (torch.tensor(0.0), False)}.items():
        for n in (0, 1, 9, 17, 30) if strengths.ndim else (0,):
            for sign in (1, -1) if two_ways else (1,):
                first, second = table[NAMES.index(name), n]
                # The number itself, not torchvision's, whose last digit differs: near a whole value it would matter.
                strength = float(strengths[n]) if name == "Rotate" else first
                if name.startswith("Translate"):
                    strength = first * size / REFERENCE
                for image in images(size):
                    found = changed(image, name, sign * first, second)
                    expected = as_torchvision(image, name, sign * strength)
                    differing.setdefault(name, []).append((found != expected).any(axis=2).mean())
    # At 30 and 135 degrees some pixels lie half way between two, and float32 decides.
    rotations = differing.pop("Rotate")
    assert max(rotations) < 0.03 and np.mean(rotations) < 0.005
    assert {name: max(shares) for name, shares in differing.items()} == dict.fromkeys(differing, 0.0)
    assert len(differing) == 14


def test_a_blur_is_torchvisions():
    for size in (16, 48):
        for deviation in (0.1, 0.35, 1.0, 1.45, 2.0):
            reach = math.ceil(3 * deviation)
            for image in images(size):
                found = changed(image, "Blur", deviation * REFERENCE / size).astype(int)
                # Sums in another order: what lies half way between two grey levels may be rounded to the other.
                difference = np.abs(found - blurred(image, deviation, reach))
                assert difference.max() <= 1 and (difference > 0).mean() < 0.002
                # Beyond its reach there is so little that a kernel of any size gives the same to a grey level.
                assert np.abs(found - blurred(image, deviation, 11 if size > 16 else 7)).max() <= 1
    assert (changed(PATTERNS[0][:1, :1], "Blur", 2 * REFERENCE) == PATTERNS[0][:1, :1]).all()


def test_a_grey_view_is_torchvisions():
    for image in images(33):
        expected = functional.rgb_to_grayscale(torch.from_numpy(image).permute(2, 0, 1), 3).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(changed(image, "Grayscale", 0), expected)


def near(count, expected, n):
    """Whether a count of n draws is within five standard deviations of its expectation."""
    return abs(count - expected) <= 5 * math.sqrt(max(expected * (1 - expected / n), 1))


def draws_of(policy, n, **more):
    recipe = replace(RRC, policy=policy, **more)
    return [drawn(recipe, 7, 1, sample) for sample in range(n)]


def test_trivial_augment_draws_any_operation_at_any_strength_both_ways():
    n, table = 6000, magnitudes.magnitudes("trivial_augment")
    found = draws_of("trivial_augment", n)
    assert {len(each) for each in found} == {1}
    names = Counter(name for ((name, _, _),) in found)
    assert names.keys() == TABLES["trivial_augment"].keys()
    assert all(near(count, n / 14, n) for count in names.values())
    bins, negative, two_ways = Counter(), 0, 0
    for ((name, first, second),) in found:
        _, signed = TABLES["trivial_augment"][name]
        own = table[NAMES.index(name)]
        assert (abs(first), second) in {(abs(a), b) for a, b in own.tolist()}
        if signed:
            bins[int(np.flatnonzero((own == (abs(first), second)).all(axis=1))[0])] += 1
            negative += first < 0
            two_ways += first != 0
        else:
            assert first >= 0
    assert len(bins) == 31 and all(near(count, bins.total() / 31, bins.total()) for count in bins.values())
    assert near(negative, two_ways / 2, two_ways)


def test_rand_augment_draws_so_many_operations_at_one_strength():
    n, table = 3000, magnitudes.magnitudes("rand_augment")
    found = draws_of("rand_augment", n, operations=3, magnitude=9)
    assert {len(each) for each in found} == {3}
    for place in range(3):
        names = Counter(each[place][0] for each in found)
        assert names.keys() == TABLES["rand_augment"].keys()
        assert all(near(count, n / 14, n) for count in names.values())
    assert near(sum(a[0] == b[0] for a, b, _ in found), n / 14, n)  # one does not depend on another
    for each in found:
        for name, first, second in each:
            own = table[NAMES.index(name), 9]
            assert (first, second) in {(own[0], own[1]), (-own[0], own[1])}
            assert first == own[0] or TABLES["rand_augment"][name][1]
    signs = [first > 0 for each in found for name, first, _ in each if TABLES["rand_augment"][name][1]]
    assert near(sum(signs), len(signs) / 2, len(signs))
    assert draws_of("rand_augment", 50) == [each[:2] for each in found[:50]]


def test_auto_augment_draws_the_pairs_of_imagenet_as_often_as_they_say():
    n, pairs = 8000, autoaugment.AutoAugment().policies
    found = draws_of("auto_augment", n)
    assert {len(each) for each in found} == {2}
    for place in range(2):
        expected = Counter()
        for pair in pairs:
            expected[pair[place][0]] += n * pair[place][1] / len(pairs)
        expected["Identity"] = n - expected.total()
        names = Counter(each[place][0] for each in found)
        assert {name for name in expected if expected[name]} == names.keys()
        assert all(near(names[name], expected[name], n) for name in names)
    together = sum(p * q for (_, p, _), (_, q, _) in pairs) / len(pairs)
    assert near(sum(a[0] != "Identity" != b[0] for a, b in found), n * together, n)
    sines = {first for each in found for name, first, _ in each if name == "Rotate"}
    expected = {sign * strength * 30 / 9 for sign in (1, -1) for strength in (3, 8, 9)}
    np.testing.assert_allclose(sorted(np.rad2deg(np.arcsin(list(sines)))), sorted(expected))


def test_three_augment_draws_one_of_three():
    n = 3000
    found = [each for (each,) in draws_of("three_augment", n)]
    names = Counter(name for name, _, _ in found)
    assert names.keys() == {"Grayscale", "Solarize", "Blur"} and all(near(k, n / 3, n) for k in names.values())
    assert {first for name, first, _ in found if name == "Solarize"} == {128}
    deviations = np.array([first for name, first, _ in found if name == "Blur"])
    at = np.linspace(0.1, 0.9, 5)
    np.testing.assert_allclose(np.quantile(deviations, at), 0.1 + 1.9 * at, atol=0.12)  # five standard errors
    assert deviations.min() > 0.1 and deviations.max() < 2


def views_of(recipe, seed=11):
    return ckd_dist.Views([(image, i % 7) for i, image in enumerate(PATTERNS)], recipe, seed=seed, size=SIZE)


def shown(views, sample, view_id=0):
    """A view as uint8 [size, size, 3]."""
    return views[view_id, sample]["image"].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("policy", ["trivial_augment", "rand_augment", "auto_augment"])
def test_a_view_is_changed_by_what_is_drawn_for_it(policy):
    recipe = replace(PAD, policy=policy)
    plain, with_policy, moved = views_of(PAD), views_of(recipe), 0
    for view_id in range(3):
        for sample in range(len(PATTERNS)):
            expected = shown(plain, sample, view_id)
            for name, first, second in drawn(recipe, 11, view_id, sample):
                strength = math.degrees(math.atan2(first, second)) if name == "Rotate" else first
                strength *= SIZE / REFERENCE if name.startswith("Translate") else 1
                expected = as_torchvision(np.ascontiguousarray(expected), name, strength)
                moved += name != "Identity"
            found = shown(with_policy, sample, view_id)
            # A pixel that a rotation takes from elsewhere may change a histogram, and so all values by little.
            assert (np.abs(found.astype(int) - expected) > 2).mean() < 0.03
    assert moved > 40


def test_a_view_is_made_grey_then_blurred_then_solarised():
    recipe, plain = replace(PAD, grayscale=0.5, blur=0.5, solarize=0.5), views_of(PAD)
    both, kinds = views_of(recipe), set()
    for view_id in range(4):
        for sample in range(len(PATTERNS)):
            key = np.uint64(stream_key(11, view_id, sample))
            image, kind = (
                shown(plain, sample, view_id).copy(),
                tuple(uniform(key, counter) < 0.5 for counter in (GRAYSCALE, BLUR, SOLARIZE)),
            )
            if kind[0]:
                image = changed(image, "Grayscale", 0)
            if kind[1]:
                image = changed(image, "Blur", 0.1 + 1.9 * uniform(key, BLUR_DEVIATION))
            if kind[2]:
                image = changed(image, "Solarize", 128)
            np.testing.assert_array_equal(shown(both, sample, view_id), image)
            kinds.add(kind)
    assert len(kinds) == 8


def test_a_share_of_the_images_is_mixed_and_others_are_read_once(photographs):
    recipe, ids = replace(RRC, mixup=0.4, cutmix=1.0, mix=0.3), np.arange(5000)
    others, weights, _ = mixes(recipe, 3, 1, ids, 1000)
    always, full, _ = mixes(replace(recipe, mix=1.0), 3, 1, ids, 1000)
    alone = others == ids
    assert near(alone.sum(), 0.7 * len(ids), len(ids))
    assert (weights[alone] == 1).all()
    np.testing.assert_array_equal(others[~alone], always[~alone])
    np.testing.assert_array_equal(weights[~alone], full[~alone])
    few = np.arange(100)
    others, weights, _ = mixes(recipe, 3, 1, few, 101)
    mixed_loader = loader(photographs, recipe, 48, seed=3, batch_size=100)
    labels = read_labels(mixed_loader.info)
    (batch,) = mixed_loader.batches(few, 1)
    (single,) = loader(photographs, replace(recipe, mixup=0.0, cutmix=0.0), 48, seed=3, batch_size=100).batches(few, 1)
    np.testing.assert_array_equal(batch.mixed.labels, labels[others])
    np.testing.assert_array_equal(batch.mixed.weights, weights)
    same = (batch.images == single.images).flatten(1).all(dim=1).numpy()
    assert same[weights == 1].all() and not same[weights < 0.9].any() and 50 < (weights == 1).sum() < 90

    class Counted(list):
        read = 0

        def __getitem__(self, index):
            self.read += 1
            return super().__getitem__(index)

    images, mixed = Counted((image, i % 7) for i, image in enumerate(PATTERNS)), replace(PAD, cutmix=1.0, mix=0.3)
    views = ckd_dist.Views(images, mixed, seed=11, size=SIZE)
    items = [views[0, sample] for sample in range(len(images))]
    others, weights, _ = mixes(mixed, 11, 0, np.arange(len(images)), len(images))
    assert [item["other_label"] for item in items] == [other % 7 for other in others]
    assert [item["weight"] for item in items] == weights.tolist()
    twice = (others != np.arange(len(images))) | (weights < 1)
    assert images.read == len(images) + twice.sum() < 2 * len(images)


OLDER = {
    "8baf0d7dd194e93daf1393ba9b4e9122": {},
    "5c41a123f1c589a844db161aa2d9853d": {"color_jitter": 0.4},
    "0e0dde103356cabe6c479c28d3485079": {"erase": 0.7},
    "d7dd553a5fd7f1ba1d61150791a24877": {"mixup": 0.4},
    "21e03878364b81b2a506dcf5a25cf56c": {"cutmix": 1.0},
    "12dfdb5120ea2270840e8d1c4e2258a7": {"color_jitter": 0.4, "erase": 0.5, "mixup": 0.4, "cutmix": 1.0},
}
"""Digest of the views that a version without policies made -> its recipe. There are stores of these."""


@pytest.mark.parametrize("digest", OLDER)
def test_views_of_older_recipes_are_what_they_were(digest):
    recipe, found = replace(PAD, **OLDER[digest]), hashlib.sha256()
    views = views_of(recipe)
    for view_id in (0, 3):
        for sample in range(len(PATTERNS)):
            item = views[view_id, sample]
            found.update(item["image"].numpy().tobytes())
            if recipe.mixes:
                found.update(f"{item['other_label']} {float(item['weight'])!r}".encode())
    assert found.hexdigest()[:32] == digest


def test_crops_and_partners_of_older_recipes_are_what_they_were():
    boxes = [view(RRC, 5, view_id, sample, 375, 500) for view_id in range(3) for sample in range(200)]
    plain = repr([(tuple(map(int, box)), bool(flip)) for box, flip in boxes])
    assert hashlib.sha256(plain.encode()).hexdigest()[:32] == "77e9fed8d1fcadcb90e3e392d879c1ca"
    others, weights, _ = mixes(replace(RRC, mixup=0.4, cutmix=1.0), 5, 2, np.arange(500), 1000)
    digest = hashlib.sha256(others.tobytes() + weights.tobytes()).hexdigest()
    assert digest[:32] == "b4243fa359b18985f40d791ce8cd157a"

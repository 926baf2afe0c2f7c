"""Who is held out, subsets and shuffled files: the same whatever the other options."""

import hashlib

import numpy as np
import pytest

from data_prep import splits
from data_prep.sources import arrays
from tests.helpers.data_prep import (
    DEBIAN,
    needs_fashion_mnist,
    read,
    read_written,
    write_folder,
)


@needs_fashion_mnist
def test_holdout_takes_its_fraction_of_every_class_and_stays_the_same():
    labels = arrays.read_idx(DEBIAN / "train-labels-idx1-ubyte.gz").astype(np.int64)
    held_out = splits.holdout_indices(labels, 0.1, 10)
    assert np.bincount(labels[held_out]).tolist() == [600] * 10
    assert len(np.unique(held_out)) == 6000
    # Files written by different versions must agree about who is held out: never change this.
    digest = hashlib.sha256(held_out.astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "54a339b4b605536f"


def test_train_and_holdout_share_no_image_and_together_are_the_training_set(tmp_path, photos):
    parts = {}
    for split, options in {"train": [], "holdout": ["--write-mode", "raw", "--workers", 1]}.items():
        write_folder(photos, tmp_path / f"{split}.beton", "--holdout", 0.15, *options, split=split)
        parts[split] = read(tmp_path / f"{split}.beton")
    assert np.bincount(parts["train"].labels).tolist() == [102, 51, 17]
    assert np.bincount(parts["holdout"].labels).tolist() == [18, 9, 3]
    write_folder(photos, tmp_path / "whole.beton", "--holdout", 0, split="train")
    whole = read(tmp_path / "whole.beton")
    assert len(whole.images) == 200

    def keys(part):
        return [(label, image.tobytes()) for image, label in zip(part.images, part.labels, strict=True)]

    assert len(set(keys(whole))) == 200
    assert sorted(keys(parts["train"]) + keys(parts["holdout"])) == sorted(keys(whole))


def test_the_same_images_are_held_out_whatever_the_other_options(tmp_path, photos):
    write_folder(photos, tmp_path / "a.beton", split="holdout")
    write_folder(
        photos,
        tmp_path / "b.beton",
        "--write-mode",
        "jpg",
        "--jpeg-quality",
        95,
        "--workers",
        3,
        split="holdout",
    )
    a, b = read(tmp_path / "a.beton"), read(tmp_path / "b.beton")
    assert a.labels == b.labels and all(b.jpeg) and not any(a.jpeg)
    for raw, jpeg in zip(a.images, b.images, strict=True):
        assert np.abs(raw.astype(int) - jpeg).mean() < 6


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_holdout_is_stratified_to_within_one_image_and_leaves_every_class_one(fraction):
    counts = np.array([1, 2, 3, 7, 50, 333])
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(6), counts))
    taken = np.bincount(labels[splits.holdout_indices(labels, fraction, 6)], minlength=6)
    assert (np.abs(taken - counts * fraction) <= 1).all()
    assert (taken < counts).all()


def test_a_shuffled_file_has_the_same_images_in_an_order_of_its_own(tmp_path, photos):
    plain, shuffled = (
        read_written(photos, tmp_path / f"{n}.beton", *more) for n, more in enumerate(([], ["--shuffle"]))
    )
    again = read_written(photos, tmp_path / "again.beton", "--shuffle", "--workers", 3)
    assert (np.diff(plain.labels) >= 0).all() and (np.diff(shuffled.labels) < 0).sum() > 20
    pairs = [sorted((image.tobytes(), label) for image, label in zip(file.images, file.labels, strict=True))
             for file in (plain, shuffled)]  # fmt: skip
    assert pairs[0] == pairs[1]
    assert [image.tobytes() for image in again.images] == [image.tobytes() for image in shuffled.images]


def test_a_subset_is_balanced_as_far_as_the_classes_reach_and_grows_by_addition(tmp_path, photos):
    write_folder(photos, tmp_path / "a.beton", "--subset", 90)
    write_folder(photos, tmp_path / "b.beton", "--subset", 91)
    a, b = read(tmp_path / "a.beton"), read(tmp_path / "b.beton")
    assert np.bincount(a.labels).tolist() == [35, 35, 20]
    assert np.bincount(b.labels).tolist() == [36, 35, 20]
    assert {image.tobytes() for image in a.images} < {image.tobytes() for image in b.images}
    labels = np.repeat(np.arange(5), 10)
    assert len(splits.balanced_subset(labels, 3, 5)) == 3
    assert splits.balanced_subset(labels, 50, 5).tolist() == list(range(50))

"""Which images a split holds: pure functions of the labels, the same on every machine.

They draw from `np.random.RandomState`, whose streams NumPy has frozen; those of `default_rng` may change
with a release, and a holdout must never leak into the training set because NumPy was upgraded.
"""

import numpy as np
from numpy.typing import NDArray

HOLDOUT_SEED = 20221128
SUBSET_SEED = 20221129
SHUFFLE_SEED = 20221130


def _first_of_each_class(labels: NDArray[np.int64], take: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """The first `take[c]` positions of each class c in a shuffled order of its own, sorted."""
    chosen = [
        np.random.RandomState([seed, c]).permutation(np.flatnonzero(labels == c))[: take[c]] for c in range(len(take))
    ]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def holdout_indices(labels: NDArray[np.int64], fraction: float, num_classes: int) -> NDArray[np.int64]:
    """The part of the training set that is held out, stratified by class.

    Depends on the labels and the fraction only. Its size is `fraction` of the whole, rounded; each class
    gives its own fraction rounded up or down, and keeps at least one image for training. A smaller
    fraction's holdout lies within a larger one's, up to the rounding.

    Args:
        labels: int64 [N], the class of each training image.
        fraction: in [0, 1).
        num_classes: number of classes; every label is below it.

    Returns:
        Sorted int64 indices into `labels`; the rest is the training split.
    """
    counts = np.bincount(labels, minlength=num_classes)
    exact = counts * fraction
    take = np.floor(exact).astype(np.int64)
    # Largest remainder: the total comes out right even where every class is too small to give one image.
    extra = round(float(exact.sum())) - int(take.sum())
    take[np.argsort(take - exact, kind="stable")[:extra]] += 1
    return _first_of_each_class(labels, np.minimum(take, np.maximum(counts - 1, 0)), HOLDOUT_SEED)


def balanced_subset(labels: NDArray[np.int64], size: int, num_classes: int) -> NDArray[np.int64]:
    """`size` positions with equally many images of each class, as far as the classes reach.

    A class with too few images gives all it has and the others make up for it; what does not divide
    evenly goes to the first classes. A smaller subset lies within a larger one.

    Args:
        labels: int64 [N].
        size: number of positions, at most N.
        num_classes: number of classes; every label is below it.

    Returns:
        Sorted int64 positions in `labels`.
    """
    assert 0 < size <= len(labels)
    counts = np.bincount(labels, minlength=num_classes)
    take = np.zeros(num_classes, np.int64)
    while left := size - int(take.sum()):
        unfilled = np.flatnonzero(take < counts)[:left]
        share = left // len(unfilled)
        take[unfilled] += np.minimum(counts[unfilled] - take[unfilled], share)
    return _first_of_each_class(labels, take, SUBSET_SEED)


def shuffled(indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """The `indices`, int64 [N], in a random order that depends on their number only."""
    return np.random.RandomState(SHUFFLE_SEED).permutation(indices)

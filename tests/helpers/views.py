"""Recipes of views, and their images as a loader gives them."""

from __future__ import annotations

import hashlib

import torch

from ckd_dist.data import dataset
from ckd_dist.data.loader import BetonLoader
from ckd_dist.data.options import LoaderConfig
from ckd_dist.data.recipe import ViewRecipe

CPU = torch.device("cpu")
RRC = ViewRecipe(kind="random_resized_crop")
PAD = ViewRecipe(kind="pad_crop")
EVERYTHING = {
    "policy": "rand_augment",
    "operations": 3,
    "magnitude": 11,
    "color_jitter": 0.4,
    "grayscale": 0.3,
    "blur": 0.4,
    "solarize": 0.3,
    "erase": 0.5,
    "mixup": 0.4,
    "cutmix": 1.0,
    "mix": 0.7,
}


def loader(path, recipe, size, *, batch_size=32, seed=0, **options):
    """A loader of a .beton file on the CPU; `options` are those of LoaderConfig."""
    info = dataset.read_info(path, "data.train")
    config = LoaderConfig(**options)
    return BetonLoader(info, config, recipe, batch_size=batch_size, image_size=size, device=CPU, view_seed=seed)


def digests(beton_loader, ids, view_id):
    """sha256 of each image, by its number."""
    return {
        int(sample): hashlib.sha256(image.numpy().tobytes()).hexdigest()
        for batch in beton_loader.batches(ids, view_id)
        for sample, image in zip(batch.ids, batch.images, strict=True)
    }

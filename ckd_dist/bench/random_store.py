"""A store of random logits, in which every record can be told from the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.store.codecs.dense import Dense
from ckd_dist.store.creation import open_store
from ckd_dist.store.manifest import Manifest
from ckd_dist.store.writer import ShardWriter


def write_random_store(path: Path, count: int, classes: int, views: int = 1, block: int = 1024) -> np.ndarray:
    """Write a dense store of one checkpoint, whose views are all alike; returns its logits, float16 [count,
    classes]."""
    manifest = Manifest(
        dataset={"name": "random", "content_hash": "none", "count": count, "num_classes": classes},
        recipe=ViewRecipe(kind="random_resized_crop").to_dict(),
        view_seed=0,
        forward={"image_size": 224, "mean": [0.0] * 3, "std": [1.0] * 3, "amp": "off"},
        codec=Dense(classes).to_dict(),
        shard_size=65536,
        checkpoints={"epoch_0001": {"epoch": 1, "model": "none", "weights_sha256": "none", "views": views}},
        images={},
    )
    open_store(path, manifest)
    every = np.empty((count, classes), dtype=np.float16)
    one = np.random.default_rng(0).normal(size=(block, classes)).astype(np.float16)
    for first in range(0, count, block):  # the same numbers in every block, but for a sample's own in front
        every[first : first + block] = one[: count - first]
    every[:, 0], every[:, 1] = np.arange(count) % 2048, np.arange(count) // 2048
    for shard in manifest.all_shards():
        with ShardWriter(path, shard, manifest) as writer:
            for first in range(shard.first, shard.last + 1, block):
                writer.append(every[first : min(first + block, shard.last + 1)].view(np.uint8))
            writer.commit()
    return every

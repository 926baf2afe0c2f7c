"""Writing a dense store once more with another codec, without the teacher."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ckd_dist.core import dist
from ckd_dist.core.console import ProgressDisplay, say
from ckd_dist.core.errors import require
from ckd_dist.data.beton import open_beton
from ckd_dist.data.loader import read_labels
from ckd_dist.store import bases
from ckd_dist.store.codecs import factory
from ckd_dist.store.creation import create_or_extend
from ckd_dist.store.manifest import Manifest, Shard
from ckd_dist.store.options import CodecConfig
from ckd_dist.store.reader import StoreReader, as_cached
from ckd_dist.store.recording import encode
from ckd_dist.store.writer import ShardWriter, is_written


def describe_converted(store: Path, train_images: str, config: CodecConfig) -> Manifest:
    """The manifest of the dense store `store`, made of the .beton file `train_images`, with the codec of the options;
    raises `UserError` for a store that is not dense, or that has this codec."""
    manifest = Manifest.load(store, "STORE")
    source = manifest.recorded
    require(source.name == "dense", f"STORE: {store} has codec {source.name}, convert reads dense stores only")
    codec = factory.from_config(config, source.num_classes)
    require(codec != source, f"convert: {store} is {manifest.codec} already: choose another codec")
    paths = {"STORE": os.path.abspath(store), "data.train": os.path.abspath(train_images)}
    return replace(manifest, codec=codec.to_dict(), paths=paths)


def convert(store: Path, new_store: Path, train_images: str, wanted: Manifest) -> None:
    """Write what is missing of `new_store`, of the manifest `wanted` of `describe_converted`, from the records of
    `store`; collective: ranks share the shards. Raises `UserError` for other images, and for damaged shards."""
    images = as_cached(open_beton(train_images, "data.train", verify=False), wanted, "STORE", store)
    labels = torch.from_numpy(read_labels(images)) if images.labelled else None
    reader = StoreReader(str(store), list(wanted.members), images)
    reader.check_shards()

    def create_and_list() -> tuple[Manifest, list[Shard]]:
        manifest = create_or_extend(new_store, wanted)
        return manifest, [shard for shard in wanted.all_shards() if not is_written(new_store, shard)]

    manifest, missing = dist.on_main(create_and_list)
    members = list(wanted.members.values())
    mine = missing[dist.rank() :: dist.world_size()]

    def logits_of(name: str) -> bases.Logits:
        return lambda ids, view: iter([reader.logits(ids, view, members.index(name))])

    names = list(dict.fromkeys(shard.checkpoint for shard in missing))
    bases.fit_missing(new_store, manifest, names, logits_of)
    encodings = bases.encodings(new_store, manifest, names)
    done = 0
    with dist.uneven_work(), ProgressDisplay(sum(shard.count for shard in mine), unit="records") as progress:
        for shard in mine:
            codec, basis_sha256 = encodings[shard.checkpoint]
            with ShardWriter(new_store, shard, manifest, basis_sha256) as writer:
                for ids in np.array_split(np.arange(shard.first, shard.last + 1), -(-shard.count // 1024)):
                    logits = reader.logits(ids, shard.view, members.index(shard.checkpoint))
                    own = None if labels is None else labels[ids]
                    writer.append(encode(codec, manifest, shard, ids, logits, own).numpy())
                    done += len(ids)
                    progress.update(done, "converting")
                writer.commit()
    records = sum(shard.count for shard in missing)
    say(f"{new_store}: complete, {records:,} records converted to {manifest.recorded.name}")

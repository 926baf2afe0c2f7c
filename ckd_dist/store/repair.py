"""Computing anew the shards of a store that are missing or bad."""

from __future__ import annotations

from pathlib import Path

import torch

from ckd_dist.core import dist
from ckd_dist.core.console import say
from ckd_dist.data.beton import open_beton
from ckd_dist.data.options import LoaderConfig
from ckd_dist.store import bases
from ckd_dist.store.check import faults
from ckd_dist.store.manifest import Manifest
from ckd_dist.store.reader import as_cached
from ckd_dist.store.recording import Recorder, Work, image_digests, missing_work, write_work
from ckd_dist.store.writer import clear_leftovers, locked, make_room


def repair(
    store: Path,
    train_images: str,
    run: str,
    name: str | None,
    batch_size: int,
    device: torch.device,
    code: str | None = None,
) -> None:
    """Compute anew what is missing or bad of the checkpoints of one run, and nothing else; collective.

    `run` is the folder of the teacher's run and `name` its name in a store of several; `train_images` is the .beton
    file that the store is of; `code`: see `models.load_model`. Raises `UserError`, before anything is deleted, where
    these are others than the store's.
    """
    manifest = Manifest.load(store, "STORE")
    manifest.require_plain_views("STORE", store)
    images = as_cached(open_beton(train_images, "data.train"), manifest, "STORE", store)
    recorder = Recorder(manifest, images, run, LoaderConfig(batch_size=batch_size), device, code)
    if note := manifest.decoding_note(image_digests(manifest, images)):
        say(note)
    names = list(manifest.members_of(name).values())
    recorder.load(names[:1])  # refuses another run before anything is deleted
    bad = faults(store, manifest, names)
    for _, fault in bad:
        say(fault)

    def delete_and_list() -> Work:
        clear_leftovers(store)
        with locked(store):
            for shard, _ in bad:
                make_room(store, shard)
            for name in names:
                bases.remove_bad(store, manifest, name)
        views = {name: manifest.checkpoints[name]["views"] for name in names}
        return [each for name in names for each in missing_work(store, manifest, [name], views[name], 1)]

    work = dist.on_main(delete_and_list)
    if work:
        write_work(store, recorder, work)
    else:
        say(f"{store}: nothing to repair")

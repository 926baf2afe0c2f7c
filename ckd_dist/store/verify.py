"""Records of a store against those that their teacher gives anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ckd_dist.core.console import say
from ckd_dist.data.dataset import DatasetInfo
from ckd_dist.data.options import LoaderConfig
from ckd_dist.store.manifest import Manifest
from ckd_dist.store.reader import StoreReader, as_cached
from ckd_dist.store.recording import Recorder, image_digests

TOLERANCE = 0.1
"""Largest `Codec.deviation` of a record from its recomputation that `verify` calls equal. A float32 forward pass of a
ResNet-20 deviates from a bfloat16 one by up to 0.02; records of another image by 0.2 at least, mostly by much more."""


def recompute(
    store: Path,
    info: DatasetInfo,
    run: str,
    members: dict[int | str, str],
    config: LoaderConfig,
    device: torch.device,
    count: int,
    code: str | None = None,
) -> list:
    """Compute `count` records of each of the `members`, all of one run, anew, of samples and views drawn at random, and
    compare: a list of (what is wrong, deviation) for those that deviate by more than `TOLERANCE`.

    `code`: see `models.load_model`. Raises `UserError` where the images or the run are not those of the store.
    """
    manifest = Manifest.load(store, "STORE")
    manifest.require_plain_views("STORE", store)
    info = as_cached(info, manifest, "STORE", store)
    recorder = Recorder(manifest, info, run, config, device, code)
    reader = StoreReader(str(store), list(members), info)
    if note := manifest.decoding_note(image_digests(manifest, info)):
        say(note)
    rng = np.random.default_rng()
    off = []
    for number, name in enumerate(members.values()):
        teachers = recorder.load([name])
        views = rng.permutation(manifest.checkpoints[name]["views"])[:4]
        for view, share in zip(views, np.array_split(np.arange(count), len(views)), strict=True):
            ids = np.sort(rng.integers(0, info.count, len(share)))
            for batch, logits in recorder.logits(teachers, ids, int(view)):
                records = reader.rows(batch.ids.numpy(), int(view), [number])[:, 0]
                deviations = reader.codecs[number].deviation(torch.from_numpy(records).to(device), logits[name])
                for sample, deviation in zip(batch.ids.tolist(), deviations.tolist(), strict=True):
                    if not deviation <= TOLERANCE:
                        off.append((f"{name}, view {view}, sample {sample}", deviation))
    return off

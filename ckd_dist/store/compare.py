"""What each codec would keep of a dense store's logits, measured on records of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F

from ckd_dist.core import checkpoint as checkpoints
from ckd_dist.core.errors import require
from ckd_dist.nn.options import KDConfig, LossName
from ckd_dist.store import bases
from ckd_dist.store.codecs import Dense, TopK, Transform, transform
from ckd_dist.store.codecs.base import Codec
from ckd_dist.store.manifest import Manifest
from ckd_dist.store.reader import StoreReader

TEMPERATURES = (1, 2, 4, 8)
LOSSES: tuple[LossName, ...] = get_args(LossName)
SIZES = (16, 28, 54)
"""Of transform, in bytes, where no others are asked for."""
TESTED = 5000
"""Records that codecs are judged by, at most; a basis is fitted to others."""
FEWEST = 512
"""Records that tell anything."""


@dataclass(frozen=True)
class Comparison:
    """What a codec keeps."""

    codec: dict
    bytes: int
    """Of a record."""
    lost: dict[int, float]
    """Temperature -> the mean KL(teacher || what the codec gives of it), as a share of that of knowing nothing but the
    mean of all logits."""
    top1: float
    """Share of the images whose most probable class stays."""
    losses: list[LossName]
    """That can be computed from it."""
    fitted_to: int | None
    """Records that its basis was fitted to, if it has one."""


def compare(store: Path, checkpoint: int | str | None, sizes: Sequence[int]) -> list[Comparison]:
    """Codecs beside each other for one checkpoint (default: the last) of a dense store: dense, transform of these sizes
    in bytes, and topk of as many bytes as the largest. Images that codecs are judged by are not those that a basis is
    fitted to. Raises `UserError` for a store that is not dense, or too small."""
    manifest = Manifest.load(store, "STORE")
    require(manifest.codec["name"] == "dense", f"STORE: {store} has codec {manifest.codec['name']}: name a dense store")
    (name,) = checkpoints.choose(manifest.members, [checkpoint] if checkpoint else [], "checkpoint")
    reader = StoreReader(str(store), [name])
    reader.check_shards(1)
    count = manifest.dataset["count"]
    require(count >= FEWEST, f"STORE: {store} is of {count} images, too few to tell: give {FEWEST} at least")
    tested = np.sort(np.random.RandomState(manifest.view_seed).permutation(count)[: min(TESTED, count // 2)])
    sampled = bases.sample(manifest, manifest.members[name])
    fitting = torch.cat([reader.logits(np.setdiff1d(ids, tested), view) for ids, view in sampled])
    return compare_logits(reader.logits(tested, 0), fitting, sizes, manifest.view_seed)


def compare_logits(tested: torch.Tensor, fitting: torch.Tensor, sizes: Sequence[int], seed: int) -> list[Comparison]:
    """Codecs beside each other, see `compare`, by what they keep of logits `tested`, those that want a basis fitted to
    others, `fitting`: float32 [n, classes]. (Of sampled no single record says much: its mean does.)"""
    truth, classes = transform.centred(tested), tested.shape[1]
    mean = transform.centred(fitting).mean(dim=0).expand_as(truth)
    nothing = {temperature: _divergence(truth, mean, temperature) for temperature in TEMPERATURES}
    codecs: list[Codec] = [Dense(classes)]
    for size in sizes:
        codec = Transform.of_size(classes, size)
        codecs.append(codec.fitted(transform.fit(codec, fitting, seed)))
    codecs.append(TopK(classes, min(max(2, (max(sizes) - 12) // 4), classes)))
    return [_judged(codec, truth, nothing, len(fitting)) for codec in codecs]


def _judged(codec: Codec, truth: torch.Tensor, nothing: dict[int, float], fitted_to: int) -> Comparison:
    """What a codec, fitted to so many records if it is fitted at all, keeps of logits `truth`, float64 [n, classes];
    `nothing`: at each temperature the divergence from them of who knows but the mean of others."""
    labels = truth.argmax(dim=1)
    records = codec.encode(truth.float(), labels)
    lost = {
        temperature: _divergence(truth, codec.decode(records, float(temperature)), temperature) / nothing[temperature]
        for temperature in TEMPERATURES
    }
    kept = codec.decode(records, 1.0)
    return Comparison(
        codec=codec.to_dict(),
        bytes=codec.record_bytes,
        lost=lost,
        top1=(kept.argmax(dim=1) == labels).double().mean().item(),
        fitted_to=fitted_to if codec.is_fitted else None,
        losses=[loss for loss in LOSSES if codec.unsupported(KDConfig(loss=loss, temperature=1.0), None) is None],
    )


def _divergence(truth: torch.Tensor, found: torch.Tensor, temperature: float) -> float:
    """Mean KL(softmax(truth / T) || softmax(found / T)), in nats."""
    p, q = ((each.double() / temperature).log_softmax(dim=1) for each in (truth, found))
    return F.kl_div(q, p, reduction="batchmean", log_target=True).item()

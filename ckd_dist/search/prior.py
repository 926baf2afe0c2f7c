"""What teachers answer themselves to the held-out images: tells, for no student, which of them are likely to teach
best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ckd_dist.core.errors import require
from ckd_dist.search.trials import Search, Trial

if TYPE_CHECKING:
    from ckd_dist.store.reader import StoreReader

OPTION = "race_prior"


def order(search: Search, candidates: Sequence[Trial]) -> list[int]:
    """Numbers of the candidates, that of the likeliest to teach best first: in the order of their teachers' calibrated
    losses, see `losses`; of one teacher's settings in the order of the search.

    Raises `UserError` where the store of `race_prior` is not of the images of data.val, or lacks a checkpoint.
    """
    found = losses(search, [trial.config.teacher.checkpoints for trial in candidates])
    return sorted(range(len(candidates)), key=lambda number: (found[number], number))


def losses(search: Search, teachers: Sequence[Sequence[int | str]]) -> list[float]:
    """Of each teacher, some checkpoints together, the cross entropy with the labels of data.val in nats, at the
    temperature that suits it best; of a sequence of checkpoints the mean of theirs."""
    import torch

    from ckd_dist.data.loader import read_labels
    from ckd_dist.nn.losses import SCALES, ensemble_logits, scaled_cross_entropies
    from ckd_dist.store.reader import StoreReader

    info, combine = search.images["data.val"], search.config.teacher.combine
    names = list(dict.fromkeys(name for members in teachers for name in members))
    reader = StoreReader(search.config.race_prior or "", names, info, OPTION)
    _require_same_weights(search, reader)
    labels = torch.from_numpy(read_labels(info))

    def loss(members: Sequence[int | str]) -> float:
        total = torch.zeros(len(SCALES), dtype=torch.float64)
        for ids in np.array_split(np.arange(info.count), -(-info.count // 4096)):
            each = [reader.logits(ids, 0, names.index(name)) for name in members]
            total += scaled_cross_entropies(ensemble_logits(each, combine=combine), labels[ids]).double().sum(0)
        return float(total.min()) / info.count

    known: dict[tuple, float] = {}
    for members in map(tuple, teachers):
        parts = [(name,) for name in members] if combine == "sequence" else [members]
        for part in parts:
            if part not in known:
                known[part] = loss(part)
        known[members] = sum(known[part] for part in parts) / len(parts)
    return [known[tuple(members)] for members in teachers]


def _require_same_weights(search: Search, reader: StoreReader) -> None:
    for name in reader.checkpoints:
        theirs = reader.manifest.checkpoints[reader.manifest.members[name]]["weights_sha256"]
        require(
            theirs == search.teacher.weights_sha256(name),
            f"{OPTION}: checkpoint {name} of {reader.store} is another than that of {search.teacher.path}: write the "
            f"store anew with the same --teacher.run{' and --teacher.name' if '/' in str(name) else ''}",
        )

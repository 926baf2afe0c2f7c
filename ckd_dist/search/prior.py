"""What teachers answer themselves to the held-out images: tells, for no student, which of them are likely to teach
best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ckd_dist.core.errors import require
from ckd_dist.search.trials import Search, Trial

OPTION = "race_prior"


def order(search: Search, candidates: Sequence[Trial]) -> list[int]:
    """Numbers of the candidates, that of the likeliest to teach best first: in the order of their teachers' own top-1,
    see `top1`; of equals in the order of the search.

    Raises `UserError` where the store of `race_prior` is not of the images of data.val, or lacks a checkpoint.
    """
    found = top1(search, [trial.config.teacher.checkpoints for trial in candidates])
    return sorted(range(len(candidates)), key=lambda number: (-found[number], number))


def top1(search: Search, teachers: Sequence[Sequence[int | str]]) -> list[float]:
    """Of each teacher, some checkpoints together, the percentage of the images of data.val that it answers right; of a
    sequence of checkpoints the mean of theirs."""
    import torch

    from ckd_dist.data.loader import read_labels
    from ckd_dist.nn.losses import ensemble_logits
    from ckd_dist.store.reader import StoreReader

    info, combine = search.images["data.val"], search.config.teacher.combine
    names = list(dict.fromkeys(name for members in teachers for name in members))
    reader = StoreReader(search.config.race_prior or "", names, info, OPTION)
    for name in names:
        theirs = reader.manifest.checkpoints[reader.manifest.members[name]]["weights_sha256"]
        require(
            theirs == search.teacher.weights_sha256(name),
            f"{OPTION}: checkpoint {name} of {reader.store} is another than that of {search.teacher.path}: write one "
            f"of the two anew",
        )
    labels = torch.from_numpy(read_labels(info))
    parts = [[[name] for name in members] if combine == "sequence" else [members] for members in teachers]
    right: dict[tuple, int] = {tuple(part): 0 for each in parts for part in each}
    for ids in np.array_split(np.arange(info.count), -(-info.count // 4096)):
        logits = {name: reader.logits(ids, 0, member) for member, name in enumerate(names)}
        for part in right:
            together = ensemble_logits([logits[name] for name in part], combine=combine)
            right[part] += int((together.argmax(dim=1) == labels[ids]).sum())
    return [sum(100 * right[tuple(part)] / info.count for part in each) / len(each) for each in parts]

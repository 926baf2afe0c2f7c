"""What teachers answer themselves to the held-out images: tells, for no student, which of them are likely to teach
best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ckd_dist.search.trials import Search, Trial

if TYPE_CHECKING:
    from ckd_dist.data.dataset import DatasetInfo
    from ckd_dist.store.reader import StoreReader

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
    from ckd_dist.train.calibration import open_answers, teaching_at_once

    info, combine = search.images["data.val"], search.config.teacher.combine
    names = list(dict.fromkeys(name for members in teachers for name in members))
    reader = open_answers(search.config.race_prior or "", names, info, OPTION, search.teacher)
    parts = [teaching_at_once(members, combine) for members in teachers]
    asked = list(dict.fromkeys(part for each in parts for part in each))
    found = dict(zip(asked, (100 * correct(reader, info, asked, combine).mean(axis=1)).tolist(), strict=True))
    return [sum(found[part] for part in each) / len(each) for each in parts]


def correct(
    reader: StoreReader, info: DatasetInfo, teachers: Sequence[Sequence[int | str]], combine: str = "logits"
) -> np.ndarray:
    """Whether each teacher, some checkpoints that `reader` has of the images of `info`, answers an image right, bool
    [teachers, images]."""
    import torch

    from ckd_dist.data.loader import read_labels
    from ckd_dist.nn.losses import ensemble_logits

    labels = torch.from_numpy(read_labels(info))
    right = np.empty((len(teachers), info.count), dtype=bool)
    for ids in np.array_split(np.arange(info.count), -(-info.count // 4096)):
        logits = {name: reader.logits(ids, 0, member) for member, name in enumerate(reader.checkpoints)}
        for own, members in zip(right, teachers, strict=True):
            together = ensemble_logits([logits[name] for name in members], combine=combine)
            own[ids] = (together.argmax(dim=1) == labels[ids]).numpy()
    return right

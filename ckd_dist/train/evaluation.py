"""THE evaluation loop: every image of a file is counted once, whatever the number of processes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ckd_dist.core import dist
from ckd_dist.core.errors import TrainingError
from ckd_dist.nn import losses
from ckd_dist.nn.forward import forward_logits

if TYPE_CHECKING:
    from ckd_dist.data.loader import BetonLoader


# ------------------------------------------------------------------------------------------- evaluation


def evaluate(
    models: Mapping[str, nn.Module], loader: BetonLoader, amp: str, mirror: bool = False
) -> dict[str, dict[str, float]]:
    """`top1` and `top5` in percent and the mean `loss` of each of the named models over every image of the file, each
    image decoded and counted once. `mirror`: by the mean of the logits of the image and its mirror image.

    Collective: each rank takes a contiguous share; rank 0's batch-norm statistics count for all. Raises
    `TrainingError`, on every rank, that names a model whose logits are not finite: they have no largest.
    """
    were_training = [model.training for model in models.values()]
    for model in models.values():
        dist.broadcast_tensors(model.buffers())
        model.eval()
    count = loader.info.count
    sums = torch.zeros(len(models), 4, dtype=torch.float64, device=loader.device)
    for batch in loader.batches(np.array_split(np.arange(count), dist.world_size())[dist.rank()]):
        for m, model in enumerate(models.values()):
            logits = forward_logits(model, batch.images, amp)
            if mirror:
                logits = (logits + forward_logits(model, batch.images.flip(3), amp)) / 2
            hits = logits.topk(min(5, logits.shape[1])).indices.eq(batch.labels[:, None])
            loss = losses.cross_entropy(logits, batch.labels).sum()
            sums[m, :3] += torch.stack([hits[:, 0].sum(), hits.sum(), loss])
        sums[:, 3] += len(batch.labels)
    for model, was_training in zip(models.values(), were_training, strict=True):
        model.train(was_training)
    results = {}
    for name, (top1, top5, loss_sum, seen) in zip(models, dist.all_reduce_sum(sums).tolist(), strict=True):
        assert seen == count
        if not math.isfinite(loss_sum):
            raise TrainingError(f"{name}: its logits of {loader.info.path} are not finite{_FLOAT16[amp == 'float16']}")
        results[name] = {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss_sum / count}
    return results


_FLOAT16 = ("", ", perhaps since float16 cannot hold them: try --amp off")

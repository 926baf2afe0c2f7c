"""A teacher calibrated when it is read: the factors of its checkpoints' logits that make the labels of held-out images
most probable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ckd_dist.core import dist
from ckd_dist.core.console import say
from ckd_dist.core.errors import require
from ckd_dist.core.identity import Input
from ckd_dist.data import classes
from ckd_dist.data.beton import require_disjoint
from ckd_dist.data.dataset import DatasetInfo, read_info
from ckd_dist.data.loader import read_labels
from ckd_dist.nn.losses import ensemble_logits
from ckd_dist.store.codecs.full import FullCodec
from ckd_dist.store.codecs.sampled import Sampled
from ckd_dist.store.manifest import Manifest
from ckd_dist.store.reader import StoreReader, as_cached
from ckd_dist.train.options import DistillConfig
from ckd_dist.train.teachers import CachedTeacher, OnlineTeacher

OPTION = "teacher.calibration"
CHUNK = 4096
"""Images that are looked at together."""

# ------------------------------------------------------------------------------------------- the fit


@dataclass(frozen=True)
class Fit:
    """What held-out images make of the logits of some checkpoints."""

    factors: list[float]
    """Of each checkpoint's logits, at least 0: the teacher's logits are the sum of the products. The inverse of their
    sum is a temperature; a factor's share of it is a weight."""
    before: float
    """Cross entropy with the labels in nats, of the mean of the logits."""
    after: float
    """The same, of the calibrated logits."""


def fit(members: Sequence[torch.Tensor], labels: torch.Tensor) -> Fit:
    """The factors a >= 0 with which softmax(sum of a_m * logits_m) makes the labels most probable: logits float [n,
    classes] each, labels int64 [n]. In float64, the same at every call.

    Of one checkpoint it is the temperature scaling of Guo et al., "On Calibration of Modern Neural Networks" (arXiv
    1706.04599), a = 1 / T; of several, their weights and the temperature at once. The cross entropy is convex in a. Of
    logits that answer all images right there is no best a: it grows without end, until the gradient is no more.
    """
    from scipy.optimize import minimize  # takes half a second, which other trainings need not wait

    count = len(labels)
    # In units of the logits' deviations steps are of one size, whatever the scale of a checkpoint's logits.
    deviations = np.array([each.double().std(dim=1).mean().item() or 1.0 for each in members])

    def cross_entropy(scaled: np.ndarray) -> tuple[float, np.ndarray]:
        factors, value = torch.from_numpy(scaled / deviations), 0.0
        gradient = torch.zeros(len(members), dtype=torch.float64)
        for start in range(0, count, CHUNK):
            part, wanted = slice(start, start + CHUNK), labels[start : start + CHUNK, None]
            logits = torch.stack([each[part].double() for each in members])
            log_p = F.log_softmax((factors[:, None, None] * logits).sum(dim=0), dim=1)
            value -= log_p.gather(1, wanted).sum().item()
            error = log_p.exp()
            error.scatter_add_(1, wanted, -torch.ones_like(log_p[:, :1]))
            gradient += (logits * error).sum(dim=(1, 2))
        return value / count, gradient.numpy() / count / deviations

    start = deviations / len(members)
    found = minimize(
        cross_entropy,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * len(members),
        options={"ftol": 1e-13, "gtol": 1e-9, "maxiter": 1000},
    )
    # The last digits differ between machines, and would make other students of the same teacher.
    factors = [float(f"{factor:.6g}") for factor in found.x / deviations]
    return Fit(factors, cross_entropy(start)[0], float(found.fun))


# ------------------------------------------------------------------------------------------- held-out answers


def inputs(store: str, checkpoints: Iterable[int | str]) -> dict[str, Input]:
    """What a student of these checkpoints takes of their answers to held-out images, by option."""
    return {OPTION: Manifest.load(Path(store), OPTION).as_input(store, checkpoints)}


def open_answers(
    store: str, checkpoints: Sequence[int | str], info: DatasetInfo, option: str, teacher: CachedTeacher | OnlineTeacher
) -> StoreReader:
    """The `store`, given as `option`, of what the teacher's checkpoints answer to the images of `info`; raises
    `UserError` where it is of others."""
    manifest = Manifest.load(Path(store), option)
    missing = [str(name) for name in checkpoints if name not in manifest.members]
    require(
        not missing,
        f"{option}: {store} has no checkpoint of epoch {', '.join(missing)}; there are "
        f"{', '.join(map(str, manifest.members))}: add to it by cache_logits with the same --store",
    )
    reader = StoreReader(store, [*checkpoints], info, option)
    for name in checkpoints:
        require(
            manifest.checkpoints[manifest.members[name]]["weights_sha256"] == teacher.weights_sha256(name),
            f"{option}: checkpoint {name} of {store} is another than that of {teacher.path}: write one of the two anew",
        )
    return reader


def open_calibration(
    store: str,
    checkpoints: Sequence[int | str],
    images: Mapping[str, DatasetInfo],
    teacher: CachedTeacher | OnlineTeacher,
) -> tuple[StoreReader, DatasetInfo]:
    """What teacher.calibration holds, and the images with labels that it is of: data.val, or those that it was written
    of. `images` are of the other options.

    Raises `UserError` where they are no held-out images with labels, or not all logits of these checkpoints are there.
    """
    manifest, fix = Manifest.load(Path(store), OPTION), "give answers to others that have labels and were held out"
    of = manifest.dataset["content_hash"]
    for option, info in images.items():
        same = option != "data.val" and of == info.content_hash
        require(not same, f"{OPTION}: {store} is of the very images of {option}: {fix}")
    val = images.get("data.val")
    if val is None or val.content_hash != of:
        path = manifest.paths.get("data.train")
        require(
            path is not None and Path(path).is_file(),
            f"{OPTION}: the images of {store} are not where they were, at {path}: put them back, or name them as "
            "--data.val",
        )
        held_out = as_cached(read_info(str(path), OPTION), manifest, OPTION, Path(store))
        classes.require_labels(held_out, OPTION, "a teacher is calibrated by these")
        for option in [each for each in images if each != "data.val"]:
            require_disjoint(option, images[option], OPTION, held_out)
    else:
        held_out = val
    reader = open_answers(store, checkpoints, held_out, OPTION, teacher)
    require(
        isinstance(reader.codec, FullCodec),
        f"{OPTION}: {store} is of codec {manifest.codec['name']}, which keeps not all logits: write it with --codec "
        "dense",
    )
    require(not reader.recipe.mixes, f"{OPTION}: the images of {store} are mixed of two: write it with center_crop")
    require(
        not (isinstance(teacher, CachedTeacher) and isinstance(teacher.manifest.recorded, Sampled)),
        f"{OPTION} is for logits, and {teacher.path} keeps probabilities, drawn at a temperature: use a store of codec "
        "dense, transform or topk",
    )
    return reader, held_out


# ------------------------------------------------------------------------------------------- students


def factors(
    configs: Sequence[DistillConfig], teacher: CachedTeacher | OnlineTeacher | None, images: Mapping[str, DatasetInfo]
) -> list[list[float] | None]:
    """For each student, of options that are resolved, the factors of its checkpoints' logits, in their order; None
    where teacher.calibration asks for none. Collective: rank 0 computes them.

    Raises `UserError` where the held-out answers do not fit the teacher, or tell no factors.
    """
    store = next((each.teacher.calibration for each in configs if each.teacher.calibration), None)
    if store is None or teacher is None:
        return [None for _ in configs]
    taught = [each.teacher for each in configs if each.teacher.checkpoints]
    parts = [teaching_at_once(each.checkpoints, each.combine) for each in taught]
    asked = list(dict.fromkeys(part for each in parts for part in each))
    fits = dist.on_main(lambda: _fit_all(store, asked, images, teacher))
    found = iter([[factor for part in each for factor in fits[part].factors] for each in parts])
    return [next(found) if each.teacher.checkpoints else None for each in configs]


def teaching_at_once(checkpoints: Sequence[int | str], combine: str) -> list[tuple[int | str, ...]]:
    """Those of a teacher's checkpoints that teach together: all of them, or each of a sequence by itself."""
    return [(name,) for name in checkpoints] if combine == "sequence" else [tuple(checkpoints)]


def _fit_all(
    store: str,
    asked: Sequence[tuple[int | str, ...]],
    images: Mapping[str, DatasetInfo],
    teacher: CachedTeacher | OnlineTeacher,
) -> dict[tuple[int | str, ...], Fit]:
    names = list(dict.fromkeys(name for members in asked for name in members))
    reader, info = open_calibration(store, names, images, teacher)
    labels = torch.from_numpy(read_labels(info))
    answers = {name: reader.logits(np.arange(info.count), 0, member) for member, name in enumerate(names)}
    found = {}
    for members in asked:
        found[members] = fit([answers[name] for name in members], labels)
        say(_require_told(found[members], members, [answers[name] for name in members], labels))
    return found


def _require_told(found: Fit, members: Sequence[int | str], answers: list[torch.Tensor], labels: torch.Tensor) -> str:
    """What was found, in a line; raises `UserError` where the labels tell nothing of the answers."""
    who = f"epoch{'s' * (len(members) > 1)} {', '.join(map(str, members))}"
    total, images = sum(found.factors), f"{len(labels):,} held-out images"
    require(
        total > 0,
        f"{OPTION}: by the labels of {images}, {who} know nothing of the classes: give the answers of a better "
        "teacher, or leave it out",
    )
    together = ensemble_logits(answers, found.factors)
    require(
        not bool((together.argmax(dim=1) == labels).all()),
        f"{OPTION}: {who} answer all of {images} right, which tells no temperature: give more of them",
    )
    how = f"weighed {', '.join(f'{factor:.3g}' for factor in found.factors)} (temperature {1 / total:.3g})"
    if len(members) == 1:
        how = f"at temperature {1 / total:.3g}"
    return f"teacher: {who} {how} by {images}: cross entropy {found.before:.3f} to {found.after:.3f}"

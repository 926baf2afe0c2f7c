"""Checkpoints: saved whole or not at all, loaded without executing anything, and a run's trajectory of them."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import torch
from typing_extensions import NotRequired, TypedDict

from ckd_dist.core.errors import UserError, require
from ckd_dist.core.files import first_fault, require_regular, schema, write_atomically


def save(path: Path, state: dict) -> None:
    """Write `state` (tensors, numbers, strings, lists and dicts of them) to `path`, atomically; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()  # torch hides why a file could not be written, a full disk, behind an error of its own
    torch.save(state, content)
    write_atomically(path, lambda file: file.write(content.getbuffer()))


Weights = dict[str, pydantic.InstanceOf[torch.Tensor]]


class TrainingState(TypedDict):
    """What exact resume of a training needs: the file last.pt."""

    weights: Weights
    averaged: Weights | None
    connectors: NotRequired[Weights]
    """Of `nn.review`, where the student has such."""
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    step: pydantic.NonNegativeInt
    seconds: float
    seconds_waited: float
    evaluation: dict[str, float]


class Metadata(TypedDict):
    """What the weights of a file epoch_*.pt need to be used alone."""

    model: str
    options: NotRequired[dict[str, Any]]
    """Arguments that it was made with."""
    source_sha256: NotRequired[str]
    """Of the file that its name refers to, `models.defining_file`."""
    num_classes: pydantic.PositiveInt
    image_size: pydantic.PositiveInt
    """It was trained at."""
    val_image_size: NotRequired[pydantic.PositiveInt]
    """It was evaluated at."""
    crop_share: NotRequired[float]
    """Side of the central square that it was evaluated on, as a share of a photograph's shorter side."""
    augment: NotRequired[str]
    """Kind of its training views."""
    mean: list[float]
    std: list[float]
    epoch: NotRequired[int]
    dataset: NotRequired[dict[str, Any]]
    """Of its training images: `name`, `content_hash` and `count`."""
    classes: NotRequired[list[str]]
    """Name of each class."""
    evaluation: NotRequired[dict[str, float]]


class KeptState(TypedDict):
    """A point of a run's trajectory: a file epoch_*.pt."""

    weights: Weights
    metadata: Metadata


def load(path: str | Path, option: str, kind: Any = dict[str, Any], mend: str = "give one with a state dict") -> Any:
    """Read a file of `save` onto the CPU, executing nothing of it; raises `UserError` naming `option` where it is none,
    or its content is not of the `kind`, a dict in any case; then it says the `mend`, too."""
    path = Path(path)
    require_regular(path, option)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here: for a damaged archive, a pickle that it refuses, ...
        found = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))  # the rest of it is advice to trust the file
        why = f"it holds a {found[1]}, which might run code" if found else "it is damaged, or of another kind"
        raise UserError(f"{option}: {path} is not a file of tensors that torch loads safely ({why}): {mend}") from None
    try:
        schema(kind).validate_python(state, strict=True)
    except pydantic.ValidationError as error:
        why = first_fault(error)
        raise UserError(f"{option}: {path} is no checkpoint of this system ({why}): {mend}") from None
    return state


# ------------------------------------------------------------------------------------------- trajectory


def checkpoint_path(run: str | Path, epoch: int) -> Path:
    """Where the weights after `epoch` epochs of a run are kept."""
    return Path(run) / "checkpoints" / f"epoch_{epoch:04d}.pt"


def trajectory(run: str | Path, option: str) -> dict[int, Path]:
    """Epoch -> file of every checkpoint that a run kept, in order; raises `UserError` when there is none."""
    folder = Path(run) / "checkpoints"
    require(folder.is_dir(), f"{option}: {run} is not a run folder: it has no folder `checkpoints`")
    found = {int(m[1]): path for path in folder.iterdir() if (m := re.fullmatch(r"epoch_(\d+)\.pt", path.name))}
    require(bool(found), f"{option}: {folder} holds no epoch_*.pt: let train_teacher finish an epoch to keep")
    return dict(sorted(found.items()))


def choose(available: Mapping[Any, Any], wanted: Sequence[Any], option: str) -> list[Any]:
    """The checkpoints that are wanted, epochs or RUN/EPOCH in a store of several runs, or the last one; raises
    `UserError` for one that is not there."""
    missing = [name for name in wanted if name not in available]
    require(
        not missing,
        f"{option}: no checkpoint of epoch {', '.join(map(str, missing))}; there are {', '.join(map(str, available))}",
    )
    unnamed = [name for name in available if isinstance(name, int)]
    return list(wanted) or (unnamed or list(available))[-1:]


def weights_sha256(weights: dict[str, torch.Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of a state dict: the identity of a model's weights."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()

"""Checkpoints: saved whole or not at all, loaded without executing anything, and a run's trajectory of them."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ckd_dist.config import UserError, require
from ckd_dist.files import write_atomically


def save(path: Path, state: dict) -> None:
    """Write `state` (tensors, numbers, strings, lists and dicts of them) to `path`, atomically; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()  # torch hides why a file could not be written, a full disk, behind an error of its own
    torch.save(state, content)
    write_atomically(path, lambda file: file.write(content.getbuffer()))


def load(path: str | Path, option: str) -> dict:
    """Read a file of `save` onto the CPU, executing nothing of it; raises `UserError` naming `option`."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{option}: no such file: {path}") from None
    except IsADirectoryError:
        raise UserError(f"{option}: {path} is a folder: name a file") from None
    except Exception as error:  # torch raises many kinds here: for a damaged archive, a pickle that it refuses, ...
        raise UserError(
            f"{option}: {path} is not a file of tensors that torch loads safely ({_first(error)})"
        ) from None
    require(isinstance(state, dict), f"{option}: {path} holds a {type(state).__name__}, not a checkpoint")
    return state


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


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

"""The bases of a store's checkpoints, for codecs that are fitted to each: files beside the shards, with checksums.

A basis belongs to the store: records mean nothing without it, and with another they mean something else. So its
checksum is in the sidecar of every shard, and what learns from a store depends on it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ckd_dist.core import dist
from ckd_dist.core.errors import UserError
from ckd_dist.core.files import file_sha256, write_bytes_atomically
from ckd_dist.store.codecs import transform
from ckd_dist.store.codecs.base import Codec
from ckd_dist.store.manifest import BasisSidecar, Manifest, basis_path, read_basis_sidecar
from ckd_dist.store.writer import locked, remove_with_sidecar

RUN = 16
"""Samples that are drawn together for a fit."""
Logits = Callable[[np.ndarray, int], Iterator[torch.Tensor]]
"""(sample ids [n], view) -> a checkpoint's logits, float32 [m, classes], batch after batch."""


def fault(store: Path, manifest: Manifest, checkpoint: str) -> str | None:
    """What is wrong with a checkpoint's basis, beginning with its path; None where nothing is, and where the codec has
    none."""
    codec, file = manifest.recorded, basis_path(store, checkpoint)
    if not isinstance(codec, transform.Transform):
        return None
    try:
        for each in (file.with_suffix(".json"), file):
            if each.exists() and not each.is_file():
                return f"{each} is not a regular file"
        found, expected = read_basis_sidecar(store, checkpoint), _expected(manifest, checkpoint, file_sha256(file))
        if found != expected:
            return f"{file} does not match its checksum, or is of another checkpoint or store"
        transform.Basis.from_content(file.read_bytes(), codec)
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except OSError as error:
        return f"{error.filename or file} cannot be read ({error.strerror})"
    except ValueError as error:
        return f"{file} is damaged ({error})"
    return None


def remove_bad(store: Path, manifest: Manifest, checkpoint: str) -> None:
    """Remove the basis of a checkpoint, unless nothing is wrong with it."""
    if fault(store, manifest, checkpoint):
        remove_with_sidecar(basis_path(store, checkpoint))


class Encoding(NamedTuple):
    """How a checkpoint's records are encoded."""

    codec: Codec
    """With its basis, if it has one."""
    basis_sha256: str | None
    """Of the file of that basis."""


def encodings(store: Path, manifest: Manifest, checkpoints: Iterable[str]) -> dict[str, Encoding]:
    """The encoding of each checkpoint, by name; raises `UserError` where a basis is missing or damaged."""
    return {name: _encoding(store, manifest, name) for name in checkpoints}


def _encoding(store: Path, manifest: Manifest, checkpoint: str) -> Encoding:
    codec = manifest.recorded
    if not isinstance(codec, transform.Transform):
        return Encoding(codec, None)
    wrong = fault(store, manifest, checkpoint)
    if wrong:
        raise UserError(f"store: {wrong}: run python -m ckd_dist.store repair")
    basis = transform.Basis.from_content(basis_path(store, checkpoint).read_bytes(), codec)
    return Encoding(codec.fitted(basis), read_basis_sidecar(store, checkpoint).sha256)


def fit_missing(
    store: Path, manifest: Manifest, checkpoints: Iterable[str], logits_of: Callable[[str], Logits]
) -> None:
    """Fit the bases that are missing of these checkpoints, whose logits `logits_of` gives; collective: ranks share the
    work."""
    missing = [name for name in checkpoints if fault(store, manifest, name)]
    dist.barrier()  # all have looked
    with dist.uneven_work():
        for name in missing[dist.rank() :: dist.world_size()]:
            _fit(store, manifest, name, logits_of(name))
    dist.barrier()  # all may read


def _fit(store: Path, manifest: Manifest, checkpoint: str, logits: Logits) -> None:
    """Fit the basis of a checkpoint to a sample of its records, and write it unless another command has."""
    codec = manifest.recorded
    assert isinstance(codec, transform.Transform)
    parts = [part for ids, view in sample(manifest, checkpoint) for part in logits(ids, view)]
    basis = transform.fit(codec, torch.cat(parts), manifest.view_seed)
    content, file = basis.content(), basis_path(store, checkpoint)
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(store):
        if fault(store, manifest, checkpoint) is None:
            return
        file.with_suffix(".json").unlink(missing_ok=True)
        write_bytes_atomically(file, content)
        sidecar = asdict(_expected(manifest, checkpoint, file_sha256(file)))
        write_bytes_atomically(file.with_suffix(".json"), (json.dumps(sidecar, indent=2) + "\n").encode())


def sample(manifest: Manifest, checkpoint: str) -> list[tuple[np.ndarray, int]]:
    """(sample ids, view) of the records that the basis of a checkpoint is fitted to: some thousands, of the first views
    only as far as they are needed; the same for all processes. They are drawn by sixteen that lie side by side, since
    whole batches are computed for their sake."""
    count, views = manifest.dataset["count"], manifest.checkpoints[checkpoint]["views"]
    rng = np.random.RandomState(manifest.view_seed)
    found, wanted = [], transform.SAMPLE
    for view in range(views):
        runs = np.sort(rng.permutation(-(-count // RUN))[: -(-wanted // RUN)])
        ids = (RUN * runs[:, None] + np.arange(RUN)).reshape(-1)
        ids = ids[ids < count]
        found.append((ids, view))
        wanted -= len(ids)
        if wanted <= 0:
            break
    return found


def _expected(manifest: Manifest, checkpoint: str, sha256: str) -> BasisSidecar:
    return BasisSidecar(
        identity=manifest.identity_hash,
        weights_sha256=manifest.checkpoints[checkpoint]["weights_sha256"],
        checkpoint=checkpoint,
        sha256=sha256,
    )

"""The logit store that tests share, and the bytes of any."""

from __future__ import annotations

import hashlib
from pathlib import Path

VIEWS, SHARD = 2, 250
"""Of the store that tests share."""


def cache_options(fashion: dict[str, Path], teacher: Path, store: Path, *more: object) -> list[str]:
    """Options of cache_logits for the store that tests share, later ones winning."""
    words = ["--data.train", fashion["train"], "--teacher.run", teacher, "--store", store, "--views", VIEWS]
    return [str(word) for word in [*words, "--shard_size", SHARD, "--data.batch_size", 64, *more]]


def contents(store: Path) -> dict[str, str]:
    """sha256 of every file of a folder."""
    files = sorted(path for path in store.rglob("*") if path.is_file())
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

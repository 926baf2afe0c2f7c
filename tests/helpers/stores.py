"""The logit store that tests share, and the bytes of any."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ckd_dist.store import manifest as manifests

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


def damage_at(path: Path, position: int) -> None:
    """Change a bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def old_format(store: Path) -> None:
    """Make of a store one of format 4, whose shards have checksums by sha256."""
    for path in store.rglob("samples_*.json"):
        values = json.loads(path.read_text())
        del values["xxh3_128"]
        values["sha256"] = hashlib.sha256(path.with_suffix(".npy").read_bytes()).hexdigest()
        path.write_text(json.dumps(values))
    values = json.loads((store / "manifest.json").read_text())
    del values["checksum"]
    values["format"] = 4
    (store / "manifest.json").write_text(json.dumps({**values, "checksum": manifests._checksum(values)}))

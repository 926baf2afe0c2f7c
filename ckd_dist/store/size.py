"""How large a store is, and whether the disk has room for it."""

from __future__ import annotations

import shutil
from pathlib import Path

from ckd_dist.core.errors import require
from ckd_dist.store.manifest import Manifest, Shard
from ckd_dist.store.writer import array_header, is_written, sidecar_content


def shard_size(manifest: Manifest, shard: Shard) -> int:
    """Bytes of a shard's .npy file."""
    return len(array_header(manifest, shard)) + manifest.recorded.record_bytes * shard.count


def size_of(manifest: Manifest, shards: list[Shard]) -> int:
    """Bytes of shards and their sidecars; those of bases, some megabytes a checkpoint, are not known beforehand."""
    basis = 64 * "0" if manifest.recorded.is_fitted else None
    sidecars = sum(len(sidecar_content(manifest, shard, 32 * "0", basis)) for shard in shards)
    return sidecars + sum(shard_size(manifest, shard) for shard in shards)


def store_size(manifest: Manifest) -> tuple[int, int]:
    """(bytes, files) of the whole store when it is complete: the sum of its files' lengths, to the byte."""
    shards = manifest.all_shards()
    return len(manifest.content()) + size_of(manifest, shards), 1 + 2 * len(shards)


def space(store: Path, manifest: Manifest) -> tuple[int, int]:
    """(bytes still to be written, bytes free on the disk)."""
    folder = next(path for path in (store, *store.absolute().parents) if path.exists())
    missing = [shard for shard in manifest.all_shards() if not is_written(store, shard)]
    return size_of(manifest, missing), shutil.disk_usage(folder).free


def require_space(store: Path, manifest: Manifest) -> None:
    """Raise `UserError` when what is still to be written does not fit on the disk."""
    needed, free = space(store, manifest)
    require(
        needed <= free,
        f"store: {store} needs {format_bytes(needed)} more, the disk has {format_bytes(free)} free: make room, choose "
        "another disk, fewer --views, or --codec topk",
    )


def format_bytes(count: float) -> str:
    """A number of bytes in kB, MB, GB or TB of powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"

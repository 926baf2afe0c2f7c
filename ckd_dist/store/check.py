"""Whether a store's shards are what the manifest says."""

from __future__ import annotations

import json
from pathlib import Path

from ckd_dist import dist
from ckd_dist.files import file_sha256
from ckd_dist.log import ProgressDisplay
from ckd_dist.store.manifest import Manifest, Shard


def shard_fault(store: Path, manifest: Manifest, shard: Shard) -> str | None:
    """What is wrong with a shard, beginning with its path, or None: it is missing, it belongs elsewhere, or its content
    does not match its checksum. Reads the whole file."""
    path = shard.path(store)
    sidecar_path = path.with_suffix(".json")
    try:
        sidecar = json.loads(sidecar_path.read_text())
        digest = file_sha256(path)
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except OSError as error:
        return f"{error.filename or path} cannot be read ({error.strerror})"
    except (json.JSONDecodeError, UnicodeDecodeError):
        return f"{sidecar_path} is damaged"
    if not isinstance(sidecar, dict):
        return f"{sidecar_path} is damaged"
    for key, value in manifest.sidecar(shard).items():
        if sidecar.get(key) != value:
            return f"{path} has {key} {sidecar.get(key)}, the manifest says {value}"
    return None if sidecar.get("sha256") == digest else f"{path} does not match its checksum"


def faults(store: Path, manifest: Manifest, names: list[str] | None = None) -> list[tuple[Shard, str]]:
    """Every bad shard of the checkpoints `names` (default: all) with what is wrong with it; collective: ranks share the
    work, and all get the whole list."""
    shards = [shard for name in names or manifest.checkpoints for shard in manifest.checkpoint_shards(name)]
    mine = range(dist.rank(), len(shards), dist.world_size())
    found: dict[int, str] = {}
    with ProgressDisplay(len(mine), unit="shards") as progress:
        for done, index in enumerate(mine, start=1):
            if fault := shard_fault(store, manifest, shards[index]):
                found[index] = fault
            progress.update(done, f"checking {store}")
    everyones = {index: fault for each in dist.gather_objects(found) for index, fault in each.items()}
    return [(shards[index], everyones[index]) for index in sorted(everyones)]

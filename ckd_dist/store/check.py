"""Whether a store's shards are what the manifest says."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ckd_dist.core import dist
from ckd_dist.core.console import ProgressDisplay
from ckd_dist.core.files import file_sha256, parse_json
from ckd_dist.store import bases
from ckd_dist.store.manifest import Manifest, Shard, Sidecar, read_basis_sidecar


def records_begin(file: BinaryIO, manifest: Manifest, shard: Shard) -> int:
    """Where the records begin in a shard's .npy file, in bytes; raises `ValueError` unless it holds as many as it
    should, in the codec's type, in C order, and nothing else."""
    dtype, shape = manifest.recorded.array(shard.count)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("it is of another version of .npy")
    found, fortran_order, found_dtype = np.lib.format.read_array_header_1_0(file)
    if (found_dtype, found) != (dtype, shape) or fortran_order:
        order = " in Fortran order" if fortran_order else ""
        raise ValueError(f"it holds {found_dtype} {found}{order}, the codec's are {dtype} {shape}")
    start, size = file.tell(), os.fstat(file.fileno()).st_size
    if size != start + dtype.itemsize * int(np.prod(shape)):
        raise ValueError(f"it has {size} bytes")
    return start


def shard_fault(store: Path, manifest: Manifest, shard: Shard, basis_sha256: str | None = None) -> str | None:
    """What is wrong with a shard, beginning with its path, or None: it is missing, it belongs elsewhere, its content
    does not match its checksum, is no array of the codec's records, or was encoded with another basis. Reads the whole
    file."""
    path = shard.path(store)
    sidecar_path = path.with_suffix(".json")
    try:
        for each in (sidecar_path, path):
            if each.exists() and not each.is_file():
                return f"{each} is not a regular file"
        found = asdict(parse_json(sidecar_path.read_bytes(), Sidecar))
        expected = asdict(manifest.sidecar(shard, file_sha256(path), basis_sha256))
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except OSError as error:
        return f"{error.filename or path} cannot be read ({error.strerror})"
    except ValueError as error:
        return f"{sidecar_path} is damaged ({error})"
    for key, value in expected.items():
        if found[key] != value:
            different = f"has {key} {found[key]}, the manifest says {value}"
            return f"{path} {different if key != 'sha256' else 'does not match its checksum'}"
    try:
        with open(path, "rb") as file:
            records_begin(file, manifest, shard)
    except ValueError as error:
        return f"{path} is no shard of this store ({error})"
    return None


def faults(
    store: Path, manifest: Manifest, names: list[str] | None = None, views: int | None = None
) -> list[tuple[Shard, str]]:
    """Every bad shard of the first `views` (default: all) of the checkpoints `names` (default: all) with what is wrong
    with it; collective: ranks share the work, and all get the whole list."""
    shards = [shard for name in names or manifest.checkpoints for shard in manifest.checkpoint_shards(name, views)]
    mine = range(dist.rank(), len(shards), dist.world_size())
    found: dict[int, str] = {}
    wrong = {name: bases.fault(store, manifest, name) for name in dict.fromkeys(shard.checkpoint for shard in shards)}
    good = [name for name in wrong if manifest.recorded.is_fitted and not wrong[name]]
    checksums = {name: read_basis_sidecar(store, name).sha256 for name in good}
    with dist.uneven_work(), ProgressDisplay(len(mine), unit="shards") as progress:
        for done, index in enumerate(mine, start=1):
            name = shards[index].checkpoint
            if fault := wrong[name] or shard_fault(store, manifest, shards[index], checksums.get(name)):
                found[index] = fault
            progress.update(done, f"checking {store}")
    everyones = {index: fault for each in dist.gather_objects(found) for index, fault in each.items()}
    return [(shards[index], everyones[index]) for index in sorted(everyones)]

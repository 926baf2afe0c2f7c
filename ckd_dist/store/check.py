"""Whether a store's shards are what the manifest says."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict
from io import FileIO
from pathlib import Path

import numpy as np
import xxhash

from ckd_dist.core import dist
from ckd_dist.core.console import ProgressDisplay
from ckd_dist.core.files import parse_json
from ckd_dist.store import bases
from ckd_dist.store.manifest import Manifest, Shard, Sidecar, read_basis_sidecar
from ckd_dist.store.size import shard_size
from ckd_dist.store.writer import array_header

PIECE = 1 << 24
"""Bytes that are read at a time."""
CHECKSUMS: dict[str, Callable] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}


def shard_fault(
    store: Path,
    manifest: Manifest,
    shard: Shard,
    basis_sha256: str | None = None,
    *,
    content: bool = True,
    into: np.ndarray | None = None,
) -> str | None:
    """What is wrong with a shard, beginning with its path, or None: it is missing, it belongs elsewhere, it is no array
    of the codec's records, was encoded with another basis or, which takes reading all of it, does not match its
    checksum.

    `content`: compare that too. `into`, uint8 [`size.shard_size`]: gets the file, which is compared as it came there.
    """
    path = shard.path(store)
    sidecar_path = path.with_suffix(".json")
    try:
        for each in (sidecar_path, path):
            if each.exists() and not each.is_file():
                return f"{each} is not a regular file"
        found = asdict(parse_json(sidecar_path.read_bytes(), Sidecar))
        checksums = {kind: found.pop(kind) for kind in CHECKSUMS if found[kind] is not None}
        if len(checksums) != 1:
            return f"{sidecar_path} is damaged (it has {len(checksums)} checksums)"
        for key, value in asdict(manifest.sidecar(shard, basis_sha256)).items():
            if key not in CHECKSUMS and found[key] != value:
                return f"{path} has {key} {found[key]}, the manifest says {value}"
        with open(path, "rb", buffering=0) as file:
            if wrong := _no_array(file, manifest, shard):
                return f"{path} is no shard of this store ({wrong})"
            ((kind, checksum),) = checksums.items()
            if content and _checksum(file, kind, into) != checksum:
                return f"{path} does not match its checksum"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except OSError as error:
        return f"{error.filename or path} cannot be read ({error.strerror})"
    except ValueError as error:
        return f"{sidecar_path} is damaged ({error})"
    return None


def _no_array(file: FileIO, manifest: Manifest, shard: Shard) -> str | None:
    """Why a shard's file, by its first bytes and its length, is not the .npy file of its records; None if it may be."""
    header, (dtype, shape) = array_header(manifest, shard), manifest.recorded.array(shard.count)
    if file.read(len(header)) != header:
        file.seek(0)
        try:
            np.lib.format.read_magic(file)
            found, fortran_order, found_dtype = np.lib.format.read_array_header_1_0(file)
        except Exception:  # numpy raises many kinds for what is no header
            return "it does not begin as a .npy file does"
        order = " in Fortran order" if fortran_order else ""
        return f"it holds {found_dtype} {found}{order}, the codec's are {dtype} {shape}"
    size = os.fstat(file.fileno()).st_size
    whole = shard_size(manifest, shard)
    return None if size == whole else f"it has {size:,} bytes of {whole:,}"


def _checksum(file: FileIO, kind: str, into: np.ndarray | None) -> str:
    """Of a file's content, read from its beginning in large pieces: into memory of its length, or anywhere."""
    digest, done = CHECKSUMS[kind](), 0
    size = min(PIECE, os.fstat(file.fileno()).st_size)
    scratch = memoryview(bytearray(size if into is None else 0))
    file.seek(0)
    while True:
        piece = scratch if into is None else into.data[done : done + PIECE]
        count = file.readinto(piece)
        if not count:
            return digest.hexdigest()
        digest.update(piece[:count])
        if into is not None:  # it is in memory already
            os.posix_fadvise(file.fileno(), done, count, os.POSIX_FADV_DONTNEED)
        done += count


def faults(
    store: Path,
    manifest: Manifest,
    names: list[str] | None = None,
    views: int | None = None,
    *,
    content: bool = True,
) -> list[tuple[Shard, str]]:
    """Every bad shard of the first `views` (default: all) of the checkpoints `names` (default: all) with what is wrong
    with it, as far as it shows without their `content` if that is not asked for; collective: ranks share the work, and
    all get the whole list."""
    shards = [shard for name in names or manifest.checkpoints for shard in manifest.checkpoint_shards(name, views)]
    mine = range(dist.rank(), len(shards), dist.world_size())
    found: dict[int, str] = {}
    wrong = {name: bases.fault(store, manifest, name) for name in dict.fromkeys(shard.checkpoint for shard in shards)}
    good = [name for name in wrong if manifest.recorded.is_fitted and not wrong[name]]
    checksums = {name: read_basis_sidecar(store, name).sha256 for name in good}
    with dist.uneven_work(), ProgressDisplay(len(mine), unit="shards") as progress:
        for done, index in enumerate(mine, start=1):
            shard = shards[index]
            basis_sha256 = checksums.get(shard.checkpoint)
            if fault := wrong[shard.checkpoint] or shard_fault(store, manifest, shard, basis_sha256, content=content):
                found[index] = fault
            progress.update(done, f"checking {store}")
    everyones = {index: fault for each in dist.gather_objects(found) for index, fault in each.items()}
    return [(shards[index], everyones[index]) for index in sorted(everyones)]

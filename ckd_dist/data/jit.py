"""How numba compiles functions of this package, and where their machine code is kept for later processes."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import IndexDataCacheFile


def compiled(function: Callable, *, parallel: bool = False) -> Any:
    """Compile `function` when it is first called with arguments of some types; it runs without the GIL.

    The machine code is cached on disk, which saves every process seconds. It contains that of the compiled functions
    and the constants that `function` uses: they must be defined in modules of the same folder, since the cache is
    valid for as long as no source file of that folder changes. `parallel` runs the iterations of `prange` in threads.
    """
    # fastmath stays off: reassociated sums differ between machines, and one ulp moves a crop by a pixel.
    decorator = numba.njit(nogil=True, error_model="numpy", fastmath=False, cache=True, parallel=parallel)
    dispatcher: Any
    try:
        dispatcher = decorator(function)
    except RuntimeError:  # numba can write neither beside the source nor in the user's home
        os.environ["NUMBA_CACHE_DIR"] = _temporary_cache()  # for this process's children too
        numba.config.reload_config()
        dispatcher = decorator(function)
    if dispatcher is function:  # NUMBA_DISABLE_JIT is set
        return function
    # numba's own cache of a function is valid for as long as the function's file alone does not change, whatever it
    # calls in others (numba issue 1833). The digest is a part of the file name rather than of the content, because
    # numba replaces the index before the code: a process that starts in between would load code of the old sources.
    cache, digest = dispatcher._cache, _source_digest(Path(function.__code__.co_filename).parent)
    _remove_stale(cache.cache_path, digest)
    cache._cache_file = IndexDataCacheFile(cache.cache_path, f"{cache._impl.filename_base}-{digest}", digest)
    return dispatcher


@lru_cache
def _source_digest(folder: Path) -> str:
    """Digest of all that compiled functions of a folder depend on: its modules, and this one for the compiler's flags.
    numba itself checks its version and the type of the CPU."""
    modules = [path for path in folder.glob("*.py") if path.stem.isidentifier()]  # not an editor's lock file
    digest = hashlib.sha256()
    for path in (Path(__file__), *sorted(modules)):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@lru_cache
def _remove_stale(folder: str, digest: str) -> None:
    """Remove from a cache folder what was compiled of other sources than those of `digest`."""
    for path in Path(folder).glob("*.nb[ci]"):
        if f"-{digest}." not in path.name:
            with suppress(OSError):  # another process was first, or the folder is read-only
                path.unlink()


def _temporary_cache() -> str:
    """A folder for compiled code that can be trusted: owned by this user, and nobody else can write to it."""
    folder = Path(tempfile.gettempdir()) / f"ckd_dist-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
        return str(folder)
    return tempfile.mkdtemp(prefix=folder.name)

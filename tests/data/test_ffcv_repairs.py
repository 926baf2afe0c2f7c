"""What FFCV is mended to do: compiled code that is kept, and buffers for a batch instead of for the largest image."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace

import numpy as np
import pytest
from numba.core import event

from ckd_dist.data.ffcv_repairs import Epoch
from ckd_dist.data.jit import _temporary_cache
from ckd_dist.data.recipe import ViewRecipe
from tests.helpers.commands import ENVIRONMENT, ROOT
from tests.helpers.views import EVERYTHING, RRC, digests, loader


def test_neither_epochs_nor_loaders_recompile(photographs):
    beton_loader = loader(photographs, RRC, 48)
    digests(beton_loader, np.arange(8), 0)
    with event.install_recorder("numba:compile") as recorder:
        for view_id in range(1, 5):
            digests(beton_loader, np.arange(30), view_id)
        for recipe, size in ((replace(RRC, **EVERYTHING), 48), (ViewRecipe(kind="center_crop"), 32)):
            digests(loader(photographs, recipe, size), np.arange(30), 0)
    assert recorder.buffer == []


def test_compiled_code_is_kept_where_neither_package_nor_home_can_be_written(tmp_path, monkeypatch):
    package = shutil.copytree(ROOT / "ckd_dist", tmp_path / "ckd_dist", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in {path.parent for path in package.rglob("*.py")}:
        (folder / "__pycache__").touch()  # no folder can be made here, by root either
    code = "from ckd_dist.data.views import draws; print(draws.__file__); draws.uniform(1, 2)"
    environment = {**ENVIRONMENT, "HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null", "TMPDIR": str(tmp_path)}
    environment.update(PYTHONPATH=str(tmp_path), NUMBA_CACHE_DIR="")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(package))
    (kept,) = tmp_path.glob("ckd_dist-*")
    assert kept.stat().st_mode & 0o777 == 0o700 and list(kept.rglob("draws.uniform-*"))
    # A folder of that name that somebody else could fill with code is not used.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert _temporary_cache() == str(kept)
    kept.chmod(0o777)
    assert _temporary_cache() != str(kept)
    kept.rename(tmp_path / "elsewhere")
    kept.symlink_to(tmp_path / "elsewhere")
    assert _temporary_cache() != str(kept)


@pytest.mark.parametrize("recipe", [RRC, replace(RRC, **EVERYTHING)], ids=["plain", "mixed"])
def test_buffers_are_in_proportion_to_a_batch_whatever_the_largest_image(photographs, recipe):
    epoch = Epoch(loader(photographs, recipe, 48).pipeline, np.arange(64, dtype=np.uint64), lambda ids: [])

    def held(value):
        return sum(map(held, value)) if isinstance(value, (list, tuple)) else getattr(value, "nbytes", 0)

    slots = epoch.loader.batches_ahead + 2
    images = slots * 32 * 48 * 48 * 3
    labels_and_ids = slots * 32 * 2 * 8
    assert held([*epoch.memory_allocations["operation"].values()]) == (1 + recipe.mixes) * images + labels_and_ids
    epoch.close()

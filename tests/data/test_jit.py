"""Compiled code on disk is that of the sources as they are."""

from __future__ import annotations

import ast
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from numba.core.dispatcher import Dispatcher

from ckd_dist.data.jit import _temporary_cache
from tests.helpers.commands import ENVIRONMENT, ROOT

CALLER = """
from numba.core import event
from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.data.views.geometry import view
with event.install_recorder("numba:compile") as recorder:
    print(view(ViewRecipe(kind="pad_crop"), 0, 0, 0, 32, 32))
print(len(recorder.buffer) > 0)
"""
"""It prints what a function computes with one of another module, and whether anything was compiled."""


def call(checkout: Path, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", CALLER],
        cwd=checkout,
        env={**ENVIRONMENT, "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def compiled_files(folder: Path) -> set[Path]:
    return set(folder.rglob("*.nb[ci]"))


@pytest.fixture()
def checkout(tmp_path) -> Path:
    shutil.copytree(ROOT / "ckd_dist", tmp_path / "ckd_dist", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.parametrize("where", ["beside the source", "NUMBA_CACHE_DIR"])
def test_a_change_of_a_function_reaches_its_callers_in_other_modules(checkout, where, tmp_path):
    environment = {"NUMBA_CACHE_DIR": "" if where == "beside the source" else str(tmp_path / "cache")}
    first, compiles = call(checkout, **environment)
    before = compiled_files(checkout)
    assert compiles == "True" and before
    assert call(checkout, **environment) == [first, "False"]
    draws = checkout / "ckd_dist/data/views/draws.py"
    source, times = draws.read_text(), draws.stat()
    draws.write_text(source.replace("uint64(30)", "uint64(29)"))
    os.utime(draws, ns=(times.st_atime_ns, times.st_mtime_ns))  # as files of a package of fixed times have it
    changed, compiles = call(checkout, **environment)
    assert changed != first and compiles == "True"
    assert not before & compiled_files(checkout), "machine code of the old sources is left"
    assert call(checkout, **environment) == [changed, "False"]


def test_an_index_without_its_code_leads_to_compilation(checkout):
    """numba writes first an index and then the code that it points to: a process may be killed in between."""
    first, _ = call(checkout)
    for path in checkout.rglob("*.nbc"):
        path.unlink()
    assert call(checkout) == [first, "True"]


def test_a_copy_of_the_checkout_has_its_compiled_code(checkout, tmp_path):
    first, _ = call(checkout)
    copy = shutil.copytree(checkout / "ckd_dist", tmp_path / "copy/ckd_dist").parent
    assert call(copy) == [first, "False"]


def modules_with_compiled_functions() -> list[Path]:
    paths = sorted((ROOT / "ckd_dist").rglob("*.py"))
    return [path for path in paths if "import compiled" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize(
    "path", modules_with_compiled_functions(), ids=lambda path: str(path.relative_to(ROOT / "ckd_dist"))
)
def test_compiled_functions_use_names_of_their_own_folder_only(path):
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    foreign = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ckd_dist.")
        if node.module.rpartition(".")[0] != package
        for alias in node.names
    }
    module = importlib.import_module(f"{package}.{path.stem}")
    functions = [each for each in vars(module).values() if isinstance(each, Dispatcher)]
    assert functions
    for function in functions:
        if function.py_func.__module__ == module.__name__:
            assert not foreign & set(function.py_func.__code__.co_names), function


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

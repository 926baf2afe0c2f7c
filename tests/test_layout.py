"""The house keeps its shape: imports point one way."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

# A module may import those of lower floors, and on its own floor only what ALLOWED says.
FLOORS = [
    {"config", "ffcv_mended"},
    {"dist", "files", "process", "recipe"},
    {"losses", "optim", "views", "checkpoint", "log", "mi", "results", "stages"},
    {"data", "models", "store"},
    {"loader", "identity", "classes"},
    {"run_folder", "precision", "beton"},
    {"engine", "lessons"},
    {"training"},
    {"caching", "selection", "findings"},
    {"students", "figures"},
    {"page"},
    {
        "train_teacher",
        "cache_logits",
        "distill",
        "evaluate",
        "select_teacher",
        "bench",
        "compare_codecs",
        "quickstart",
        "study",
        "search",
        "report",
        "lineage",
    },
]
ALLOWED = {("store", "data")}
MODULES = sorted(p for p in (ROOT / "ckd_dist").rglob("*.py") if p.name != "__init__.py")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "ckd_dist":
                yield from ((alias.name, "ckd_dist") for alias in node.names)
            else:
                package, *rest = node.module.split(".")
                yield (rest[0] if rest else package, package)
        elif isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[-1], alias.name.split(".")[0]) for alias in node.names)


def floor(name):
    found = [level for level, names in enumerate(FLOORS) if name in names]
    assert found, f"{name} has no floor: give it one here"
    return found[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = path.relative_to(ROOT / "ckd_dist").parts[0].removesuffix(".py")  # store is one house
    level = len(FLOORS) - 1 if path.name == "__main__.py" else floor(own)
    for name, package in imported(path):
        assert package not in ("data_prep", "launch"), f"{own} imports {package}"
        if package == "ckd_dist" and name != own:
            assert floor(name) < level or (own, name) in ALLOWED, f"{own} imports {name}"


def test_launch_imports_the_configuration_lineage_and_how_processes_end_only():
    for path in (ROOT / "launch").glob("*.py"):
        for name, package in imported(path):
            assert package != "data_prep" and (package != "ckd_dist" or name in ("config", "process", "lineage")), (
                f"{path} imports {name}"
            )


def test_data_prep_imports_nothing_of_ckd_dist():
    for path in (ROOT / "data_prep").glob("*.py"):
        assert all(package != "ckd_dist" for _, package in imported(path)), path


def test_the_train_loop_needs_no_ffcv():
    code = "import sys, ckd_dist.bench.step; sys.exit('ffcv' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

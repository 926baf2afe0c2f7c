"""The house keeps its shape: folders import one way.

`python tests/test_layout.py [CHECKOUT]` counts rooms, floors and imports of this or of another checkout.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("core", "data", "nn", "store", "train", "api", "selection", "search", "report", "studies", "bench")
"""A folder of ckd_dist imports from those before it only; the commands beside them import from all."""
DATA_PREP = (
    *("errors", "progress", "signals", "splits"),
    *(f"sources.{name}" for name in ("decoding", "arrays", "encoded", "pictures", "files", "tars")),
    *(f"sources.{name}" for name in ("imagenet_labels", "imagenet", "layouts", "listed")),
    *(f"sources.{name}" for name in ("tables", "webdataset", "parquet", "datasets")),
    *(f"beton.{name}" for name in ("reader", "workers", "writer")),
    *("options", "parts", "description", "publishing", "write_beton"),
)
"""A module of data_prep imports from those before it only."""


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, `a.b.c` for `from a.b import c`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def modules(root: Path) -> list[Path]:
    return sorted((root / "ckd_dist").rglob("*.py"))


def room(path: Path, root: Path) -> str:
    """The folder of a module under ckd_dist, or the module itself where it lies in none."""
    return path.relative_to(root / "ckd_dist").parts[0].removesuffix(".py")


def imports_between_rooms(root: Path) -> dict[tuple[str, str], int]:
    """(room, room it imports from) -> number of modules of the first that do."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    rooms = {room(path, root) for path in modules(root)} - {"__init__"}
    for path in modules(root):
        own = room(path, root)
        others = {name.split(".")[1] for name in imported(path) if name.startswith("ckd_dist.")}
        for other in (others & rooms) - {own}:
            counts[own, other] += 1
    return dict(counts)


@pytest.mark.parametrize("path", modules(ROOT), ids=lambda path: str(path.relative_to(ROOT)))
def test_folders_import_from_those_before_them_only(path):
    own = room(path, ROOT)
    for name in imported(path):
        package, *rest = name.split(".")
        assert package not in ("data_prep", "launch"), f"{own} imports {name}"
        if package == "ckd_dist" and rest[0] != own:
            level = ORDER.index(own) if own in ORDER else len(ORDER)
            assert rest[0] in ORDER[:level] or own not in ORDER, f"{own} imports {name}"


def test_every_folder_says_what_lives_in_it():
    assert {path.parent.name for path in (ROOT / "ckd_dist").glob("*/__init__.py")} == set(ORDER)
    for name in ORDER:
        assert ast.get_docstring(ast.parse((ROOT / "ckd_dist" / name / "__init__.py").read_text())), name


def test_options_are_read_without_torch():
    code = "import sys, ckd_dist.commands, ckd_dist.store.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_launch_imports_options_lineage_and_how_processes_end_only():
    allowed = ("ckd_dist.core.", "ckd_dist.commands.", "ckd_dist.lineage")
    for path in (ROOT / "launch").glob("*.py"):
        for name in imported(path):
            assert not name.startswith(("data_prep", "ckd_dist")) or name.startswith(allowed), f"{path} imports {name}"


def test_data_prep_imports_nothing_of_ckd_dist():
    for path in (ROOT / "data_prep").rglob("*.py"):
        assert not any(name.startswith("ckd_dist") for name in imported(path)), path


def test_modules_of_data_prep_import_from_those_before_them_only():
    paths = {path for path in (ROOT / "data_prep").rglob("*.py") if path.name != "__init__.py"}
    assert {ROOT / "data_prep" / f"{name.replace('.', '/')}.py" for name in DATA_PREP} == paths
    for position, module in enumerate(DATA_PREP):
        before = tuple(f"data_prep.{name}" for name in DATA_PREP[:position])
        for name in imported(ROOT / "data_prep" / f"{module.replace('.', '/')}.py"):
            assert name.startswith(before) or not name.startswith("data_prep"), f"{module} imports {name}"


def test_the_train_loop_needs_no_ffcv():
    code = "import sys, ckd_dist.bench.step; sys.exit('ffcv' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def main(root: Path) -> None:
    """Print the counts."""
    edges = imports_between_rooms(root)
    needs: dict[str, set[str]] = defaultdict(set)
    for own, other in edges:
        needs[own].add(other)
    sorter, floors = graphlib.TopologicalSorter(needs), 0
    try:
        sorter.prepare()
        while ready := sorter.get_ready():
            floors += 1
            sorter.done(*ready)
        height = str(floors)
    except graphlib.CycleError as error:
        height = f"none: {' -> '.join(error.args[1])}"
    rooms = {room(path, root) for path in modules(root)} - {"__init__"}
    back = [edge for edge in edges if set(edge) <= set(ORDER) and ORDER.index(edge[1]) > ORDER.index(edge[0])]
    print(f"rooms {len(rooms)}, floors {height}, imports between rooms {len(edges)}, back up {len(back)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)

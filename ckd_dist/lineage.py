"""Show what a result was made of, as a tree, and what of it has changed or is gone since.

  python -m ckd_dist.lineage PATH

PATH is whatever this system leaves: a .beton file, a run, one of its checkpoints, a logit store, a selection, a search
or a report. Every line is compared with what is there now. Exit status 1 when something differs or is gone.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckd_dist.core import identity
from ckd_dist.core.errors import UserError, require
from ckd_dist.core.identity import Input, Lineage, read_lineage
from ckd_dist.core.options import Parser, option_words
from ckd_dist.core.process import run_process

OPTION = "PATH"


@dataclass
class Node:
    """Something that a result was made of, or the result itself."""

    name: str
    """The option that named it, if any, and where it is."""
    what: str
    fault: str | None = None
    """How it differs from what it was, if it does."""
    made_of: list[Node] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether it and all that it was made of is there as it was."""
        return self.fault is None and all(node.is_sound for node in self.made_of)


def main() -> int:
    """Read the command line, print the tree; returns the exit status."""
    parser = Parser(prog="python -m ckd_dist.lineage", description=__doc__)
    parser.add_argument("path", type=Path, metavar=OPTION)
    path = parser.parse_args(option_words(sys.argv[1:])).path
    require(path.exists(), f"{OPTION}: no such file or folder: {path}")
    node = trace(path)
    show(node)
    return 0 if node.is_sound else 1


def trace(path: Path) -> Node:
    """What lies at `path`, with all that it was made of; raises `UserError` where it is nothing of this system."""
    return Node(str(path), describe(path), made_of=[_trace_input(*each, path) for each in inputs(path).items()])


def _trace_input(option: str, made_of: Input, result: Path) -> Node:
    path = find(made_of, result)
    node = Node(f"{option}: {path or made_of.path}", made_of.kind)
    if path is None:
        node.fault = "gone"
        return node
    try:
        node.fault = fault(made_of, path)
        if made_of.kind == "foreign" or option == "model.source":  # made elsewhere: nothing tells of what
            what = "a checkpoint of another program" if made_of.kind == "foreign" else "code of the network"
            node.what = f"{what}, sha256:{made_of.holds['sha256'][:12]}"
            return node
        # A file of figures is what a command left in a folder.
        found = trace(path.parent if made_of.kind == "file" else path)
        taken = [name.split()[1] for name in made_of.holds if name.startswith(("checkpoint ", "epoch "))]
        of = f"checkpoint{'s' * (len(taken) > 1)} {', '.join(taken)} of " if taken else ""
        node.what, node.made_of = of + found.what, found.made_of
    except UserError as error:
        node.fault = f"damaged: {error}"
    return node


def find(made_of: Input, result: Path) -> Path | None:
    """Where an input of the `result` is now: where it lay, else what has the end of its path under a folder that the
    result is in, as when both were moved; None where there is neither."""
    there = Path(made_of.path)
    parts = there.parts[1:]
    moved = (parent.joinpath(*parts[start:]) for start in range(len(parts)) for parent in result.resolve().parents)
    return next((path for path in itertools.chain([there], moved) if path.exists()), None)


def changes(path: Path) -> str | None:
    """How an input of the result at `path` differs from what it was made of, in a few words; None where none does. One
    that is gone does not."""
    for option, made_of in inputs(path).items():
        found = find(made_of, path)
        if found is not None and (differs := fault(made_of, found)):
            return f"{option} {found} has changed since ({differs})"
    return None


# ------------------------------------------------------------------------------------------- kinds of results


def inputs(path: Path) -> dict[str, Input]:
    """What the result at `path` was made of, by option; nothing where that is not told."""
    if path.suffix == ".pt" and (path.parent.parent / "config.yaml").exists():
        return inputs(path.parent.parent)
    lineage = _lineage(path)
    return lineage.inputs if lineage else {}


def _lineage(path: Path) -> Lineage | None:
    """Of a folder; that of a store is in its manifest."""
    if not path.is_dir():
        return None
    if not (path / "manifest.json").exists():
        return read_lineage(path, OPTION)
    from ckd_dist.store.manifest import Manifest

    manifest, found = Manifest.load(path, OPTION), {}
    for option, there in manifest.paths.items():
        name, _, run = option.partition(" ")
        weights = {
            values["epoch"]: values["weights_sha256"]
            for member, values in manifest.checkpoints.items()
            if member.rpartition("/")[0] == run
        }
        if name == "data.train":
            found[option] = Input(kind="images", path=there, holds={**manifest.dataset})
        elif name == "teacher.run":
            found[option] = identity.run(there, weights)
        elif name == "STORE":
            store = manifest.as_input(there, manifest.members)
            holds = {key: value for key, value in store.holds.items() if not key.startswith("codec.")}
            found[option] = Input(kind="store", path=there, holds=holds)
    return Lineage(identity=manifest.identity_hash, inputs=found)


def describe(path: Path) -> str:
    """What lies at `path`, in a few words; raises `UserError` where it is nothing of this system."""
    if path.suffix == ".beton":
        from ckd_dist.data.dataset import read_info

        info = read_info(path, OPTION)
        part = f", --holdout {info.holdout[0]}" if info.holdout else ""
        return f"{info.count:,} images of {info.dataset} {info.split}{part}, {info.content_hash[:19]}"
    if path.suffix == ".pt":
        from ckd_dist.core import checkpoint

        state = checkpoint.load(path, OPTION)
        metadata, weights = state.get("metadata") or {}, checkpoint.weights_sha256(state.get("weights", state))
        name = f"{metadata['model']} after epoch {metadata.get('epoch')}, " if "model" in metadata else ""
        return f"{name}weights {weights[:12]}"
    if (path / "manifest.json").exists():
        from ckd_dist.store.manifest import Manifest

        manifest = Manifest.load(path, OPTION)
        names = ", ".join(map(str, manifest.members))
        return f"logits of {manifest.dataset['count']:,} images, checkpoints {names}, {manifest.identity_hash[:12]}"
    kinds = {
        "report.html": "a report",
        "results.csv": "a search",
        "students": "a search that is not complete",
        "selection.json": "a selection",
        "probes.pt": "a selection that is not complete",
        "summary.json": "a run",
        "checkpoints": "a run that is not complete",
        "bench.json": "a benchmark",
    }
    kind = next((kind for name, kind in kinds.items() if (path / name).exists()), None)
    require(kind is not None, f"{OPTION}: {path} is nothing that this system leaves, or nothing is left there yet")
    options, lineage = identity.saved_options(path), _lineage(path)
    model = [f"{options['model.name']}, {options['epochs']} epochs"] if "model.name" in options else []
    older = "of an older version, which did not keep what it was made of"
    return ", ".join([str(kind), *model, lineage.identity[:12] if lineage else older])


# ------------------------------------------------------------------------------------------- then and now


def fault(made_of: Input, path: Path) -> str | None:
    """How what lies at `path` now differs from the input that it was; None where it does not. Raises `UserError` where
    it cannot be read."""
    now = _NOW[made_of.kind](path, made_of.holds)
    then = made_of.holds
    if "label_map" in then:  # classes as they were mapped, not as they are in the file
        then = {key: value for key, value in then.items() if key not in ("label_map", "num_classes")}
    return identity.difference(then, {key: now.get(key) for key in then})


def _images(path: Path, then: dict) -> dict[str, Any]:
    from ckd_dist.data.dataset import read_info

    info = read_info(path, OPTION)
    holds = {**info.as_input().holds, "name": info.dataset}
    if not info.labelled:  # their classes were the teacher's
        holds["num_classes"] = then.get("num_classes")
    return holds


def _weights(path: Path, then: dict) -> dict[str, Any]:
    from ckd_dist.core import checkpoint

    state = checkpoint.load(path, OPTION)
    return {"weights_sha256": checkpoint.weights_sha256(state.get("weights", state))}


def _run(path: Path, then: dict) -> dict[str, Any]:
    from ckd_dist.core import checkpoint

    files, found = checkpoint.trajectory(path, OPTION), {}
    for name in then:
        (epoch,) = map(int, re.findall(r"\d+", name))
        if epoch in files:
            found[name] = _weights(files[epoch], {})["weights_sha256"]
    return found


def _store(path: Path, then: dict) -> dict[str, Any]:
    from ckd_dist.store.manifest import Manifest

    manifest = Manifest.load(path, OPTION)
    return manifest.as_input(path, manifest.members).holds


def _selection(path: Path, then: dict) -> dict[str, Any]:
    from ckd_dist.core import results

    return {"weights_sha256": "+".join(results.read_choice(str(path), OPTION).values())}


def _file(path: Path, then: dict) -> dict[str, Any]:
    from ckd_dist.core.files import file_sha256

    return {"sha256": file_sha256(path)}


def _foreign(path: Path, then: dict) -> dict[str, Any]:
    from ckd_dist.core.files import content_sha256

    return {"sha256": content_sha256(path)}


_NOW: dict[str, Callable[[Path, dict], dict[str, Any]]] = {
    "images": _images,
    "weights": _weights,
    "run": _run,
    "store": _store,
    "selection": _selection,
    "file": _file,
    "foreign": _foreign,
}
"""Kind of an input -> what lies at a path now, in the terms of what it held then."""


# ------------------------------------------------------------------------------------------- screen


def show(node: Node) -> None:
    """Print the tree."""
    from rich.console import Console
    from rich.markup import escape
    from rich.tree import Tree

    shown = set()

    def grow(node: Node) -> Tree:
        state = f"  [red]{escape(node.fault)}[/]" if node.fault else ""
        again = node.made_of and node.name in shown
        tree = Tree(f"[bold]{escape(node.name)}[/]  {escape(node.what)}{state}{'  (as above)' if again else ''}")
        if not again:
            shown.add(node.name)
            tree.children += [grow(each) for each in node.made_of]
        return tree

    width = None if sys.stdout.isatty() else 1000  # a line each, where nobody sees the edge
    Console(highlight=False, width=width).print(grow(node))


if __name__ == "__main__":
    run_process(main)

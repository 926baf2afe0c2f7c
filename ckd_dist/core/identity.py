"""What a result was made of: its options and, by content, its inputs, in lineage.json beside what it left.

An identity is a hash of content: not of paths, times or machines. Whoever goes on in a folder, calls it complete, or
joins it with another compares identities with `require_same`, and two results of equal identity are interchangeable.
`python -m ckd_dist.lineage` shows them as a tree.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from ckd_dist.core.errors import UserError, require
from ckd_dist.core.files import read_json, write_bytes_atomically
from ckd_dist.core.options import flatten, read_yaml

FREE = (
    "recompute",
    "data.workers",
    "data.os_cache",
    "data.verify",
    "teacher.read_ahead",
    "trust",
    "save_last_every",
    "val_every",
    "log_every",
    "tensorboard",
    "log_to",
)
"""Options that change how a result comes about, not what it is."""
ADDED: dict[str, Any] = {
    **dict.fromkeys(
        f"data.{name}" for name in ("policy", "operations", "magnitude", "grayscale", "blur", "solarize", "mix")
    ),
    "data.repeats": 1,
    "data.pair_mixup": 0.0,
    "data.pair_cutmix": 0.0,
    "teacher.calibration": None,
    "accumulate": 1,
    "label_loss": "cross_entropy",
    "kd.feature_weight": 0.0,
    "optim.layer_decay": None,
    "optim.cycles": 1,
}
"""Options that older versions lack, with what those did: what says the same has the same identity."""
RESULTS = ("selection.json", "results.csv")
"""What a selection and a search leave when they are complete."""


# ------------------------------------------------------------------------------------------- inputs


Kind = Literal["images", "weights", "run", "store", "selection", "file", "foreign"]


@dataclass(frozen=True, kw_only=True)
class Input:
    """What a result was made of: an option's file or folder."""

    kind: Kind
    path: str
    """Where it lay then, absolute: to find it again."""
    holds: dict[str, Any]
    """What it held: inputs that hold the same are interchangeable."""

    @classmethod
    def of(cls, kind: Kind, path: str | Path, holds: dict[str, Any]) -> Input:
        """What lies at `path`, and holds this."""
        return cls(kind=kind, path=os.path.abspath(path), holds=holds)


def weights(path: str | Path, weights_sha256: str) -> Input:
    """A file of weights, by `checkpoint.weights_sha256`."""
    return Input.of("weights", path, {"weights_sha256": weights_sha256})


def run(path: str | Path, weights_sha256: Mapping[int, str]) -> Input:
    """A teacher's run: some of its checkpoints, epoch -> `checkpoint.weights_sha256`."""
    return Input.of("run", path, {f"epoch {epoch}": weights for epoch, weights in sorted(weights_sha256.items())})


def selection(folder: str | Path, weights_sha256: str) -> Input:
    """A run of select_teacher, or a race, by the weights of what it chose, joined by +."""
    return Input.of("selection", folder, {"weights_sha256": weights_sha256})


def file(path: str | Path, sha256: str) -> Input:
    """Any other file, by `files.file_sha256`."""
    return Input.of("file", path, {"sha256": sha256})


def foreign(path: str | Path, sha256: str) -> Input:
    """A checkpoint of another program, a file or a folder, by `files.content_sha256`."""
    return Input.of("foreign", path, {"sha256": sha256})


def option_of(name: str) -> str:
    """The option that named an input: `files`, which names several, of `files 20`."""
    return name.partition(" ")[0]


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What differs between what an input held and what it holds, in a few words; None where nothing does."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    named = [f"{key} was {_short(before.get(key))}, is {_short(now.get(key))}" for key in keys[:2]]
    return "; ".join(named + [f"{len(keys) - 2} more"] * (len(keys) > 2)) or None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:19]}..."


# ------------------------------------------------------------------------------------------- origin


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a result comes from. The same origin gives the same result, on CPUs bitwise."""

    requested: dict[str, Any] = field(default_factory=dict)
    """Options as the user gave them, in sections: config.yaml."""
    resolved: dict[str, Any] = field(default_factory=dict)
    """As they were resolved: precision, views, the teacher's checkpoints."""
    inputs: dict[str, Input] = field(default_factory=dict)
    """Of each option that names one; of one that names several, `OPTION NAME` each."""

    @cached_property
    def options(self) -> dict[str, Any]:
        """The resolved options, with dotted keys."""
        return flatten(self.resolved)

    @property
    def identity(self) -> str:
        """sha256 of all that decides the result: options without paths, and the content of inputs."""
        left_out = {*FREE, *map(option_of, self.inputs), "run_dir"}
        values = {
            key: value
            for key, value in self.options.items()
            if key not in left_out and not (key in ADDED and value == ADDED[key])
        }
        holds = {option: each.holds for option, each in self.inputs.items()}
        return hashlib.sha256(json.dumps([values, holds], sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write config.yaml, the options as requested, if there are any, and lineage.json, what they became."""
        if self.requested:
            write_bytes_atomically(folder / "config.yaml", yaml.safe_dump(self.requested, sort_keys=False).encode())
        requested = flatten(self.requested)
        Lineage(
            identity=self.identity,
            resolved={key: value for key, value in self.options.items() if value != requested.get(key)},
            inputs=self.inputs,
        ).write(folder)


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """lineage.json."""

    format: Literal[1] = 1
    identity: str
    resolved: dict[str, Any] = field(default_factory=dict)
    """What options became that were resolved, with dotted keys."""
    inputs: dict[str, Input] = field(default_factory=dict)

    __pydantic_config__ = {"extra": "forbid"}

    def write(self, folder: Path) -> None:
        """Write lineage.json, atomically."""
        write_bytes_atomically(folder / "lineage.json", (json.dumps(asdict(self), indent=2) + "\n").encode())


def read_lineage(folder: Path, option: str) -> Lineage | None:
    """lineage.json of a folder, None where there is none; raises `UserError` where it is damaged."""
    path = folder / "lineage.json"
    return read_json(path, Lineage, option, "restore it, or choose another folder") if path.exists() else None


def saved_options(folder: Path) -> dict[str, Any]:
    """The resolved options of the run in `folder`, with dotted keys; empty where there is none: a try that ended before
    it saved anything is no run. Raises `UserError` where they are damaged."""
    path = folder / "config.yaml"
    if not _holds_work(folder) or not path.exists():
        return {}
    try:
        options = flatten(read_yaml(path, "run_dir"))
    except UserError as error:
        raise UserError(f"{error}: restore it, or choose another run_dir") from None
    lineage = read_lineage(folder, "run_dir")
    return {**options, **(lineage.resolved if lineage else {})}


def _holds_work(folder: Path) -> bool:
    """Whether a command has saved anything in `folder`."""
    return any((folder / name).exists() for name in ("summary.json", *RESULTS)) or any(folder.rglob("*.pt"))


def require_same(folder: Path, origin: Origin) -> bool:
    """Raise `UserError` when `folder` holds a run of other options or inputs; returns whether all could be compared: an
    older version did not keep what inputs held.

    Paths may differ where their content does not. More epochs are no other origin where the run would have gone the
    same way with them from the start.
    """
    old = saved_options(folder)
    if not old:
        return True
    lineage = read_lineage(folder, "run_dir")
    new, requested = origin.options, flatten(origin.requested)
    compared = lineage.inputs.keys() & origin.inputs.keys() if lineage else set()
    for key in sorted((old.keys() | new.keys()) - {*FREE, "run_dir", *map(option_of, compared)}):
        before, now = (options.get(key, ADDED.get(key)) for options in (old, new))
        why = ""
        if key == "epochs" and isinstance(before, int) and before < new[key] and "grid" not in origin.resolved:
            depends = _depends_on_epochs(new)
            if depends is None:
                continue
            why = f", and {depends} depends on their number"
        same = before == now or (lineage is None and before == requested.get(key))
        message = f"run_dir: {folder} holds a run with {key} {before}, not {now}{why}"
        require(same, f"{message}: repeat its options to go on, or choose another run_dir")
    if lineage is None:
        return not origin.inputs
    for option in sorted(compared):
        then, here = lineage.inputs[option], origin.inputs[option]
        differs = difference(then.holds, here.holds)
        changed = f"{here.path} has changed since" if here.path == then.path else f"{then.path}, not {here.path}"
        require(
            differs is None,
            f"run_dir: {folder} holds a run made of another {option}, {changed} ({differs}): put back what it was made "
            "of, or choose another run_dir",
        )
    return True


def _depends_on_epochs(options: dict[str, Any]) -> str | None:
    """What makes the first epochs of a training depend on how many there are in all, if anything does."""
    if options["optim.schedule"] in ("cosine", "linear", "trapezoid"):
        return f"optim.schedule {options['optim.schedule']}"
    if options["data.start_image_size"] is not None:
        return "data.start_image_size"
    if options.get("kd.feature_weight"):
        return "the warm-up of kd.feature_weight"
    if options.get("teacher.combine") == "sequence":
        return "teacher.combine sequence"
    return None

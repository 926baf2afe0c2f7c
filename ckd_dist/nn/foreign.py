"""Checkpoints that other programs wrote: what such a file holds, and which of it are the weights of a network.

Nothing of a file is executed. `torch.load` reads it with weights_only; where it names classes of other programs, as
those of saved options, a stand-in that keeps nothing takes their place, and any other name is refused.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ckd_dist.core.errors import UserError, require
from ckd_dist.core.files import require_regular
from ckd_dist.nn.weights import read_safetensors

# ------------------------------------------------------------------------------------------- reading


class _Unread(list):
    """What stands for an object of another program: it takes any arguments and any state, and keeps none."""

    def __init__(self, *_: object) -> None:
        super().__init__()

    def __setstate__(self, _: object) -> None:
        pass


def _empty_dict(*_: object) -> dict:
    return {}


_UNREAD = (
    "argparse.Namespace",
    *(f"builtins.{name}" for name in ("dict", "float", "frozenset", "int", "list", "str", "tuple", "slice")),
    "collections.deque",
    "datetime.datetime",
    "datetime.timedelta",
    *(f"{module}.scalar" for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    *(f"{module}._reconstruct" for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.dtypes.{name}DType" for name in ("Float16", "Float32", "Float64", "Int32", "Int64", "Bool", "UInt32")),
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata", "SCMode")),
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    *(f"omegaconf.nodes.{name}Node" for name in ("Any", "Boolean", "Float", "Integer", "String")),
    *(f"{module}.{flavour}Path" for module in ("pathlib", "pathlib._local") for flavour in ("Posix", "Windows")),
    *(f"{module}.Pure{flavour}Path" for module in ("pathlib", "pathlib._local") for flavour in ("Posix", "Windows")),
    "torchvision.transforms.functional.InterpolationMode",
    "typing.Any",
)
"""Classes that options, random states and figures beside weights are of: none of them is needed."""
_DICTS = (
    *(f"{package}.utilities.data.AttributeDict" for package in ("lightning_fabric", "lightning.fabric")),
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
)


def read(path: str | Path, option: str, *, trust: bool = False) -> Mapping[str, Any]:
    """What a checkpoint holds: dicts of tensors, numbers and strings, nested as they were saved; on the CPU.

    A file of torch.save in either format, a safetensors file, or a folder of torch.distributed.checkpoint, whose index
    is a pickle that runs what it names: only with `trust`. Raises `UserError`, naming `option`, for anything else.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, option, trust)
    require_regular(path, option)
    with open(path, "rb") as file:
        start = file.read(9)
    content: Any = read_safetensors(str(path), option) if start[8:] == b"{" else _read_torch(path, option)
    require(
        isinstance(content, Mapping),
        f"{option}: {path} holds a {type(content).__name__}, not a dict of weights: save the model's state_dict()",
    )
    return content


def _read_torch(path: Path, option: str) -> Any:
    stand_ins: list[Any] = [*((_Unread, name) for name in _UNREAD), *((dict, name) for name in _DICTS)]
    stand_ins.append((_empty_dict, "collections.defaultdict"))
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here: for a damaged archive, a pickle that it refuses, ...
        raise UserError(f"{option}: {path} {_why_unread(path, str(error))}") from None


def _why_unread(path: Path, error: str) -> str:
    """What is wrong with a file that torch does not load, and the mend."""
    if found := re.search(r"GLOBAL (\S+)", error):
        names = _names_in(path)
        if any(name.startswith(("torch.nn.modules.", "torch._dynamo.")) for name in {*names, found[1]}):
            return (
                f"holds a whole network ({found[1]}), which only its code could build: load it there and save its "
                "state_dict()"
            )
        return (
            f"holds a {found[1]}, which might run code: load it where it was written and save the model's state_dict() "
            "alone"
        )
    if "DTensor" in error:
        return "holds parts of a sharded training (DTensor): gather them first, with full_state_dict=True"
    if "TorchScript" in error:
        return "is a program of TorchScript: load it with torch.jit.load and save its state_dict()"
    with open(path, "rb") as file:
        is_archive = file.read(2) == b"PK"
    if is_archive or "storage" in error or "EOF" in error or "Ran out of input" in error:
        return "is damaged or cut short: copy it again"
    return "is no checkpoint: name a file of torch.save or of safetensors"


def _names_in(path: Path) -> list[str]:
    """Classes and functions that a file of the zip format names; none of another."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # of a pickle that torch does not read any further
        return []


def _read_folder(path: Path, option: str, trust: bool) -> Any:
    """A folder of torch.distributed.checkpoint, as FSDP saves it."""
    require(
        (path / ".metadata").is_file(),
        f"{option}: {path} is a folder, but none of torch.distributed.checkpoint: name a checkpoint in it",
    )
    require(
        trust,
        f"{option}: {path}/.metadata is a pickle, which runs what it names when it is read: give --trust true if you "
        "know who wrote it",
    )
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.pt"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp_to_torch_save(str(path), whole)
        except (Exception, CheckpointException) as error:  # of a damaged index, of shards that are gone, ...
            ranks = error.failures.values() if isinstance(error, CheckpointException) else []
            cause = next((each[0] for each in ranks), error)
            why = (str(cause).splitlines() or [type(cause).__name__])[0][:100]
            raise UserError(f"{option}: {path} is damaged ({why}): copy it again") from None
        return _read_torch(whole, option)


def epoch_of(content: Mapping[str, Any]) -> int | None:
    """The entry `epoch` of a checkpoint, also of one of this system; None where it has none."""
    metadata = content.get("metadata")
    for holder in (content, metadata if isinstance(metadata, Mapping) else {}):
        if isinstance(holder.get("epoch"), int):
            return holder["epoch"]
    return None


# ------------------------------------------------------------------------------------------- fitting

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
"""What torch.compile, FSDP, activation checkpointing, and DDP or AveragedModel put into names, at any level."""
COUNTERS = "num_batches_tracked"
"""A buffer that batch norm has since PyTorch 0.4.1; an older file lacks it, and nothing depends on it."""
LEFT_OUT = re.compile(r"n_averaged$|(aux1|aux2|AuxLogits)\.|(.*\.)?total_(ops|params)$")
"""Beside a network's own: AveragedModel's counter, the heads that train GoogLeNet and Inception, what thop counts."""


@dataclass(frozen=True)
class Candidate:
    """Tensors of a checkpoint that might be the weights of a network."""

    key: str
    """Where in the file: dotted, the names' own prefix included; empty: the file itself."""
    tensors: dict[str, torch.Tensor]
    """Under the names that the network has."""
    beside: int
    """Tensors of the same dict that are under no such name."""


@dataclass(frozen=True)
class Fit:
    """The weights of a network, as they were found in a checkpoint."""

    key: str
    """Of the candidate."""
    weights: dict[str, torch.Tensor]
    """What `load_state_dict` takes."""
    others: list[str]
    """Keys of further candidates that fit."""
    notes: list[str]
    """What was done to them, in words."""


def fit(content: Mapping[str, Any], model: nn.Module, name: str, what: str, key: str | None = None) -> Fit:
    """The weights of the `model`, called `name`, in what `read` gave of the checkpoint `what`: the first dict, in the
    file's order, that fits, or the one at `key`.

    Raises `UserError` where none does: the message names the tensors of the nearest one that do not, and shapes.
    """
    own = model.state_dict()
    found = list(candidates(content, own))
    keys = ", ".join(each.key or "the file itself" for each in found)
    first = next(iter(own), "none")
    require(bool(found), f"{what} holds no tensor under a name of {name}, such as {first}: choose another --model.name")
    if key is not None:
        chosen = [each for each in found if each.key == key or each.key.startswith(f"{key}.")]
        require(bool(chosen), f"key: {what} has no weights at {key}; there are: {keys}")
        found = chosen
    faults = [_faults(each.tensors, own) for each in found]
    fitting = [each for each, wrong in zip(found, faults, strict=True) if not wrong]
    if not fitting:
        nearest = min(range(len(found)), key=lambda number: len(faults[number]))
        wrong, place = faults[nearest], f" at {found[nearest].key}" * bool(found[nearest].key)
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{what}{place} does not fit {name}: {'; '.join(wrong[:3])}{more}: choose another --model.name")
    taken = fitting[0]
    weights, notes = _as_own(taken.tensors, own)
    if taken.beside:
        notes.append(f"{taken.beside} tensors beside it left out")
    return Fit(taken.key, weights, [each.key for each in fitting[1:]], notes)


def candidates(content: Mapping[str, Any], own: Mapping[str, torch.Tensor]) -> Iterator[Candidate]:
    """Every dict of tensors in a checkpoint, and every prefix of its names, with which some names are those of the
    network, whose state dict `own` is; in the order of the file."""
    wrappers = set(WRAPPERS) - {part for name in own for part in name.split(".")}
    for path, tensors in _dicts_of_tensors(content):
        plain = {".".join(p for p in name.split(".") if p not in wrappers): each for name, each in tensors.items()}
        if len(plain) < len(tensors):  # two names would be one
            plain = tensors
        counts: dict[str, int] = {}
        for name in plain:
            parts = name.split(".")
            for start in range(len(parts)):
                if ".".join(parts[start:]) in own:
                    prefix = "".join(f"{part}." for part in parts[:start])
                    counts[prefix] = counts.get(prefix, 0) + 1
        for prefix, count in counts.items():
            if 2 * count < max(counts.values()):  # names that happen to end alike
                continue
            below = {name.removeprefix(prefix): each for name, each in plain.items() if name.startswith(prefix)}
            key = ".".join(part for part in (path, prefix.rstrip(".")) if part)
            yield Candidate(key, below, len(plain) - len(below))


def _dicts_of_tensors(
    content: Mapping, path: str = "", seen: frozenset[int] = frozenset()
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """(dotted path, tensors by name) of every dict in nested ones that has tensors under names."""
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if tensors:
        yield path, tensors
    for key, value in content.items():
        if isinstance(value, Mapping) and id(value) not in seen:  # a pickle may hold itself
            yield from _dicts_of_tensors(value, f"{path}.{key}" if path else str(key), seen | {id(content)})


def _faults(tensors: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> list[str]:
    """Why tensors are not the weights of a network, a tensor each."""
    faults = []
    for name, wanted in own.items():
        given = tensors.get(name)
        if given is None:
            if not name.endswith(COUNTERS):
                faults.append(f"{name} {_shape(wanted)} is not in the file")
        elif given.shape != wanted.shape:
            faults.append(f"{name} is {_shape(given)} in the file, {_shape(wanted)} in the model")
        elif fault := _fault_of_values(given, wanted):
            faults.append(f"{name} {_shape(given)} {fault}")
    extra = [name for name in tensors if name not in own and not LEFT_OUT.match(name) and not name.endswith(COUNTERS)]
    return faults + [f"{name} {_shape(tensors[name])} is not in the model" for name in extra]


def _fault_of_values(given: torch.Tensor, wanted: torch.Tensor) -> str | None:
    """What is wrong with a tensor of the right shape."""
    if type(given) not in (torch.Tensor, nn.Parameter) or given.layout != torch.strided or given.is_quantized:
        return "is no plain tensor"
    if given.is_meta:
        return "has no values (it is of the device meta)"
    if given.is_floating_point() != wanted.is_floating_point() or given.is_complex():
        return f"is of {given.dtype}, not {wanted.dtype}"
    if given.is_floating_point() and not torch.isfinite(given.float()).all():
        return "holds values that are not finite"
    return None


def _shape(tensor: torch.Tensor) -> str:
    return str(tuple(tensor.shape))


def _as_own(
    tensors: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors in the types of the network, and what that did to them, in words."""
    weights, notes, types = {}, [], set()
    for name, wanted in own.items():
        if name in tensors:
            given = tensors[name].detach()
            types |= {given.dtype} - {wanted.dtype}
            weights[name] = given.to(wanted.dtype).clone()
        else:
            weights[name] = torch.zeros(wanted.shape, dtype=wanted.dtype)
    for each in sorted(types, key=str):
        exactly = "rounded" if each == torch.float64 else "exactly"
        notes.append(f"{str(each).removeprefix('torch.')} taken as float32, {exactly}")
    if any(name not in tensors for name in own):
        notes.append(f"{COUNTERS} is not in it: 0")
    extra = [name for name in tensors if name not in own]
    if extra:
        notes.append(f"left out: {', '.join(extra[:3])}{f' and {len(extra) - 3} more' if len(extra) > 3 else ''}")
    return weights, notes

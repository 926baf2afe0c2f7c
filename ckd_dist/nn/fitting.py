"""Which tensors of a checkpoint that another program wrote are the weights of a network."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ckd_dist.core.errors import UserError, require

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
    """The weights of the `model`, called `name`, in what `foreign.read` gave of the checkpoint `what`: the first dict,
    in the file's order, that fits, or the one at `key`.

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
        misfits = any(" in the file" in each or " in the model" in each for each in wrong)
        mend = "choose another --model.name" if misfits else "save them as plain, finite tensors of these types"
        raise UserError(f"{what}{place} does not fit {name}: {'; '.join(wrong[:3])}{more}: {mend}")
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
    named = {str(key): value for key, value in content.items() if str(key).isprintable()}  # messages show them
    tensors = {key: value for key, value in named.items() if isinstance(value, torch.Tensor)}
    if tensors:
        yield path, tensors
    for key, value in named.items():
        if isinstance(value, Mapping) and id(value) not in seen:  # a pickle may hold itself
            yield from _dicts_of_tensors(value, f"{path}.{key}" if path else key, seen | {id(content)})


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
        return f"is a {type(given).__name__} of layout {str(given.layout).removeprefix('torch.')}, no plain tensor"
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
            if given.is_floating_point():
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

"""Weights from files, and from what torchvision, timm and transformers publish, into networks that they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ckd_dist.core import checkpoint, dist, identity
from ckd_dist.core.errors import UserError, first_line, require
from ckd_dist.core.files import content_sha256, file_sha256
from ckd_dist.core.identity import Input
from ckd_dist.nn import fitting, foreign
from ckd_dist.nn.options import ModelConfig

OPTION = "model.weights"
Weights = dict[str, torch.Tensor]


def load_fitting(model: nn.Module, weights: Any, what: str, name: str) -> None:
    """`model.load_state_dict`; raises `UserError` where names or shapes of the weights, which come from `what`, are not
    those of the model `name`."""
    named = isinstance(weights, dict) and all(isinstance(each, torch.Tensor) for each in weights.values())
    require(named, f"{what} holds no weights")
    differing = differences(model, weights)
    more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
    require(not differing, f"{what} does not fit {name}: {'; '.join(differing[:3])}{more}")
    model.load_state_dict(weights)


def differences(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> list[str]:
    """For each tensor that keeps the weights from being loaded, its name and what is wrong with it."""
    own = model.state_dict()
    return [
        *(f"{key} is missing, {_shape(own[key])}" for key in own if key not in weights),
        *(f"{key} is not of it, {_shape(weights[key])}" for key in weights if key not in own),
        *(
            f"{key} is {_shape(weights[key])}, the network's {_shape(own[key])}"
            for key in own
            if key in weights and weights[key].shape != own[key].shape
        ),
    ]


def _shape(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))


# ------------------------------------------------------------------------------------------- initial weights


def initial_input(config: ModelConfig) -> Input | None:
    """What a result that begins with model.weights depends on; None where a library and a name decide. Collective where
    the weights are published; raises `UserError` where there are none."""
    given = config.weights
    assert given is not None
    content = _content(config.name, given)
    if not is_published(given):
        weights = content.get("weights", content)
        of_torch = isinstance(weights, dict) and not given.endswith(".safetensors")
        if of_torch and all(isinstance(each, torch.Tensor) for each in weights.values()):
            return identity.weights(given, checkpoint.weights_sha256(weights))
        return identity.foreign(given, content_sha256(Path(given)))
    files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    paths = [Path(config.name.removeprefix("hf/")) / each for each in files] if config.name.startswith("hf/") else []
    found = next((path for path in paths if path.is_file()), None)
    return identity.file(found, file_sha256(found)) if found else None


def load_initial(model: nn.Module, config: ModelConfig, heads: Sequence[str]) -> list[str]:
    """Load what model.weights stands for: a file of `foreign.read`, of which `fitting.fit` takes what fits, or
    published weights, of which, where they are of other classes, those of the `heads`, names of the modules that make
    the logits, are left out. Returns what is to be said of them; raises `UserError` where they do not fit the model."""
    assert config.weights is not None
    content, what = _content(config.name, config.weights), f"{OPTION}: {config.weights}"
    if not is_published(config.weights):
        found = fitting.fit(content, model, config.name, what)
        model.load_state_dict(found.weights)
        return found.notes
    own = model.state_dict()
    of_heads = [key for key in own if key.rpartition(".")[0] in heads and key in content]
    left_out = [key for key in of_heads if content[key].shape != own[key].shape]
    load_fitting(model, {**content, **{key: own[key] for key in left_out}}, what, config.name)
    return [f"it is of other classes: {', '.join(left_out)} start anew"] if left_out else []


@lru_cache(maxsize=1)  # many students of a search begin with the same
def _content(name: str, given: str) -> Mapping[str, Any]:
    """What a file of weights holds or, where there is no such file, the weights that the library of the network `name`
    publishes; rank 0 downloads them first."""
    if not is_published(given):
        return foreign.read(given, OPTION)
    dist.on_main(lambda: bool(_published(name, given)))
    return _published(name, given)


def is_published(given: str) -> bool:
    """Whether model.weights is the name of published weights, not a file."""
    return not Path(given).exists() and not Path(given).suffix and "/" not in given


def _published(name: str, given: str) -> Weights:
    """The weights that a library publishes for the network `name` as `given`; DEFAULT are those that it recommends."""
    try:
        if name.startswith("timm/"):
            import timm

            tag = name.removeprefix("timm/") + ("" if given == "DEFAULT" else f".{given}")
            return timm.create_model(tag, pretrained=True).state_dict()
        if name.startswith("hf/"):
            return foreign.pretrained(name.removeprefix("hf/"))
        from torchvision.models import get_model_weights

        known = get_model_weights(name)
        names = list(known.__members__)
        require(given in names or given == "DEFAULT", f"{OPTION}: no file {given}, and {name} has {', '.join(names)}")
        return (known.DEFAULT if given == "DEFAULT" else known[given]).get_state_dict(progress=False, check_hash=True)
    except UserError:
        raise
    except Exception as error:  # no such weights, no network, no room
        why = first_line(error)
        raise UserError(
            f"{OPTION}: no file {given}, and published weights of that name for {name} could not be had ({why}): "
            "name a file, or get a network"
        ) from None

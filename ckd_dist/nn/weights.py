"""Weights from files, and from what torchvision, timm and transformers publish, into networks that they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ckd_dist.core import checkpoint, dist
from ckd_dist.core.errors import UserError, require
from ckd_dist.core.files import file_sha256, require_regular
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


def initial_weights(config: ModelConfig) -> tuple[Weights, str]:
    """The weights that model.weights stands for and their sha256: a file with a state dict (torch or safetensors), a
    checkpoint of this system or, where there is no such file, published weights of the network's library by their name.

    Collective where they are published: rank 0 downloads them first. Raises `UserError` where there are none.
    """
    assert config.weights is not None
    return _weights(config.name, config.weights)


@lru_cache(maxsize=1)  # many students of a search begin with the same
def _weights(name: str, given: str) -> tuple[Weights, str]:
    if is_published(given):
        dist.on_main(lambda: bool(_published(name, given)))
        weights = _published(name, given)
    else:
        weights = read_weights(given, OPTION)
    return weights, checkpoint.weights_sha256(weights)


def read_weights(path: str, option: str) -> Weights:
    """The state dict in a file; raises `UserError` where there is none."""
    if path.endswith(".safetensors"):
        require_regular(Path(path), option)
        weights: Any = read_safetensors(path, option)
    else:
        state = checkpoint.load(path, option)
        weights = state.get("weights", state)
    named = isinstance(weights, dict) and all(isinstance(each, torch.Tensor) for each in weights.values())
    require(named and bool(weights), f"{option}: {path} holds no weights")
    return weights


def read_safetensors(path: str, option: str) -> Weights:
    """All tensors of a file; raises `UserError` where it is damaged, or the library is missing."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError:
        raise UserError(f"{option}: safetensors is not installed: pip install 'ckd_dist[export]'") from None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{option}: {path} is no whole safetensors file ({error}): get it anew") from None


def is_published(given: str) -> bool:
    """Whether model.weights is the name of published weights, not a file."""
    return not Path(given).exists() and not Path(given).suffix and "/" not in given


def published_file(name: str) -> tuple[Path, str] | None:
    """(path, sha256) of the file whose content decides what published weights are: of a folder of transformers its
    weights, or the index of them; None where a library and a name decide."""
    files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    paths = [Path(name.removeprefix("hf/")) / file for file in files] if name.startswith("hf/") else []
    found = next((path for path in paths if path.is_file()), None)
    return (found, file_sha256(found)) if found else None


def _published(name: str, given: str) -> Weights:
    """The weights that a library publishes for the network `name` as `given`; DEFAULT are those that it recommends."""
    try:
        if name.startswith("timm/"):
            import timm

            tag = name.removeprefix("timm/") + ("" if given == "DEFAULT" else f".{given}")
            return timm.create_model(tag, pretrained=True).state_dict()
        if name.startswith("hf/"):
            import transformers

            folder = name.removeprefix("hf/")
            load = transformers.AutoModelForImageClassification.from_pretrained
            return load(folder, local_files_only=True, trust_remote_code=False).state_dict()
        from torchvision.models import get_model_weights

        known = get_model_weights(name)
        names = list(known.__members__)
        require(given in names or given == "DEFAULT", f"{OPTION}: no file {given}, and {name} has {', '.join(names)}")
        return (known.DEFAULT if given == "DEFAULT" else known[given]).get_state_dict(progress=False, check_hash=True)
    except UserError:
        raise
    except Exception as error:  # no such weights, no network, no room
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{OPTION}: no file {given}, and published weights of that name for {name} could not be had ({why}): "
            "name a file, or get a network"
        ) from None


def load_initial(model: nn.Module, config: ModelConfig, heads: Sequence[str]) -> list[str]:
    """Load the `initial_weights`; of published ones for another number of classes, all but those of the `heads`, names
    of the modules that make the logits. Returns the names of the tensors that were left out; raises `UserError` where
    weights do not fit the model."""
    assert config.weights is not None
    weights, own = dict(initial_weights(config)[0]), model.state_dict()
    left_out = []
    if is_published(config.weights):
        of_heads = [key for key in own if key.rpartition(".")[0] in heads and key in weights]
        left_out = [key for key in of_heads if weights[key].shape != own[key].shape]
    load_fitting(model, {**weights, **{key: own[key] for key in left_out}}, f"{OPTION}: {config.weights}", config.name)
    return left_out

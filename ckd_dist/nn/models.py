"""Networks by name: CIFAR networks, torchvision's, timm's, those of transformers, and code of the user's own."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ckd_dist.core import checkpoint
from ckd_dist.core.console import say
from ckd_dist.core.errors import UserError, require
from ckd_dist.core.files import file_sha256
from ckd_dist.nn.cifar import NETWORKS
from ckd_dist.nn.probe import prepare
from ckd_dist.nn.weights import load_fitting

OPTION = "model.name"


def build_model(name: str, num_classes: int, options: Mapping[str, Any] | None = None) -> nn.Module:
    """A network, freshly initialised: float32 [n, 3, h, w] -> logits [n, num_classes], or an output that `logits_of`
    finds them in. It is to go through `probe.prepare` before it is used.

    `name` is a name of `model_names`, timm/NAME, hf/FOLDER, FILE.py:NAME or package.module:NAME, whose code is run;
    `options` are arguments of what is called. Raises `UserError` where there is no such network, or it cannot be built.
    """
    make, arguments = _maker(name, num_classes)
    arguments |= dict(options or {})
    try:
        model = make(**arguments)
    except UserError:
        raise
    except Exception as error:  # other people's code may object in any way
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        why = f"cannot be built with {given} ({_words(error)})"
        raise UserError(f"{OPTION}: {name} {why}: see --model.options") from None
    require(isinstance(model, nn.Module), f"{OPTION}: {name} gives a {type(model).__name__}, not a torch.nn.Module")
    require(next(model.parameters(), None) is not None, f"{OPTION}: {name} has no parameters to train")
    return model


def _maker(name: str, num_classes: int) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What makes the network `name`, and its arguments unless options say otherwise."""
    classes = {"num_classes": num_classes}
    if name in NETWORKS:
        return NETWORKS[name], classes
    if name.startswith("timm/"):
        return timm().create_model, {"model_name": name.removeprefix("timm/"), **classes}
    if name.startswith("hf/"):
        return _transformers_model, {"folder": name.removeprefix("hf/"), "num_labels": num_classes}
    if is_code(name):
        make = _own(name)
        return make, classes if _takes(make, "num_classes") else {}
    import torchvision  # takes more than a second

    known = model_names()
    near = difflib.get_close_matches(name, known, n=3) or known[:6]
    require(
        name in known,
        f"{OPTION}: no model {name}; did you mean {' or '.join(near)}? Others are timm/NAME, hf/FOLDER, FILE.py:NAME "
        "and package.module:NAME",
    )
    heads = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model_builder(name), {"weights": None, **classes, **heads}


def model_names() -> list[str]:
    """Every name that `build_model` accepts and that is of no other library."""
    import torchvision

    return [*NETWORKS, *torchvision.models.list_models(module=torchvision.models)]


def load_model(path: str | Path, option: str, code: str | None = None) -> tuple[nn.Module, dict]:
    """The network of a training checkpoint with its weights, ready for images of the size that it was trained at, and
    the checkpoint's metadata. `code` names the network where it is of the user's own code: a file of weights must not
    say what is run. Raises `UserError` that names `option`."""
    state = checkpoint.load(path, option, checkpoint.KeptState, "name a file epoch_*.pt of a run")
    metadata = state["metadata"]
    name, place = metadata["model"], option.rpartition(".")[0]
    said = f"--{place}.model" if place else "--model"
    if is_code(name):
        require(
            code is not None,
            f"{option}: {path} is of {name}, code of your own, which a file of weights cannot be trusted to name: "
            f"if it is to be run, add {said} {name}",
        )
    else:
        require(code is None, f"{option}: {path} is of {name}, no code of your own: leave {said} out")
    model = build_model(code or name, metadata["num_classes"], metadata.get("options"))
    source, trained_with = defining_file(code or name), metadata.get("source_sha256")
    if source and trained_with and source[1] != trained_with:
        say(f"warning: {source[0]} has changed since {path} was trained")
    model = prepare(model, name, metadata["num_classes"], metadata["image_size"], option)
    load_fitting(model, state["weights"], f"{option}: {path}", name)
    return model, metadata


# ------------------------------------------------------------------------------------------- other libraries


def timm(module: str = "timm", option: str = OPTION) -> ModuleType:
    """A module of that library; raises `UserError` where it is not installed."""
    return _import(module, "timm", "ckd_dist[timm]", option)


def _transformers_model(folder: str, **options: Any) -> nn.Module:
    transformers = _import("transformers", "transformers", "ckd_dist[hf]")
    require((Path(folder) / "config.json").is_file(), f"{OPTION}: hf/{folder} is no folder with a config.json")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    return transformers.AutoModelForImageClassification.from_config(config, trust_remote_code=False)


def _import(module: str, library: str, extra: str, option: str = OPTION) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{option}: {library} is not installed: pip install '{extra}'") from error


@dataclass(frozen=True)
class Preprocessing:
    """What a network was made to see."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int
    crop_share: float
    """Side of the central square as a share of the image's shorter side."""
    interpolation: str


def preprocessing(name: str) -> Preprocessing | None:
    """What the library of the network `name` says that it was made to see: timm's, or preprocessor_config.json of a
    folder of transformers; None where it says nothing."""
    if name.startswith("timm/"):
        timm()
        from timm.models import get_pretrained_cfg

        found = get_pretrained_cfg(name.removeprefix("timm/"))
        if found is None:
            return None
        return Preprocessing(
            _three(found.mean), _three(found.std), found.input_size[-1], found.crop_pct, found.interpolation
        )
    path = Path(name.removeprefix("hf/")) / "preprocessor_config.json"
    if not name.startswith("hf/") or not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    size = values.get("size", 224)
    side = next(iter(size.values())) if isinstance(size, dict) else size
    mean, std = (_three(values.get(key, [0.5, 0.5, 0.5])) for key in ("image_mean", "image_std"))
    return Preprocessing(mean, std, side, values.get("crop_pct") or 1.0, f"filter {values.get('resample', 2)} of PIL")


def _three(values: Iterable[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


# ------------------------------------------------------------------------------------------- the user's own code


def is_code(name: str) -> bool:
    """Whether a network's name is FILE.py:NAME or package.module:NAME."""
    return ":" in name


def defining_file(name: str) -> tuple[str, str] | None:
    """(path, sha256) of the file that a network's name refers to, which decides what it computes: of one's own code its
    source, of transformers the config.json; None where the name alone does."""
    path: str | None = None
    if name.startswith("hf/"):
        path = str(Path(name.removeprefix("hf/")) / "config.json")
    elif is_code(name):
        path = inspect.getsourcefile(_module(name))
    return (path, file_sha256(Path(path))) if path and Path(path).is_file() else None


def _own(name: str) -> Callable[..., Any]:
    module, _, attribute = name.rpartition(":")
    found: Any = _module(name)
    for part in attribute.split("."):  # Class.method too
        found = getattr(found, part, None)
    require(callable(found), f"{OPTION}: {module} has no function or class {attribute}")
    return found


def _module(name: str) -> ModuleType:
    module = name.rpartition(":")[0]
    try:
        if not module.endswith(".py"):
            return importlib.import_module(module)
        path = Path(module)
        require(path.is_file(), f"{OPTION}: no such file: {path}")
        key = "model_of_" + re.sub(r"\W", "_", str(path.resolve()))
        if key in sys.modules:
            return sys.modules[key]
        spec = importlib.util.spec_from_file_location(key, path)
        assert spec is not None and spec.loader is not None
        loaded = sys.modules[key] = importlib.util.module_from_spec(spec)
        if str(path.resolve().parent) not in sys.path:
            sys.path.append(str(path.resolve().parent))  # for files beside it
        spec.loader.exec_module(loaded)
        return loaded
    except UserError:
        raise
    except Exception as error:  # whatever goes wrong in code that is not ours
        raise UserError(f"{OPTION}: {module} cannot be imported ({_words(error)})") from None


def _takes(function: Callable[..., Any], argument: str) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(each.name == argument or each.kind is each.VAR_KEYWORD for each in parameters)


def _words(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__

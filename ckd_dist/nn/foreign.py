"""Checkpoints that other programs wrote: what such a file holds. Which of it is a network's weights: see `fitting`.

Nothing of a file is executed. `torch.load` reads it with weights_only; where it names classes of other programs, as
those of saved options, a stand-in that keeps nothing takes their place, and any other name is refused.
"""

from __future__ import annotations

import importlib
import json
import re
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ckd_dist.core.errors import UserError, first_line, require
from ckd_dist.core.files import require_regular


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

    A file of torch.save in either format, a safetensors file, a folder of transformers, or one of
    torch.distributed.checkpoint, whose index is a pickle that runs what it names: only with `trust`. Raises
    `UserError`, naming `option`, for anything else.
    """
    path = Path(path)
    if path.is_dir():
        of_transformers = (path / "config.json").is_file()
        return _read_pretrained(path, option) if of_transformers else _read_folder(path, option, trust)
    require_regular(path, option)
    with open(path, "rb") as file:
        start = file.read(9)
    content: Any = _read_safetensors(str(path), option) if start[8:] == b"{" else _read_torch(path, option)
    require(
        isinstance(content, Mapping),
        f"{option}: {path} holds a {type(content).__name__}, not a dict of weights: save the model's state_dict()",
    )
    return content


def _read_safetensors(path: str, option: str) -> dict[str, torch.Tensor]:
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


def _read_torch(path: Path, option: str) -> Any:
    stand_ins: list[Any] = [*((_Unread, name) for name in _UNREAD), *((dict, name) for name in _DICTS)]
    stand_ins.append((_empty_dict, "collections.defaultdict"))
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here: for a damaged archive, a pickle that it refuses, ...
        raise UserError(f"{option}: {path} {_why_unread(path, str(error))}") from None
    damaged = _damaged_entry(path)
    require(
        damaged is None,
        f"{option}: {path} is damaged: the checksum of {damaged} is another: copy it again or, if it was saved without "
        "checksums, load it and save it anew",
    )
    return content


def _damaged_entry(path: Path) -> str | None:
    """Name of an entry of an archive whose checksum is wrong, which torch does not look at; None where all are right,
    and in the format that has none."""
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            name = archive.testzip()
            return name and _printable(name)
    except Exception:  # zipfile raises many kinds for a damaged one
        return "an entry"


def _why_unread(path: Path, error: str) -> str:
    """What is wrong with a file that torch does not load, and the mend."""
    if found := re.search(r"GLOBAL (\S+)", error):
        name = _printable(found[1])
        if any(each.startswith(("torch.nn.modules.", "torch._dynamo.")) for each in [*_names_in(path), name]):
            return (
                f"holds a whole network ({name}), which only its code can build: load it there, save its state_dict()"
            )
        return f"holds a {name}, which might run code: load it where it was written and save the state_dict() alone"
    if "DTensor" in error:
        return "holds parts of a sharded training (DTensor): gather them first, with full_state_dict=True"
    if "TorchScript" in error:
        return "is a program of TorchScript: load it with torch.jit.load and save its state_dict()"
    if _is_whole_archive_of_others(path) or not _is_begun_by_torch(path):
        return "is no checkpoint: name a file of torch.save or of safetensors"
    if "operand" in error:
        return (
            "is damaged, or of a pickle protocol that torch does not read safely: copy it again, or load it where it "
            "was written and save it with the default one"
        )
    return "is damaged or cut short: copy it again"


def _is_begun_by_torch(path: Path) -> bool:
    """Whether a file begins as one of torch.save does: an archive, or a pickle of its magic number."""
    with open(path, "rb") as file:
        start = file.read(14)
    legacy = b"\x80\x02\x8a\n" + torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")
    return start.startswith(b"PK") or (bool(start) and legacy.startswith(start))


def _is_whole_archive_of_others(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return not any(name.endswith("/data.pkl") for name in archive.namelist())
    except Exception:  # zipfile raises many kinds for a damaged one
        return False


def _printable(name: str) -> str:
    """A name in a file, which might be such that a terminal obeys."""
    return name.encode("unicode_escape").decode()[:100]


def _names_in(path: Path) -> list[str]:
    """Classes and functions that a file of the zip format names; none of another."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # of a pickle that torch does not read any further
        return []


def _read_pretrained(path: Path, option: str) -> dict[str, Any]:
    """The weights in a folder of save_pretrained, and the epoch where it is of the Trainer: only the library knows by
    which names they go in the network, which may be others than in the file."""
    try:
        importlib.import_module("transformers")
    except ModuleNotFoundError:
        raise UserError(f"{option}: transformers is not installed: pip install 'ckd_dist[hf]'") from None
    try:
        weights = pretrained(path)
        state = path / "trainer_state.json"
        told = json.loads(state.read_text(encoding="utf-8")).get("epoch") if state.is_file() else None
    except Exception as error:  # transformers raises many kinds: for another task, weights that are gone, ...
        why = first_line(error)
        raise UserError(f"{option}: {path} holds no image classifier of transformers ({why})") from None
    epoch = {"epoch": round(told)} if isinstance(told, (int, float)) and told == round(told) else {}
    return {"model": weights, **epoch}


def pretrained(folder: str | Path) -> dict[str, torch.Tensor]:
    """The weights of an image classifier in a folder of transformers, as its network names them; raises whatever the
    library does."""
    from transformers import AutoModelForImageClassification

    load = AutoModelForImageClassification.from_pretrained
    return load(folder, local_files_only=True, trust_remote_code=False).state_dict()


def _read_folder(path: Path, option: str, trust: bool) -> Any:
    """A folder of torch.distributed.checkpoint, as FSDP saves it."""
    require(
        (path / ".metadata").is_file(),
        f"{option}: {path} is a folder, but none of transformers or torch.distributed.checkpoint: name a checkpoint in "
        "it",
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

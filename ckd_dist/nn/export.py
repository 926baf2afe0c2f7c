"""A network in the forms that other programs take: its weights by name, or a program that computes its logits."""

from __future__ import annotations

import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ckd_dist.core.errors import UserError, first_line, require
from ckd_dist.nn.forward import logits_of
from ckd_dist.nn.probe import unprepare

NOTE = "ckd_dist.json"
"""Name under which TorchScript and torch.export keep the metadata."""
INPUT, OUTPUT = "images", "logits"
"""Names in an ONNX program."""


def description(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What whoever runs a network needs to know beside its weights, of a checkpoint's metadata: how its input is made
    of pixels, and what its outputs mean."""
    named = ("model", "num_classes", "classes", "mean", "std", "crop_share", "epoch")
    side = metadata.get("val_image_size", metadata["image_size"])
    return {"image_size": side, **{name: metadata[name] for name in named if name in metadata}}


def export(model: nn.Module, metadata: Mapping[str, Any], format: str, what: str) -> tuple[bytes, str]:
    """(the file's bytes, what was checked of it, in words) for the `model` of a checkpoint with `metadata`, on the CPU.

    `format`: see `ExportConfig`. A program takes normalised images, float32 [n, 3, side, side], of any n; it is run and
    compared with the network. Raises `UserError` that names `what`, the checkpoint, where the network has no such form.
    """
    unprepare(model)
    note = description(metadata)
    if format == "state_dict":
        content = io.BytesIO()
        torch.save(dict(model.state_dict()), content)
        return content.getvalue(), "no metadata: this format has none"
    if format == "safetensors":
        return _safetensors(model.state_dict(), note), "metadata: __metadata__"
    network = _Logits(model).eval().requires_grad_(False)
    side = note["image_size"]
    torch.manual_seed(0)
    try:
        with _quiet():
            content_, run = _PROGRAMS[format](network, torch.randn(2, 3, side, side), json.dumps(note))
            images = torch.randn(3, 3, side, side)
            expected, found = network(images), run(images)
    except UserError:
        raise
    except Exception as error:  # an exporter, or the network in its hands, may object in any way
        why = first_line(error)
        raise UserError(f"format: {what} has no form as {format} ({why}): choose another --format") from None
    difference = (found - expected).abs().max().item()
    require(
        difference <= 1e-3 * max(1.0, expected.abs().max().item()),
        f"format: {what} as {format} gives other logits, by {difference:.3g}: choose another --format",
    )
    return content_, f"run on three images: its logits differ from the network's by {difference:.2g} at most"


def _safetensors(weights: Mapping[str, torch.Tensor], note: Mapping[str, Any]) -> bytes:
    """A safetensors file, the same bytes for the same weights: its library writes metadata in a random order."""
    tensors = {name: tensor.clone().contiguous() for name, tensor in weights.items()}
    strings = {key: value if isinstance(value, str) else json.dumps(value) for key, value in note.items()}
    saved = _library("safetensors.torch", "safetensors").save(tensors, {"format": "pt", **strings})
    end = 8 + int.from_bytes(saved[:8], "little")
    header = json.loads(saved[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text + saved[end:]


class _Logits(nn.Module):
    """A network that gives its logits only, whatever else it would give."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return logits_of(self.network(images))


# ------------------------------------------------------------------------------------------- programs

Run = Callable[[torch.Tensor], torch.Tensor]


def _onnx(network: nn.Module, images: torch.Tensor, note: str) -> tuple[bytes, Run]:
    for name in ("onnx", "onnxscript"):
        _library(name, "onnx")
    runtime = _library("onnxruntime", "onnx")
    program = torch.onnx.export(
        network,
        (images,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=[INPUT],
        output_names=[OUTPUT],
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    for key, value in json.loads(note).items():
        proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    content = proto.SerializeToString()
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda batch: torch.from_numpy(session.run([OUTPUT], {INPUT: batch.numpy()})[0])


def _torchscript(network: nn.Module, images: torch.Tensor, note: str) -> tuple[bytes, Run]:
    content = io.BytesIO()
    torch.jit.save(torch.jit.trace(network, images), content, _extra_files={NOTE: note})
    return content.getvalue(), torch.jit.load(io.BytesIO(content.getvalue()))


def _torch_export(network: nn.Module, images: torch.Tensor, note: str) -> tuple[bytes, Run]:
    program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={NOTE: note})
    return content.getvalue(), torch.export.load(io.BytesIO(content.getvalue())).module()


_PROGRAMS: dict[str, Callable[[nn.Module, torch.Tensor, str], tuple[bytes, Run]]] = {
    "onnx": _onnx,
    "torchscript": _torchscript,
    "torch_export": _torch_export,
}


def _library(name: str, format: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise UserError(f"format: {format} needs {name.partition('.')[0]}: pip install 'ckd_dist[export]'") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say of their own progress, and of each other's."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)

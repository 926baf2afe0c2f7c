"""Initial weights: from files, executing nothing, and from what libraries publish."""

from __future__ import annotations

import argparse
import pickle

import pytest
import safetensors.torch
import torch
import torchvision

from ckd_dist.core import checkpoint
from ckd_dist.core.errors import UserError
from ckd_dist.nn import probe, weights
from ckd_dist.nn.models import build_model
from ckd_dist.nn.options import ModelConfig


def load(model: torch.nn.Module, given: object, name: str = "resnet8") -> list[str]:
    heads = probe.logit_modules(model, 64)
    return weights.load_initial(model, ModelConfig(name=name, weights=str(given)), heads)


def same(first: torch.nn.Module, second: torch.nn.Module, left_out: tuple[str, ...] = ()) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return all(torch.equal(ours[key], theirs[key]) for key in ours if key not in left_out)


def test_initial_weights_come_from_a_state_dict_or_a_checkpoint(tmp_path):
    source = build_model("resnet8", 10)
    torch.save(source.state_dict(), tmp_path / "plain.pt")
    checkpoint.save(tmp_path / "own.pt", {"weights": source.state_dict(), "metadata": {}})
    safetensors.torch.save_file(source.state_dict(), tmp_path / "other.safetensors")
    wrapped = {f"module.{key}": each for key, each in source.state_dict().items()}
    torch.save({"model": wrapped, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, tmp_path / "references.pth")
    kinds = []
    for name in ("plain.pt", "own.pt", "other.safetensors", "references.pth"):
        model = build_model("resnet8", 10)
        assert load(model, tmp_path / name) == []
        assert same(source, model)
        kinds.append(weights.initial_input(ModelConfig(name="resnet8", weights=str(tmp_path / name))).kind)
    assert kinds == ["weights", "weights", "foreign", "foreign"]


def test_weights_that_do_not_fit_are_refused_by_tensor_and_shapes(tmp_path):
    torch.save(build_model("resnet8", 10).state_dict(), tmp_path / "ten.pt")
    with pytest.raises(UserError) as error:
        load(build_model("resnet8", 11), tmp_path / "ten.pt")
    assert str(error.value) == (
        f"model.weights: {tmp_path}/ten.pt does not fit resnet8: fc.weight is (10, 64) in the file, (11, 64) in the "
        "model; fc.bias is (10,) in the file, (11,) in the model: choose another --model.name"
    )
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0")
    for name, expected in (
        ("none.pt", "no such file"),
        ("cut.safetensors", "is no checkpoint: name a file of torch.save or of safetensors"),
        ("folder/none", "no such file"),
    ):
        with pytest.raises(UserError, match=expected):
            load(build_model("resnet8", 10), tmp_path / name)


def test_published_weights_of_other_classes_leave_the_head_as_it_was(tmp_path, monkeypatch):
    """The file lies where torch keeps what it has downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source = torchvision.models.squeezenet1_1()
    known = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    path = tmp_path / "hub" / "checkpoints" / known.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.save(source.state_dict(), path)
    for name in ("DEFAULT", "IMAGENET1K_V1"):
        model = build_model("squeezenet1_1", 1000)
        assert load(model, name, "squeezenet1_1") == [] and same(source, model)
    model = build_model("squeezenet1_1", 10)
    head = ("classifier.1.weight", "classifier.1.bias")
    before = model.state_dict()[head[0]].clone()
    assert load(model, "DEFAULT", "squeezenet1_1") == [f"it is of other classes: {', '.join(head)} start anew"]
    assert same(source, model, head) and torch.equal(before, model.state_dict()[head[0]])
    with pytest.raises(UserError, match=r"model\.weights: no file V9, and squeezenet1_1 has IMAGENET1K_V1"):
        load(model, "V9", "squeezenet1_1")


def test_published_weights_that_cannot_be_had_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody answers there
    for name in ("resnet18", "resnet8", "timm/resnet18"):
        with pytest.raises(UserError, match=rf"model\.weights: no file DEFAULT, and .* for {name} could not be had"):
            load(build_model(name, 10), "DEFAULT", name)


def test_a_weights_file_executes_nothing(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    for path, write in (("raw.pt", pickle.dump), ("torch.pt", torch.save)):
        with open(tmp_path / path, "wb") as file:
            write({"weights": Attack()}, file)
        with pytest.raises(UserError, match=r"model\.weights: .* (might run code|is no checkpoint)"):
            load(build_model("resnet8", 10), tmp_path / path)
    assert not (tmp_path / "executed").exists()


def test_weights_sha256_tells_weights_apart():
    model = build_model("resnet8", 10)
    first = checkpoint.weights_sha256(model.state_dict())
    assert first == checkpoint.weights_sha256(model.state_dict())
    with torch.no_grad():
        model.fc.bias[0] += 1e-6
    assert first != checkpoint.weights_sha256(model.state_dict())

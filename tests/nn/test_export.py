"""Networks leave this system in forms that other programs read, and these compute the same logits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ckd_dist import export
from ckd_dist.core import checkpoint
from ckd_dist.core.errors import UserError
from ckd_dist.core.options import load_config
from ckd_dist.nn import fitting, foreign
from ckd_dist.nn.export import NOTE
from ckd_dist.nn.models import build_model, load_model
from ckd_dist.train.options import ExportConfig
from tests.helpers.commands import run

FORMATS = ("state_dict", "safetensors", "onnx", "torchscript", "torch_export")
PROGRAMS = FORMATS[2:]


def keep(path: Path, name: str, side: int) -> Path:
    """A checkpoint of a network whose batch norm has seen images, so that its logits tell them apart."""
    torch.manual_seed(0)
    model = build_model(name, 7).train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(16, 3, side, side))
    metadata = {"model": name, "num_classes": 7, "image_size": side, "classes": list("abcdefg")}
    metadata.update(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], epoch=3)
    checkpoint.save(path, {"weights": model.state_dict(), "metadata": metadata})
    return path


@pytest.fixture(scope="module", params=[("resnet8", 28), ("mobilenet_v3_small", 40)], ids=lambda param: param[0])
def kept(request, tmp_path_factory) -> Path:
    return keep(tmp_path_factory.mktemp("export") / "epoch_0003.pt", *request.param)


def export_here(path: Path, format: str, out: Path, *more: object) -> Path:
    words = ["--checkpoint", path, "--format", format, "--out", out, *more]
    export.main(load_config(ExportConfig, [str(word) for word in words]))
    return out


def outside(path: Path, format: str, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, str]]:
    """(logits, metadata) as another program gets them of the file."""
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        return torch.from_numpy(logits), session.get_modelmeta().custom_metadata_map
    extra = {NOTE: ""}
    if format == "torchscript":
        program = torch.jit.load(path, _extra_files=extra)
    else:
        program = torch.export.load(path, extra_files=extra).module()
    return program(images), json.loads(extra[NOTE])


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("format", PROGRAMS)
def test_a_program_gives_the_logits_of_the_network_for_batches_of_any_size(format, kept, tmp_path, capsys):
    out = export_here(kept, format, tmp_path / "program")
    model, metadata = load_model(kept, "")
    side = metadata["image_size"]
    for count in (1, 2, 5):
        images = torch.randn(count, 3, side, side)
        with torch.inference_mode():
            expected = model.eval()(images)
        found, told = outside(out, format, images)
        assert found.shape == (count, 7) and expected.std() > 1e-4
        # Another library sums in another order.
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    values = {
        key: json.loads(value) if isinstance(value, str) and key != "model" else value for key, value in told.items()
    }
    assert (values["mean"], values["std"], values["image_size"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], side)
    assert values["classes"] == list("abcdefg")
    shown = capsys.readouterr().out
    assert "run on three images" in shown and "with mean 0.1 0.2 0.3 and std 0.4 0.5 0.6; output: logits" in shown


@pytest.mark.parametrize("format", ["state_dict", "safetensors"])
def test_weights_go_out_and_come_in_again_to_the_bit(format, kept, tmp_path):
    out = export_here(kept, format, tmp_path / "weights")
    expected = checkpoint.load(kept, "")["weights"]
    if format == "state_dict":
        found = torch.load(out, weights_only=True)
    else:
        from safetensors import safe_open
        from safetensors.torch import load_file

        found = load_file(out)
        with safe_open(out, "pt") as file:
            assert json.loads(file.metadata()["mean"]) == [0.1, 0.2, 0.3] and file.metadata()["format"] == "pt"
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    model, metadata = load_model(kept, "")
    again = fitting.fit(foreign.read(out, "files"), model, metadata["model"], str(out)).weights
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_a_network_of_transformers_gives_logits_alone(tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4)
    network = ResNetForImageClassification(config).eval()
    network.save_pretrained(tmp_path / "saved")
    metadata = {"model": f"hf/{tmp_path / 'saved'}", "num_classes": 4, "image_size": 32, "mean": [0.5], "std": [0.5]}
    checkpoint.save(tmp_path / "epoch_0001.pt", {"weights": network.state_dict(), "metadata": metadata})
    images = torch.randn(3, 3, 32, 32)
    out = export_here(tmp_path / "epoch_0001.pt", "torch_export", tmp_path / "program")
    found, _ = outside(out, "torch_export", images)
    torch.testing.assert_close(found, network(images).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS[:2])
def test_a_file_that_is_there_stays_as_it_is(format, tmp_path):
    kept = keep(tmp_path / "epoch_0003.pt", "resnet8", 28)
    out = export_here(kept, format, tmp_path / "out")
    before = (out.read_bytes(), out.stat().st_mtime_ns)
    export_here(kept, format, out)
    assert (out.read_bytes(), out.stat().st_mtime_ns) == before
    out.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"out: .*/out is there already, and another: remove it, or name a new file"):
        export_here(kept, format, out)
    assert out.read_bytes() == b"mine" and sorted(path.name for path in tmp_path.iterdir()) == ["epoch_0003.pt", "out"]


def test_what_cannot_be_written_is_refused_in_one_line(tmp_path, monkeypatch):
    kept = keep(tmp_path / "epoch_0003.pt", "resnet8", 28)
    for words, expected in (
        ((kept, "onnx", tmp_path / "none" / "x"), "out: no such folder: "),
        ((kept, "onnx", tmp_path), "out: .* is not a regular file"),
        ((tmp_path / "x.pt", "onnx", tmp_path / "x"), r"checkpoint: no such file: .*x\.pt"),
    ):
        with pytest.raises(UserError, match=expected):
            export_here(*words)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"format: onnx needs onnxruntime: pip install 'ckd_dist\[export\]'"):
        export_here(kept, "onnx", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_network_that_no_exporter_can_follow_is_refused(tmp_path):
    source = tmp_path / "asking.py"
    source.write_text(
        "import torch\nfrom torch import nn\n\n\nclass Asking(nn.Linear):\n"
        "    def __init__(self, num_classes):\n        super().__init__(3, num_classes)\n\n"
        "    def forward(self, x):\n        x = x.mean((2, 3))\n"
        "        return super().forward(x if x.sum().item() > 0 else -x)\n"
    )
    model = torch.nn.Linear(3, 7)
    metadata = {"model": f"{source}:Asking", "num_classes": 7, "image_size": 8, "mean": [0.5], "std": [0.5]}
    checkpoint.save(tmp_path / "epoch_0001.pt", {"weights": model.state_dict(), "metadata": metadata})
    code = ["--model", f"{source}:Asking"]
    with pytest.raises(UserError, match=r"format: .*epoch_0001\.pt has no form as torch_export \(.*\): choose another"):
        export_here(tmp_path / "epoch_0001.pt", "torch_export", tmp_path / "x", *code)
    assert not (tmp_path / "x").exists()
    out = export_here(tmp_path / "epoch_0001.pt", "safetensors", tmp_path / "x", *code)
    assert np.frombuffer(out.read_bytes()[:8], "<u8")[0] > 0


def test_the_command_exports_what_was_trained(teacher, tmp_path):
    words = ("--checkpoint", teacher / "checkpoints" / "epoch_0003.pt", "--format", "safetensors")
    told = run("ckd_dist.export", *words, "--out", tmp_path / "teacher.safetensors", nproc=2).stdout
    assert told.count("resnet8 of 10 classes as safetensors") == 1 and (tmp_path / "teacher.safetensors").exists()

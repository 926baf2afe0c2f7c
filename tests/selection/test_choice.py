"""Choosing the teacher's checkpoint: right where the answer is known, and the same however it is computed."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from ckd_dist import distill
from ckd_dist.core import checkpoint
from ckd_dist.core.errors import TrainingError, UserError
from ckd_dist.core.identity import read_lineage
from ckd_dist.core.options import load_config
from ckd_dist.nn import models
from ckd_dist.train.options import DistillConfig
from data_prep.sources import load_source
from tests.helpers.commands import command_line, kill_and_repeat, run
from tests.helpers.selection import QUICK, select_here


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """Images whose red channel is a garment that has nothing to do with the label, and whose blue one is a shade that
    is the label: split -> .beton."""
    folder = tmp_path_factory.mktemp("coded")
    source, rng = load_source("fashion_mnist", None, train=False), np.random.default_rng(0)
    files = {}
    for split, count in (("train", 1000), ("holdout", 400)):
        for i in range(count):
            label = int(rng.integers(4))
            pixels = np.zeros((28, 28, 3), dtype=np.uint8)
            pixels[..., 0], pixels[..., 2] = source.images[i + 2000 * (split == "holdout")], 80 * label
            path = folder / split / str(label) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
        files[split] = folder / f"{split}.beton"
        options = ("--root", folder / split, "--split", "test", "--out", files[split])
        run("data_prep.write_beton", "--dataset", "imagefolder", *options)
    return files


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A run of three checkpoints whose features are made by hand: epoch 1 gives nothing, epoch 2 passes both the
    garment and the shade on, epoch 3 the garment only."""
    run_dir = tmp_path_factory.mktemp("known") / "run"
    for epoch, passed in ((1, []), (2, [0, 2]), (3, [0])):
        model = models.build_model("resnet8", 4)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if "conv" in name or "shortcut.0" in name or name == "features.0.weight":
                    tensor.zero_()  # residual branches give nothing; shortcuts below copy
                elif name.endswith("bias"):
                    tensor.fill_(4.0 if name == "features.1.bias" else 0.0)  # positive, so that no ReLU cuts
            for channel in passed:
                model.features[0].weight[channel, channel, 1, 1] = 1.0
            for block in model.features:
                if isinstance(getattr(block, "shortcut", None), torch.nn.Sequential):
                    for channel in range(16):
                        block.shortcut[0].weight[channel, channel] = 1.0
        metadata = {
            "model": "resnet8", "num_classes": 4, "epoch": epoch, "image_size": 28,
            "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "dataset": {},
        }  # fmt: skip
        path = checkpoint.checkpoint_path(run_dir, epoch)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(path, {"weights": model.state_dict(), "metadata": metadata})
    return run_dir


@pytest.fixture(scope="module")
def chosen(coded, known, tmp_path_factory):
    """(options, result) of a selection among them."""
    words = ["--data.train", coded["train"], "--data.val", coded["holdout"], "--data.flip", "false", *QUICK]
    words = [*words, "--teacher.run", known]
    return words, select_here(*words, "--run_dir", tmp_path_factory.mktemp("selection") / "first")


def test_the_checkpoint_that_keeps_image_and_label_is_chosen_under_every_scaling(chosen):
    _, result = chosen
    assert result["choice"] == 2 and result["choices"] == {"raw": 2, "minmax": 2, "zscore": 2}
    nothing, both, image_only = result["checkpoints"]
    assert abs(nothing["image_information"]) < 0.05 and abs(nothing["label_information"]) < 0.1
    assert abs(image_only["label_information"]) < 0.15 and image_only["image_information"] > 0.03
    assert both["label_information"] > 1.0 and both["image_information"] > image_only["image_information"]
    assert result["fixed"] == {"half": 1, "full": 3} and result["constants"]["label_entropy"] < np.log(4)
    assert result["layer"] == "features" and both["label_information_deviation"] > 0


def test_a_selection_is_nearly_the_same_on_two_processes(chosen, tmp_path):
    words, first = chosen
    run("ckd_dist.select_teacher", *words, "--run_dir", tmp_path / "two", nproc=2)
    two = json.loads((tmp_path / "two" / "selection.json").read_text())
    assert two["choices"] == first["choices"] and two["constants"] == pytest.approx(first["constants"], rel=1e-6)
    # Batch norm sees each process's part of the batch.
    for a, b in zip(first["checkpoints"], two["checkpoints"], strict=True):
        assert a["image_information"] == pytest.approx(b["image_information"], abs=0.02)
        assert a["label_information"] == pytest.approx(b["label_information"], abs=0.1)
        assert a["top1"] == b["top1"]
    cost = json.loads((tmp_path / "two" / "cost.json").read_text())
    assert cost["seconds"] > 0 and cost["share"] == pytest.approx(cost["seconds"] / (3 * cost["student_seconds"]))


def test_a_killed_selection_ends_with_the_numbers_of_one_that_never_was(chosen, tmp_path, capsys):
    words, _ = chosen
    words = [*words, "--probe.steps", 130, "--probe.repeats", 1, "--teacher.checkpoints", "[2,3]"]
    words += ["--data.batch_size", 16]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = select_here(*words, "--run_dir", whole)
    left = sorted(path.name for path in whole.iterdir())
    assert left == [".lock", "config.yaml", "cost.json", "env.json", "lineage.json", "selection.json"]

    def saves():  # counts each save once
        path = killed / "probes.pt"
        seen.add(path.stat().st_mtime_ns if path.exists() else 0)
        return len(seen)

    seen: set[int] = set()
    command = command_line("ckd_dist.select_teacher", *words, "--run_dir", killed)
    kill_and_repeat(command, saves, kills=[2])
    assert json.loads((killed / "selection.json").read_text()) == expected
    assert not (killed / "probes.pt").exists()
    capsys.readouterr()
    assert select_here(*words, "--run_dir", killed) == expected
    assert "complete already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet8", "features"), ("wrn_16_2", "features"), ("mobilenetv2_075", "features"), ("resnet18", "layer4"),
        ("mobilenet_v2", "features"), ("densenet121", "features"), ("convnext_tiny", "features"), ("vgg11", "features"),
        ("squeezenet1_1", "classifier.2"), ("swin_t", "permute"), ("vit_b_16", None),
    ],
)  # fmt: skip
def test_the_last_feature_map_before_the_pooling_is_found(name, layer):
    if name in ("resnet8", "wrn_16_2", "mobilenetv2_075"):
        model, size = models.build_model(name, 10), 32
    else:
        with torch.device("meta"):  # shapes alone
            model, size = torchvision.models.get_model(name, weights=None, num_classes=10), 224
    if layer:
        assert models.feature_layer(model.eval(), size) == layer
    else:
        with pytest.raises(UserError, match=r"layer: the teacher has no feature map before a pooling"):
            models.feature_layer(model.eval(), size)


class Network(nn.Module):
    """Maps of 12 channels and 8 x 8 positions, what `tail` makes of them, and a linear layer."""

    def __init__(self, tail, **layers):
        super().__init__()
        self.stem, self.layers, self.fc = nn.Conv2d(3, 12, 4, stride=4), nn.ModuleDict(layers), nn.Linear(12, 10)
        self.tail = tail

    def forward(self, images):
        return self.fc(self.tail(self.stem(images), **self.layers))


def add_a_branch(maps, branch):
    return (maps + branch(maps)).mean((2, 3))


def leave_a_map_unused(maps, unused):
    unused(maps)
    return maps.mean((2, 3))


def attend(maps, norm, project):
    tokens = maps.flatten(2).mT
    queries = norm(tokens.unflatten(2, (2, 6)).transpose(1, 2))  # of two heads: [n, 2, 64, 6]
    return project(tokens + (queries @ queries.mT @ queries).transpose(1, 2).flatten(2)).mean(1)


def end_with_channels(maps, norm):
    return norm(maps.permute(0, 2, 3, 1)).mean((1, 2))


@pytest.mark.parametrize(
    ("network", "layer"),
    [
        (Network(add_a_branch, branch=nn.Conv2d(12, 12, 3, padding=1)), "stem"),
        (Network(leave_a_map_unused, unused=nn.Conv2d(12, 12, 3)), "stem"),
        (Network(attend, norm=nn.LayerNorm(6), project=nn.Linear(12, 12)), None),
        (Network(end_with_channels, norm=nn.LayerNorm(12)), None),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)), None),
    ],
    ids=["branch", "unused", "attention", "channels last", "no map"],
)
def test_branches_unused_maps_and_tokens_are_no_feature_map(network, layer):
    assert network.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    if layer:
        assert models.feature_layer(network, 32) == layer
    else:
        with pytest.raises(UserError, match=r"layer: the teacher has no feature map before a pooling"):
            models.feature_layer(network, 32)


def test_another_layer_can_be_named_and_the_options_of_a_run_stay_its_own(chosen, tmp_path):
    words, _ = chosen
    few = [*words, "--probe.steps", 2, "--teacher.checkpoints", "[2,3]"]
    assert select_here(*few, "--layer", "features.3", "--run_dir", tmp_path / "run")["layer"] == "features.3"
    with pytest.raises(UserError, match=r"run_dir: .* holds a run with layer features\.3, not features\.4"):
        select_here(*few, "--layer", "features.4", "--run_dir", tmp_path / "run")
    for layer, expected in (("features.33", "the teacher has no module features.33"), ("fc", r"fc gives \(4,\)")):
        with pytest.raises(UserError, match=expected):
            select_here(*few, "--layer", layer, "--run_dir", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    (tmp_path / "run" / "cost.json").write_text('{"seconds": 1, "student_seconds": "a few", "share": 1}')
    with pytest.raises(UserError, match=r"run_dir: .*cost\.json is damaged \(student_seconds: .*: remove it and sel"):
        select_here(*few, "--layer", "features.3", "--run_dir", tmp_path / "run")


@pytest.mark.parametrize("damaged", ["features.0.weight", "fc.weight"])
def test_a_checkpoint_that_tells_no_number_is_named_not_chosen(chosen, known, tmp_path, damaged):
    run_dir = shutil.copytree(known, tmp_path / "known")
    path = checkpoint.checkpoint_path(run_dir, 2)
    state = checkpoint.load(path, "")
    state["weights"][damaged][0] = float("nan")
    checkpoint.save(path, state)
    words, _ = chosen
    with pytest.raises(TrainingError, match=r"epoch 2 of .*known: what its features or logits tell is not a finite"):
        select_here(*words, "--teacher.run", run_dir, "--probe.steps", 2, "--run_dir", tmp_path / "run")
    assert not (tmp_path / "run" / "selection.json").exists()


def test_distill_takes_the_choice_and_refuses_that_of_another_run(fashion, teacher, store, tmp_path):
    images = ["--data.train", fashion["train"], "--data.val", fashion["holdout"], "--data.batch_size", 64]
    words = [*images, "--teacher.run", teacher, *QUICK, "--probe.steps", 3, "--run_dir", tmp_path / "selection"]
    result = select_here(*words)
    student = [*images, "--model.name", "resnet8", "--epochs", 1, "--teacher.store", store]

    def distill_here(run_dir, *more):
        distill.main(load_config(DistillConfig, [str(word) for word in (*student, "--run_dir", run_dir, *more)]))

    distill_here(tmp_path / "run", "--teacher.selection", tmp_path / "selection")
    lineage = read_lineage(tmp_path / "run", "")
    assert lineage.settled["teacher.checkpoints"] == [result["choice"]]
    assert lineage.inputs["teacher.selection"].holds == {"weights_sha256": result["weights_sha256"]}
    path = tmp_path / "selection" / "selection.json"
    other = {"weights_sha256": "0" * 64}
    checkpoints = [{**each, **other} for each in result["checkpoints"] if each["epoch"] == result["choice"]]
    path.write_text(json.dumps({**result, **other, "checkpoints": checkpoints}))
    with pytest.raises(
        UserError, match=r"teacher\.selection: it chose epoch . with weights 000000000000, .* different"
    ):
        distill_here(tmp_path / "other", "--teacher.selection", path)
    path.write_text("{}")
    with pytest.raises(UserError, match=r"teacher\.selection: .*selection\.json is damaged"):
        distill_here(tmp_path / "other", "--teacher.selection", path)
    with pytest.raises(UserError, match=r"teacher\.selection: no such file"):
        distill_here(tmp_path / "other", "--teacher.selection", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"teacher\.selection goes with teacher\.store or teacher\.run, and without"):
        distill_here(tmp_path / "other", "--teacher.selection", path, "--teacher.checkpoints", "[1]")
    shutil.rmtree(tmp_path / "selection")

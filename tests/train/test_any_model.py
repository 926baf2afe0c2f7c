"""Any model: each of a table is trained a step, cached, selected from and distilled, or refused in one line before
anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ckd_dist.core import checkpoint
from ckd_dist.core.errors import UserError
from tests.helpers.commands import run
from tests.helpers.data_prep import write
from tests.helpers.here import run_here
from tests.helpers.shared import make_once
from tests.helpers.training import metrics, same_weights

OWN = '''
"""Networks of the user's own."""

import torch
from torch import nn


class Net(nn.Module):
    """Gives a dict."""

    def __init__(self, num_classes, width=8):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, width, 3, stride=2), nn.Linear(width, num_classes)

    def forward(self, x):
        features = self.conv(x)
        return {"features": features, "logits": self.fc(features.relu().mean((2, 3)))}


class TwoHeads(Net):
    """Gives auxiliary logits too, in train mode."""

    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.auxiliary = nn.Linear(8, num_classes)

    def forward(self, x):
        features = self.conv(x)
        pooled = features.relu().mean((2, 3))
        return (self.fc(pooled), self.auxiliary(pooled)) if self.training else self.fc(pooled)


def lazy(num_classes):
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(num_classes)]
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), *head)


def eleven():
    return Net(11)


class Features(Net):
    """Gives no logits."""

    def forward(self, x):
        return {"features": self.conv(x)}
'''


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with 24 training images, as many held-out ones and test images, own.py, and a ViT of transformers."""

    def make(folder: Path) -> None:
        for split in ("train", "holdout", "test"):
            options = ("--dataset", "fashion_mnist", "--split", split, "--subset", 24, "--workers", 1)
            assert write(*options, "--out", folder / f"{split}.beton").status == 0
        (folder / "own.py").write_text(OWN)
        from transformers import ViTConfig, ViTForImageClassification

        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        config = ViTConfig(**sizes, image_size=32, patch_size=8)
        ViTForImageClassification(config).save_pretrained(folder / "vit")

    return make_once(tmp_path_factory, "models", make)


SMALL_VIT = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 48, "num_heads": 3}
VIT = {"image_size": 32, "patch_size": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
SWIN = {
    "patch_size": [4, 4],
    "embed_dim": 24,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 2, 4, 8],
    "window_size": [2, 2],
}
WORKS = [
    ("resnet8", 28, {}),
    ("mobilenetv2_075", 32, {}),
    ("resnet18", 32, {}),
    ("mobilenet_v3_small", 32, {}),
    ("shufflenet_v2_x0_5", 32, {}),
    ("squeezenet1_1", 32, {}),  # its logits come from a convolution
    ("efficientnet_b0", 32, {}),
    ("convnext_tiny", 32, {}),
    ("regnet_y_400mf", 32, {}),
    ("torchvision.models.vision_transformer:VisionTransformer", 32, VIT),
    ("torchvision.models.swin_transformer:SwinTransformer", 32, SWIN),
    ("googlenet", 32, {}),
    ("timm/resnet10t", 32, {}),
    ("timm/mobilenetv3_small_050", 32, {}),
    ("timm/mobilenetv4_conv_small_035", 32, {}),
    ("timm/efficientnet_lite0", 32, {}),
    ("timm/convnext_atto", 32, {}),
    ("timm/resnetv2_18", 32, {}),  # its head is a convolution
    ("timm/vit_tiny_patch16_224", 32, SMALL_VIT),
    ("timm/deit_tiny_distilled_patch16_224", 32, SMALL_VIT),  # two heads
    ("timm/swin_tiny_patch4_window7_224", 32, {"img_size": 32, "window_size": 2, "depths": [1, 1, 1, 1]}),
    ("hf/{}/vit", 32, {}),
    ("{}/own.py:Net", 28, {"width": 4}),
    ("{}/own.py:TwoHeads", 28, {}),
    ("{}/own.py:lazy", 28, {}),
]


def options(world: Path, name: str, size: int, arguments: dict, run_dir: Path) -> list[object]:
    return [
        *("--data.train", world / "train.beton", "--data.val", world / "holdout.beton", "--data.batch_size", 12),
        *("--data.image_size", size, "--model.name", name, "--model.options", json.dumps(arguments)),
        *("--epochs", 1, "--optim.lr", 0.01, "--amp", "off", "--run_dir", run_dir),
    ]


@pytest.mark.parametrize(("name", "size", "arguments"), WORKS, ids=[name for name, _, _ in WORKS])
def test_a_model_is_trained_cached_selected_from_and_distilled(world, tmp_path, name, size, arguments):
    name = name.format(world)
    run_here("train_teacher", *options(world, name, size, arguments, tmp_path / "teacher"))
    code = ["--teacher.model", name] if ":" in name else []
    teacher = ["--data.train", world / "train.beton", "--teacher.run", tmp_path / "teacher", "--amp", "off", *code]
    run_here("cache_logits", *teacher, "--store", tmp_path / "store", "--data.batch_size", 12)
    probes = ["--probe.steps", 2, "--probe.repeats", 1, "--student", "resnet8", "--data.batch_size", 12]
    run_here(
        *("select_teacher", *teacher, "--data.val", world / "holdout.beton", *probes),
        *("--run_dir", tmp_path / "selection"),
    )
    selection = json.loads((tmp_path / "selection" / "selection.json").read_text())
    assert selection["layer"] and selection["layer"] in selection["layer_form"]
    student = options(world, name, size, arguments, tmp_path / "student")
    run_here("distill", *student, "--teacher.store", tmp_path / "store")
    run_here("distill", *student, "--teacher.run", tmp_path / "teacher", *code, "--run_dir", tmp_path / "online")
    cached, online = (metrics(tmp_path / each)[-1]["loss"] for each in ("student", "online"))
    assert cached == pytest.approx(online, rel=0.01)
    more = ["--model", name] if ":" in name else []
    kept = tmp_path / "student" / "checkpoints" / "epoch_0001.pt"
    run_here("evaluate", "--data.val", world / "holdout.beton", "--checkpoint", kept, *more)


REFUSED = [
    ("vit_b_16", 28, {}, "data.image_size 28 does not fit the model vit_b_16 (Wrong image height"),
    ("alexnet", 28, {}, "data.image_size 28 does not fit the model alexnet"),
    ("inception_v3", 28, {}, "data.image_size 28 does not fit the model inception_v3"),
    ("maxvit_t", 28, {}, "data.image_size 28 does not fit the model maxvit_t"),
    ("timm/vit_tiny_patch16_224", 28, {}, "data.image_size 28 does not fit the model timm/vit_tiny_patch16_224"),
    ("timm/no_such_net", 28, {}, "timm/no_such_net cannot be built"),
    ("resnet18", 28, {"depth": 3}, "resnet18 cannot be built with"),
    ("{}/own.py:eleven", 28, {}, "own.py:eleven (it gives (1, 11), not logits (1, 10))"),
    ("{}/own.py:Features", 28, {}, "own.py:Features (a dict without logits)"),
    ("{}/own.py:Missing", 28, {}, "has no function or class Missing"),
    ("hf/{}/none", 28, {}, "is no folder with a config.json"),
    ("hf/{}/vit", 28, {}, "data.image_size 28 does not fit the model hf/"),
]


@pytest.mark.parametrize(("name", "size", "arguments", "expected"), REFUSED, ids=[each[0] for each in REFUSED])
def test_a_model_that_does_not_fit_is_one_line_and_leaves_nothing(world, tmp_path, name, size, arguments, expected):
    with pytest.raises(UserError) as error:
        run_here("train_teacher", *options(world, name.format(world), size, arguments, tmp_path / "run"))
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_auxiliary_heads_are_trained_when_their_loss_has_a_weight(world, tmp_path):
    """And are left alone otherwise, by two processes too: DDP waits for every gradient."""
    name = f"{world}/own.py:TwoHeads"
    for weight in (0, 0.4):
        words = options(world, name, 28, {}, tmp_path / str(weight))
        run("ckd_dist.train_teacher", *words, "--model.auxiliary_weight", weight, "--log_every", 1, nproc=2)
    run_here("train_teacher", *options(world, name, 28, {}, tmp_path / "one"), "--log_every", 1)
    first, second = (
        checkpoint.load(tmp_path / each / "checkpoints" / "epoch_0001.pt", "")["weights"] for each in ("0", "one")
    )
    assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)
    plain, helped = (metrics(tmp_path / each)[0]["loss"] for each in ("0", "0.4"))
    assert helped == pytest.approx(1.4 * plain, rel=0.1)  # two heads that know nothing yet, of one loss
    with pytest.raises(UserError, match=r"model\.auxiliary_weight: resnet8 gives no logits beside its own"):
        run_here(
            "train_teacher", *options(world, "resnet8", 28, {}, tmp_path / "none"), "--model.auxiliary_weight", 0.4
        )


def test_the_code_of_a_network_is_an_input_of_the_run(world, tmp_path):
    source = tmp_path / "net.py"
    source.write_text(OWN)
    words = options(world, f"{source}:Net", 28, {}, tmp_path / "run")
    run("ckd_dist.train_teacher", *words)
    run("ckd_dist.train_teacher", *words)  # complete already
    source.write_text(OWN.replace("relu()", "tanh()"))
    again = run("ckd_dist.train_teacher", *words, status=2)
    assert f"holds a run made of another model.source, {source} has changed since (sha256 was" in again.stderr
    cache = ["--data.train", world / "train.beton", "--teacher.run", tmp_path / "run", "--store", tmp_path / "store"]
    warned = run("ckd_dist.cache_logits", *cache, "--teacher.model", f"{source}:Net")
    assert f"warning: {source} has changed since" in warned.stdout + warned.stderr
    refused = run("ckd_dist.cache_logits", *cache, "--store", tmp_path / "other", status=2)
    assert refused.stderr.count("\n") == 1 and f"add --teacher.model {source}:Net" in refused.stderr
    assert not (tmp_path / "other").exists()


def test_search_trains_ones_own_networks(world, tmp_path):
    name = f"{world}/own.py:Net"
    run_here("train_teacher", *options(world, name, 28, {}, tmp_path / "teacher"))
    cached = ["--data.train", world / "train.beton", "--teacher.run", tmp_path / "teacher", "--teacher.model", name]
    run_here("cache_logits", *cached, "--store", tmp_path / "store", "--data.batch_size", 12)
    run_here(
        *("search", *options(world, name, 28, {}, tmp_path / "search"), "--teacher.store", tmp_path / "store"),
        *("--grid.models", json.dumps([name, "resnet8"]), "--grid.alphas", "[0.5]", "--grid.temperatures", "[4.0]"),
        *("--data.test", world / "test.beton"),
    )
    assert (tmp_path / "search" / "results.csv").read_text().count("\n") == 3
    assert len(list((tmp_path / "search" / "students").iterdir())) == 2


def test_options_of_a_model_are_a_part_of_its_run(world, tmp_path):
    words = options(world, f"{world}/own.py:Net", 28, {"width": 4}, tmp_path / "run")
    run_here("train_teacher", *words)
    kept = checkpoint.load(tmp_path / "run" / "checkpoints" / "epoch_0001.pt", "")
    assert kept["metadata"]["options"] == {"width": 4} and len(kept["weights"]["fc.bias"]) == 10
    with pytest.raises(UserError, match=r"holds a run with model\.options\.width 4, not 8"):
        run_here("train_teacher", *words, "--model.options.width", 8)
    run_here("train_teacher", *words, "--run_dir", tmp_path / "again")
    assert same_weights(*(tmp_path / each / "checkpoints" / "epoch_0001.pt" for each in ("run", "again")))


def test_a_model_that_begins_with_a_librarys_weights_sees_images_as_they_did(world, tmp_path, capsys):
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": 32, "width": 32}})
    )
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((world / "vit" / name).read_bytes())
    words = options(world, f"hf/{tmp_path}", 32, {}, tmp_path / "run")
    del words[6:8]  # the size
    run_here("train_teacher", *words, "--model.weights", "DEFAULT", "--optim.lr", 1e-9)
    said = capsys.readouterr().out
    assert "images of 32 px, normalised by mean (0.5, 0.5, 0.5)" in said
    assert "DEFAULT: it is of other classes: classifier.weight, classifier.bias start anew" in said
    from transformers import ViTForImageClassification

    kept = checkpoint.load(tmp_path / "run" / "checkpoints" / "epoch_0001.pt", "")
    metadata = kept["metadata"]
    assert (metadata["mean"], metadata["std"], metadata["image_size"]) == ([0.5] * 3, [0.25] * 3, 32)
    expected = ViTForImageClassification.from_pretrained(tmp_path).state_dict()
    same = [
        torch.allclose(kept["weights"][key], each, atol=1e-6) for key, each in expected.items() if "classi" not in key
    ]
    assert all(same) and len(same) > 30
    with open(tmp_path / "model.safetensors", "ab") as file:
        file.write(b" ")
    with pytest.raises(UserError, match=r"made of another model\.weights"):
        run_here("train_teacher", *words, "--model.weights", "DEFAULT", "--optim.lr", 1e-9)

"""Networks by name: the published sizes, other libraries', one's own code."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from ckd_dist.core import checkpoint
from ckd_dist.core.errors import UserError
from ckd_dist.nn.models import build_model, defining_file, load_model, preprocessing


@pytest.mark.parametrize(
    ("name", "published"),
    [
        # In millions at 100 classes; the networks are those of Tian, Krishnan, Isola, "Contrastive Representation
        # Distillation" (arXiv 1910.10699).
        ("resnet20", 0.28),
        ("resnet32", 0.47),
        ("resnet56", 0.86),
        ("resnet110", 1.74),
        ("wrn_16_2", 0.70),
        ("wrn_40_1", 0.57),
        ("wrn_40_2", 2.26),
    ],
)
def test_cifar_networks_have_the_published_parameter_counts(name, published):
    model = build_model(name, 100)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == published
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 100)


def test_small_networks_have_their_shape():
    assert sum(p.numel() for p in build_model("resnet8", 10).parameters()) == 78_042


def test_the_cifar_mobilenet_is_the_one_of_the_papers_table():
    """Its weights, multiply-adds and shapes, counted by hand from the published code."""
    model = build_model("mobilenetv2_075", 100).eval()
    assert sum(p.numel() for p in model.parameters()) == 1_475_692
    multiply_adds = []

    def count(module, inputs, output):
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            multiply_adds.append(output[0].numel() * module.weight[0].numel())
            stages.append(tuple(output.shape[1:3]))

    stages: list[tuple[int, ...]] = []
    for module in model.modules():
        module.register_forward_hook(count)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 100)
    assert round(sum(multiply_adds) / 1e6, 1) == 13.3
    assert stages[0] == (24, 16) and stages[-2:] == [(1280, 2), (100,)]
    assert [stages[3 * block] for block in (1, 3, 6, 10, 13, 16, 17)] == [
        (12, 16), (18, 16), (24, 8), (48, 4), (72, 4), (120, 2), (240, 2)
    ]  # fmt: skip
    assert not any(isinstance(module, torch.nn.ReLU6) for module in model.modules())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "googlenet", "squeezenet1_1"])
def test_torchvision_models_are_there_by_name(name):
    assert build_model(name, 7).eval()(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"model\.name: no model resnet19; did you mean resnet18"):
        build_model("resnet19", 10)


def test_a_checkpoint_whose_weights_are_of_another_network_of_that_name_is_refused(tmp_path):
    weights = build_model("mobilenetv2_075", 10).state_dict()
    metadata = {"model": "mobilenetv2_075", "num_classes": 10, "image_size": 32, "mean": [0.5], "std": [0.5]}
    first = weights.pop("features.0.weight")
    misfit, foreign = r"does not fit mobilenetv2_075: features\.0\.weight is (missing, )?\[", "is no checkpoint of this"
    for state, expected in (
        ({"weights": weights, "metadata": metadata}, misfit),
        ({"weights": {**weights, "features.0.weight": first[:, :2]}, "metadata": metadata}, misfit),
        ({"weights": None, "metadata": metadata}, foreign),
        ({"weights": weights, "metadata": {}}, foreign),
    ):
        checkpoint.save(tmp_path / "x.pt", state)
        with pytest.raises(UserError, match=rf"teacher\.run: .*x\.pt {expected}"):
            load_model(tmp_path / "x.pt", "teacher.run")


# ------------------------------------------------------------------------------------------- others


def test_networks_of_timm_and_transformers_are_there_by_name(tmp_path):
    assert build_model("timm/resnet10t", 7).eval()(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    options = {"img_size": 64, "patch_size": 16, "depth": 2}
    assert build_model("timm/vit_tiny_patch16_224", 7, options).eval()(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    write_vit(tmp_path)
    output = build_model(f"hf/{tmp_path}", 7).eval()(torch.randn(2, 3, 32, 32))
    assert output.logits.shape == (2, 7)


def write_vit(folder):
    """A folder as transformers saves an image classifier, its weights and its preprocessing."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(folder)
    values = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


def test_a_library_says_what_its_networks_were_made_to_see(tmp_path):
    found = preprocessing("timm/efficientnet_lite0")
    assert found is not None and found.image_size == 224 and found.crop_share == 0.875
    write_vit(tmp_path)
    found = preprocessing(f"hf/{tmp_path}")
    assert found is not None and (found.mean, found.std, found.image_size) == ((0.5,) * 3, (0.25,) * 3, 32)
    assert preprocessing("resnet18") is None


OWN = """
import torch, helper
class Net(torch.nn.Module):
    def __init__(self, num_classes, width=4):
        super().__init__()
        self.fc = torch.nn.Linear(3 * helper.SCALE, num_classes)
    def forward(self, x):
        return self.fc(x.mean((2, 3)))
    @classmethod
    def narrow(cls, num_classes):
        return cls(num_classes, width=1)
def fixed():
    return Net(10)
def broken(num_classes):
    raise ValueError("no\\nsuch size")
def nothing():
    return 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A file of networks, which imports one beside it; and as a module."""
    (tmp_path / "net.py").write_text(OWN)
    (tmp_path / "helper.py").write_text("SCALE = 1\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    return str(tmp_path / "net.py")


def test_ones_own_networks_are_there_by_file_or_module(own, tmp_path, monkeypatch):
    assert build_model(f"{own}:Net", 7)(torch.randn(2, 3, 8, 8)).shape == (2, 7)
    assert build_model(f"{own}:Net", 7, {"width": 8})(torch.randn(2, 3, 8, 8)).shape == (2, 7)
    assert build_model(f"{own}:fixed", 7)(torch.randn(2, 3, 8, 8)).shape == (2, 10)  # which `prepare` refuses
    sys.path.insert(0, str(tmp_path))
    assert build_model("net:Net.narrow", 7)(torch.randn(2, 3, 8, 8)).shape == (2, 7)
    assert build_model("net:Net", 7)(torch.randn(2, 3, 8, 8)).shape == (2, 7)
    path, digest = defining_file("net:Net")
    assert (path, digest) == (own, defining_file(f"{own}:fixed")[1])
    assert defining_file("resnet18") is None


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("{}:Other", {}, "net.py has no function or class Other"),
        (
            "{}:Net",
            {"depth": 3},
            "net.py:Net cannot be built with num_classes=7, depth=3 (TypeError: Net.__init__()",
        ),
        ("{}:broken", {}, "net.py:broken cannot be built with num_classes=7 (ValueError: no)"),
        ("{}:nothing", {}, "net.py:nothing gives a int, not a torch.nn.Module"),
        ("{}x.py:Net", {}, "no such file: "),
        ("no_such_package.nets:Net", {}, "no_such_package.nets cannot be imported (ModuleNotFoundError: No module"),
        (
            "timm/resnet999",
            {},
            "timm/resnet999 cannot be built with model_name='resnet999', num_classes=7 (Runtime",
        ),
        ("hf/none", {}, "hf/none is no folder with a config.json"),
        ("resnet18", {"depth": 3}, "resnet18 cannot be built with weights=None, num_classes=7, depth=3 (TypeError"),
    ],
)
def test_what_is_no_network_is_one_line(own, name, options, expected):
    with pytest.raises(UserError) as error:
        build_model(name.format(own), 7, options)
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("model.name: ")


def test_a_library_that_is_missing_is_named_with_its_extra():
    code = (
        "import sys; sys.modules['timm'] = sys.modules['transformers'] = None\n"
        "from ckd_dist.nn.models import build_model\n"
        "for name in ('timm/resnet18', 'hf/.'):\n"
        "    try: build_model(name, 10)\n"
        "    except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "model.name: timm is not installed: pip install 'ckd_dist[timm]'",
        "model.name: transformers is not installed: pip install 'ckd_dist[hf]'",
    ]


def test_a_checkpoint_does_not_say_which_code_is_run(own, tmp_path):
    """Only the command line does."""
    model = build_model(f"{own}:Net", 7)
    metadata = {"model": f"{own}:Net", "num_classes": 7, "image_size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
    checkpoint.save(tmp_path / "x.pt", {"weights": model.state_dict(), "metadata": metadata})
    with pytest.raises(UserError, match=rf"trusted to name: if it is to be run, add --teacher\.model {own}:Net"):
        load_model(tmp_path / "x.pt", "teacher.run")
    found, _ = load_model(tmp_path / "x.pt", "teacher.run", f"{own}:Net")
    assert torch.equal(found.fc.weight, model.fc.weight)
    attack = {**metadata, "model": "os:system"}
    checkpoint.save(tmp_path / "y.pt", {"weights": model.state_dict(), "metadata": attack})
    with pytest.raises(UserError, match=r"code of your own, which a file of weights cannot be trusted to name"):
        load_model(tmp_path / "y.pt", "teacher.run")
    checkpoint.save(tmp_path / "z.pt", {"weights": model.state_dict(), "metadata": {**metadata, "model": "resnet8"}})
    with pytest.raises(UserError, match=r"is of resnet8, no code of your own: leave --teacher\.model out"):
        load_model(tmp_path / "z.pt", "teacher.run", f"{own}:Net")

"""Networks by name: the published sizes, any of torchvision's, weights loaded safely."""

from __future__ import annotations

import pickle

import pytest
import torch

from ckd_dist.core import checkpoint
from ckd_dist.core.errors import UserError
from ckd_dist.nn.models import build_model, load_model, load_weights, require_fits


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


def test_logits_are_not_rounded_to_bfloat16():
    model = build_model("resnet8", 10).eval()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(8, 3, 28, 28))
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


def test_initial_weights_come_from_a_state_dict_or_a_checkpoint(tmp_path):
    source = build_model("resnet8", 10)
    torch.save(source.state_dict(), tmp_path / "plain.pt")
    checkpoint.save(tmp_path / "own.pt", {"weights": source.state_dict(), "metadata": {}})
    for name in ("plain.pt", "own.pt"):
        model = build_model("resnet8", 10)
        load_weights(model, str(tmp_path / name))
        assert all(
            torch.equal(a, b) for a, b in zip(source.state_dict().values(), model.state_dict().values(), strict=True)
        )


def test_weights_that_do_not_fit_are_refused(tmp_path):
    torch.save(build_model("resnet8", 10).state_dict(), tmp_path / "ten.pt")
    with pytest.raises(UserError, match=r"model\.weights: .*ten\.pt does not fit the model: fc\.bias, fc\.weight"):
        load_weights(build_model("resnet8", 11), str(tmp_path / "ten.pt"))
    with pytest.raises(UserError, match="no such file"):
        load_weights(build_model("resnet8", 10), str(tmp_path / "none.pt"))


def test_a_checkpoint_whose_weights_are_of_another_network_of_that_name_is_refused(tmp_path):
    weights = build_model("mobilenetv2_075", 10).state_dict()
    metadata = {"model": "mobilenetv2_075", "num_classes": 10, "image_size": 32, "mean": [0.5], "std": [0.5]}
    first = weights.pop("features.0.weight")
    misfit, foreign = "does not fit mobilenetv2_075: features.0.weight missing or different", "is no checkpoint of this"
    for state, expected in (
        ({"weights": weights, "metadata": metadata}, misfit),
        ({"weights": {**weights, "features.0.weight": first[:, :2]}, "metadata": metadata}, misfit),
        ({"weights": None, "metadata": metadata}, foreign),
        ({"weights": weights, "metadata": {}}, foreign),
    ):
        checkpoint.save(tmp_path / "x.pt", state)
        with pytest.raises(UserError, match=rf"teacher\.run: .*x\.pt {expected}"):
            load_model(tmp_path / "x.pt", "teacher.run")


@pytest.mark.parametrize(
    ("name", "size", "train_images", "expected"),
    [
        ("vit_b_16", 64, 2, "data.image_size 64 does not fit the model vit_b_16 (Wrong image height"),
        ("inception_v3", 64, 2, "data.image_size 64 does not fit the model inception_v3 (Calculated padded input"),
        ("alexnet", 32, 0, "data.image_size 32 does not fit the model alexnet"),
        ("mobilenetv2_075", 16, 1, "data.batch_size leaves one image to some of 1 processes, too few for mobilenetv2"),
        ("mobilenetv2_075", 16, 2, None),
        ("mobilenetv2_075", 32, 1, None),
        ("resnet8", 8, 1, None),
    ],
)
def test_a_size_or_batch_that_a_model_cannot_take_is_refused_and_a_good_one_leaves_no_trace(
    name, size, train_images, expected
):
    model = build_model(name, 10).train()
    if expected is None:
        model.fc = torch.nn.Sequential(torch.nn.Dropout(), model.fc)  # draws random numbers
    modes = {key: module.training for key, module in model.named_modules()}
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.random.get_rng_state()
    if expected is None:
        require_fits(model, name, 10, size, "data.image_size", train_images=train_images)
    else:
        with pytest.raises(UserError) as error:
            require_fits(model, name, 10, size, "data.image_size", train_images=train_images)
        assert str(error.value).startswith(expected) and "\n" not in str(error.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())
    assert modes == {key: module.training for key, module in model.named_modules()}


def test_a_model_that_gives_no_logits_is_refused():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 10, 1))
    with pytest.raises(UserError, match=r"fit the model mine \(it gives \(1, 10, 8, 8\), not logits \(1, 10\)"):
        require_fits(model, "mine", 10, 8, "data.image_size")


def test_a_weights_file_executes_nothing(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    for path, write in (("raw.pt", pickle.dump), ("torch.pt", torch.save)):
        with open(tmp_path / path, "wb") as file:
            write({"weights": Attack()}, file)
        with pytest.raises(UserError, match=r"model\.weights: .* is not a file of tensors that torch loads safely"):
            load_weights(build_model("resnet8", 10), str(tmp_path / path))
    assert not (tmp_path / "executed").exists()


def test_weights_sha256_tells_weights_apart():
    model = build_model("resnet8", 10)
    first = checkpoint.weights_sha256(model.state_dict())
    assert first == checkpoint.weights_sha256(model.state_dict())
    with torch.no_grad():
        model.fc.bias[0] += 1e-6
    assert first != checkpoint.weights_sha256(model.state_dict())

"""Networks by name: the published sizes, any of torchvision's, weights loaded safely."""

from __future__ import annotations

import pickle

import pytest
import torch

from ckd_dist import checkpoint
from ckd_dist.config import UserError
from ckd_dist.models import build_model, load_weights


@pytest.mark.parametrize(
    ("name", "published"),
    [
        # In millions at 100 classes; the networks are those of Tian, Krishnan, Isola, "Contrastive Representation
        # Distillation" (arXiv 1910.10699), which the paper's code shares.
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
    mobile = build_model("mobilenetv2_075", 100).eval()
    features = mobile.features(torch.randn(1, 3, 32, 32))
    assert features.shape == (1, 1280, 4, 4)
    assert mobile(torch.randn(2, 3, 32, 32)).shape == (2, 100)


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

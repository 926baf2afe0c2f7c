"""What one batch tells of a network: whether it fits, what makes its logits, which parameters it uses."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from ckd_dist.core.errors import UserError
from ckd_dist.nn.forward import auxiliary_logits, forward_logits, logits_of
from ckd_dist.nn.models import build_model
from ckd_dist.nn.probe import logit_modules, prepare, require_fits, unused_parameters


def ready(name: str, num_classes: int, size: int) -> nn.Module:
    return prepare(build_model(name, num_classes), name, num_classes, size, "data.image_size")


@pytest.mark.parametrize("name", ["resnet8", "squeezenet1_1", "timm/mobilenetv3_small_050", "timm/resnetv2_50x1_bit"])
def test_logits_are_not_rounded_to_bfloat16(name):
    model = ready(name, 10, 64).eval()
    last = list(model.state_dict().values())[-1]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(8, 3, 64, 64))
    assert logits.dtype == torch.float32 and last.dtype == torch.float32
    if name != "squeezenet1_1":  # whose logits are a mean
        assert not torch.equal(logits, logits.bfloat16().float())
    copied = copy.deepcopy(model)  # as an average of weights is
    with torch.autocast("cpu", torch.bfloat16):
        assert copied(torch.randn(2, 3, 64, 64)).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "size", "heads"),
    [
        ("resnet8", 28, {"fc"}),
        ("squeezenet1_1", 64, {"classifier.1"}),
        ("timm/mobilenetv3_small_050", 64, {"classifier"}),
        ("timm/mobilenetv4_conv_small_035", 64, {"classifier"}),
        ("timm/resnetv2_50x1_bit", 64, {"head.fc"}),  # a convolution
        ("timm/deit_tiny_distilled_patch16_224", 224, {"head", "head_dist"}),
    ],
)
def test_what_makes_the_logits_is_found_whatever_its_class(name, size, heads):
    assert set(logit_modules(build_model(name, 10), size)) == heads


def test_a_prepared_model_gives_what_it_gave():
    torch.manual_seed(0)
    plain = build_model("resnet8", 10)
    model = prepare(copy.deepcopy(plain), "resnet8", 10, 32, "data.image_size")
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(plain(images), model(images))


class Lazy(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.conv, self.norm, self.fc = nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.LazyLinear(num_classes)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).flatten(1))


def test_lazy_layers_have_their_weights_and_a_size_that_they_do_not_take_is_refused():
    torch.manual_seed(0)
    model = prepare(Lazy(7), "lazy", 7, 16, "data.image_size")
    assert {key: tuple(each.shape) for key, each in model.named_parameters()}["fc.weight"] == (7, 4 * 14 * 14)
    assert model.norm.num_batches_tracked == 0
    with pytest.raises(UserError, match=r"data\.val_image_size 20 does not fit the model lazy"):
        require_fits(model, "lazy", 7, 20, "data.val_image_size")


# ------------------------------------------------------------------------------------------- outputs


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor


class Heads(nn.Module):
    """Gives its logits in a container, and in train mode those of another head beside."""

    def __init__(self, form: str, num_classes: int = 10):
        super().__init__()
        self.form, self.fc, self.other = form, nn.Linear(12, num_classes), nn.Linear(12, num_classes)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        features = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        logits = self.fc(features)
        if self.form == "object":
            return Output(logits, features)
        if self.form == "dict":
            return {"features": features, "logits": logits, "auxiliary": self.other(features)}
        return (logits, self.other(features)) if self.training else logits


@pytest.mark.parametrize("form", ["object", "dict", "tuple"])
def test_logits_are_found_in_what_a_model_gives(form):
    model = prepare(Heads(form), form, 10, 8, "data.image_size")
    images = torch.randn(3, 3, 8, 8)
    expected = model.fc(nn.functional.adaptive_avg_pool2d(images, 2).flatten(1))
    for training in (True, False):
        output = model.train(training)(images)
        assert torch.equal(logits_of(output), expected)
    others = auxiliary_logits(model.train()(images))
    assert len(others) == (form != "object") and all(not torch.equal(each, expected) for each in others)
    assert torch.equal(forward_logits(model.eval(), images, "off"), expected)
    assert logit_modules(model, 8) == ["fc"]


def test_parameters_without_a_part_in_the_logits_are_told():
    assert unused_parameters(build_model("resnet8", 10), "resnet8", 28, auxiliary=False) == []
    model = Heads("tuple")
    unused = ["unused.weight", "unused.bias"]
    alone = unused_parameters(model, "heads", 8, auxiliary=False)
    assert alone == ["other.weight", "other.bias", *unused]
    assert unused_parameters(model, "heads", 8, auxiliary=True) == unused
    assert all(each.grad is None and each.requires_grad for each in model.parameters())
    with pytest.raises(UserError, match=r"model\.auxiliary_weight: resnet8 gives no logits beside its own"):
        unused_parameters(build_model("resnet8", 10), "resnet8", 28, auxiliary=True)


@pytest.mark.parametrize("form", ["features only", "eleven", "a string"])
def test_what_is_no_logits_of_these_classes_is_refused(form):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 11)

        def forward(self, x):
            logits = self.fc(x.mean((2, 3)))
            return {"features only": {"features": logits}, "eleven": logits, "a string": "logits"}[form]

    why = r"it gives \(1, 11\), not logits \(1, 10\)" if form == "eleven" else "a (dict|str) without logits"
    with pytest.raises(UserError, match=rf"^data\.image_size 8 does not fit the model mine \({why}\)"):
        prepare(Model(), "mine", 10, 8, "data.image_size")


# ------------------------------------------------------------------------------------------- sizes


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

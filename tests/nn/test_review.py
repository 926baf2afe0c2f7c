"""Knowledge review: the published loss of the same tensors, and the stages of any network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from ckd_dist.core.errors import UserError
from ckd_dist.nn import models
from ckd_dist.nn.features import FeatureLayer, forward_maps, recorded, stages
from ckd_dist.nn.forward import forward_logits
from ckd_dist.nn.review import Connectors, ReviewingStudent, context_loss, review_loss, warm_up

# Of mdistiller/distillers/ReviewKD.py (megvii-research/mdistiller at a08d46f), run on the tensors of these tests.
CONTEXT_LOSSES = {8: 0.10654264575405727, 4: 0.10092223762210559, 3: 0.10566790840013553, 2: 0.1291630039345308}
REVIEWS = {1: (1.79505681, (0.1366952, 0.2361033, 0.1924525)), 2: (1.42367768, (0.1727013, 0.2283447, 0.5021767))}


def maps(seed, shapes):
    """Three images' maps, numbers in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.rand(3, channels, side, side, generator=generator, dtype=torch.float64) for channels, side in shapes]
    return [each.float() for each in drawn]


@pytest.mark.parametrize(("channels", "side"), [(4, 8), (5, 4), (6, 3), (3, 2)])
def test_the_loss_of_a_map_is_mdistillers(channels, side):
    (ours,), (theirs,) = (maps(seed, [(channels, side)]) for seed in (1, 2))
    found = context_loss(ours, theirs)
    assert found.shape == (3,) and found.mean().item() == pytest.approx(CONTEXT_LOSSES[side], rel=1e-6)


@pytest.mark.parametrize(("side", "areas"), [(16, (4, 2, 1)), (4, (2, 1)), (2, (1,)), (1, ())])
def test_the_loss_of_a_map_is_its_formula(side, areas):
    (ours,), (theirs,) = (maps(seed, [(5, side)]) for seed in (3, 4))
    difference = (ours - theirs).double().numpy()
    expected, weight = (difference**2).mean((1, 2, 3)), 1.0
    for count in areas:  # the mean over an area is linear: that of the difference
        weight /= 2
        width = side // count
        coarse = difference.reshape(3, 5, count, width, count, width).mean((3, 5))
        expected = expected + weight * (coarse**2).mean((1, 2, 3))
    np.testing.assert_allclose(context_loss(ours, theirs), expected / (2 - weight), rtol=1e-5)


@pytest.mark.parametrize("seed", REVIEWS)
def test_connectors_and_loss_are_mdistillers(seed):
    shapes = [(4, 8), (6, 4), (8, 2)], [(5, 8), (7, 4), (9, 4)]
    ours, theirs = maps(seed, shapes[0]), maps(seed + 10, shapes[1])
    layers = [[FeatureLayer("", (channels, side, side)) for channels, side in each] for each in shapes]
    connectors = Connectors(*layers)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for fusion in connectors.fusions:
            for part in filter(None, (fusion.reduce, fusion.expand, fusion.attention)):
                for parameter in part.parameters():
                    parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
    loss = review_loss(connectors([each.requires_grad_() for each in ours]), theirs).mean()
    loss.backward()
    expected, gradients = REVIEWS[seed]
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert [each.grad.abs().sum().item() for each in ours] == pytest.approx(gradients, rel=1e-4)


def test_the_warm_up_is_the_published_one_of_240_epochs():
    assert [warm_up(epoch, 240) for epoch in (0, 9, 19, 239)] == pytest.approx([0.05, 0.5, 1, 1])
    assert warm_up(0, 8) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet8", {"features.3": 32, "features.4": 16, "features": 8}),
        ("wrn_16_2", {"features.2": 32, "features.4": 16, "features": 8}),
        ("mobilenetv2_075", {"features.5": 16, "features.8": 8, "features.15": 4, "features": 2}),
        ("timm/convnext_atto", {"stages.0": 8, "stages.1": 4, "stages.2": 2}),  # and a last of one position
        ("resnet18", {"layer1": 56, "layer2": 28, "layer3": 14, "layer4": 7}),
        ("mobilenet_v2", {"features.3": 56, "features.6": 28, "features.13": 14, "features": 7}),
        ("vgg11", {"features.9": 56, "features.14": 28, "features.19": 14, "features": 7}),
        ("swin_t", {"features.1": 56, "features.3": 28, "features.5": 14, "permute": 7}),
    ],
)
def test_the_last_map_of_every_resolution_is_found(name, expected):
    if "56" in str(expected):
        with torch.device("meta"):  # shapes alone
            model, size = torchvision.models.get_model(name, weights=None, num_classes=10), 224
    else:
        model, size = models.build_model(name, 10), 32
    model.train()
    assert {each.name: each.side for each in stages(model, size, name)} == expected
    assert model.training


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "linear"])
def test_networks_without_stages_are_refused(name):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    if "vit" in name:
        model = models.build_model(name, 10, {"img_size": 32, "depth": 1})
    with pytest.raises(UserError, match=rf"^kd\.feature_weight: {name} has square feature maps of (no|1) resolution"):
        stages(model, 32, name)


class Shared(nn.Module):
    """Three convolutions that halve the side, after each of them the same activation, in place; channels at the end."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(count, 2 * count, 3, 2, 1) for count in (3, 6, 12))
        self.act, self.fc = nn.ReLU(inplace=True), nn.Linear(24, 10)

    def forward(self, images):
        for each in self.convolutions:
            images = self.act(each(images))
        return self.fc(images.permute(0, 2, 3, 1).mean((1, 2)))


def test_a_module_that_is_called_several_times_gives_the_map_of_its_call():
    model, images = Shared().eval(), torch.randn(2, 3, 32, 32)
    found = stages(model, 32, "own")
    assert [(each.name, each.call, each.side) for each in found] == [("act", 0, 16), ("act", 1, 8), ("act", 2, 4)]
    logits, seen = forward_maps(model, found, images, "off")
    expected, own = images, []
    for each in model.convolutions:
        expected = F.relu(each(expected))
        own.append(expected)
    for ours, theirs in zip(own, seen, strict=True):
        torch.testing.assert_close(theirs, ours)
    assert torch.equal(logits, forward_logits(model, images, "off")) and not seen[0].is_inference()
    with recorded(model, found[1:]) as maps:
        model(images)
    assert [each.shape[1:] for each in maps] == [(12, 8, 8), (24, 4, 4)]
    assert not model.act._forward_hooks


def test_the_student_gets_its_gradient_through_every_stage():
    model = Shared()
    theirs = [FeatureLayer("", (5, side, side)) for side in (32, 8, 4, 2)]
    reviewing = ReviewingStudent(model, stages(model, 32, "own"), theirs, 1.0)
    output, fused = reviewing(torch.randn(2, 3, 32, 32))
    assert output.shape == (2, 10) and [each.shape[2] for each in fused] == [8, 4, 2, 1]
    review_loss(fused, [torch.rand(2, 5, each.side, each.side) for each in theirs]).sum().backward()
    assert all(each.grad is not None for each in reviewing.connectors.parameters())
    assert all(each.weight.grad.abs().sum() > 0 for each in model.convolutions)

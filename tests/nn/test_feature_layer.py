"""The last feature map before the pooling, found in any network."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from ckd_dist.core.errors import UserError
from ckd_dist.nn import models


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

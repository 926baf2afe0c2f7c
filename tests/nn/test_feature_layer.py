"""The last features before the pooling, found in any network: a map, or tokens that form one."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from ckd_dist.core.errors import UserError
from ckd_dist.nn import models
from ckd_dist.nn.features import feature_layer
from ckd_dist.nn.forward import forward_features


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet8", "features"), ("wrn_16_2", "features"), ("mobilenetv2_075", "features"), ("resnet18", "layer4"),
        ("mobilenet_v2", "features"), ("densenet121", "features"), ("convnext_tiny", "features"), ("vgg11", "features"),
        ("squeezenet1_1", "classifier.2"), ("swin_t", "permute"), ("vit_b_16", "encoder"),
    ],
)  # fmt: skip
def test_the_last_feature_map_before_the_pooling_is_found(name, layer):
    if name in ("resnet8", "wrn_16_2", "mobilenetv2_075"):
        model, size = models.build_model(name, 10), 32
    else:
        with torch.device("meta"):  # shapes alone
            model, size = torchvision.models.get_model(name, weights=None, num_classes=10), 224
    assert feature_layer(model.eval(), size).name == layer


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
    ("network", "layer", "words"),
    [
        (Network(add_a_branch, branch=nn.Conv2d(12, 12, 3, padding=1)), "stem", "stem (12 channels of 8 x 8)"),
        (Network(leave_a_map_unused, unused=nn.Conv2d(12, 12, 3)), "stem", "stem (12 channels of 8 x 8)"),
        (
            Network(attend, norm=nn.LayerNorm(6), project=nn.Linear(12, 12)),
            "layers.project",
            "layers.project (12 channels of 8 x 8 tokens)",
        ),
        (Network(end_with_channels, norm=nn.LayerNorm(12)), "layers.norm", "layers.norm (12 channels of 8 x 8)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)), None, None),
    ],
    ids=["branch", "unused", "attention", "channels last", "no map"],
)
def test_branches_and_unused_maps_are_no_features(network, layer, words):
    assert network.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    if layer:
        found = feature_layer(network, 32)
        assert (found.name, found.words) == (layer, words)
    else:
        with pytest.raises(UserError, match=r"layer: the teacher has no map or grid of tokens before a pooling"):
            feature_layer(network, 32)


@pytest.mark.parametrize(
    ("name", "options", "layer", "shape", "words"),
    [
        ("timm/vit_tiny_patch16_224", {"img_size": 64, "depth": 1}, None, (192, 4, 4), "192 channels of 4 x 4 tokens"),
        ("timm/vit_tiny_patch16_224", {"img_size": 32, "depth": 1}, None, (192, 2, 2), "192 channels of 2 x 2 tokens"),
        (  # nine tokens in all, which are no grid of 3 x 3
            "timm/vit_tiny_patch16_224", {"img_size": 32, "depth": 1, "reg_tokens": 4}, "blocks.0", (192, 2, 2),
            "192 channels of 2 x 2 tokens, 5 before them",
        ),
        ("timm/deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 1}, None, (192, 4, 4), "tokens, 2 before"),
        ("timm/swin_tiny_patch4_window7_224", {"depths": [1, 1, 1, 1]}, None, (768, 7, 7), "768 channels of 7 x 7"),
        ("timm/convnext_atto", {}, None, (320, 2, 2), "320 channels of 2 x 2"),
        ("timm/vit_tiny_patch16_224", {"img_size": 64, "depth": 1}, "fc_norm", (192, 1, 1), "fc_norm (192 values)"),
    ],
)  # fmt: skip
def test_tokens_and_maps_with_channels_last_become_maps(name, options, layer, shape, words):
    size = options.get("img_size", 224 if "swin" in name else 64)
    model = models.build_model(name, 10, options).eval()
    found = feature_layer(model, size, layer)
    output, logits = forward_features(model, found.name, torch.randn(3, 3, size, size), "off")
    features = found.to_map(output)
    assert features.shape == (3, *shape) and logits.shape == (3, 10)
    assert found.channels == shape[0] and words in found.words
    if output.ndim == 3:  # the token of row 1, column 0
        side = shape[1]
        assert torch.equal(features[:, :, 1, 0], output[:, -side * side + side])


def test_a_layer_without_features_is_refused():
    model = models.build_model("timm/vit_tiny_patch16_224", 10, {"img_size": 64, "depth": 1}).eval()
    with pytest.raises(UserError, match=r"layer: the teacher has no module blocks\.9; it has patch_embed, "):
        feature_layer(model, 64, "blocks.9")
    with pytest.raises(UserError, match=r"layer: blocks\.0\.attn\.q_norm gives \(3, 17, 64\) an image"):
        feature_layer(model, 64, "blocks.0.attn.q_norm")

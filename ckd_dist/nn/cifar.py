"""CIFAR networks, those of Tian, Krishnan, Isola, "Contrastive Representation Distillation" (arXiv 1910.10699), and of
mdistiller.

The paper's own code has the same MobileNetV2, but ResNets whose shortcuts pad with zeros where the shape changes; here,
as in most published distillation results, these shortcuts are 1x1 convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def _initialise(model: _Classifier) -> _Classifier:
    """He initialisation of the convolutions (fan out), as the published CIFAR networks use."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., 2016, "Deep Residual Learning", section 4.2); the shortcut is a
    1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = _conv(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def _cifar_resnet(depth: int, num_classes: int) -> nn.Module:
    """ResNet for 32x32 images with 6n + 2 layers and 16, 32, 64 filters, with projection shortcuts."""
    blocks = (depth - 2) // 6
    layers: list[nn.Module] = [_conv(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    inputs = 16
    for outputs, first_stride in ((16, 1), (32, 2), (64, 2)):
        for block in range(blocks):
            layers.append(_BasicBlock(inputs, outputs, first_stride if block == 0 else 1))
            inputs = outputs
    return _initialise(_Classifier(nn.Sequential(*layers), inputs, num_classes))


class _WideBlock(nn.Module):
    """Pre-activation block of wide residual networks (Zagoruyko and Komodakis, 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, outputs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), _conv(outputs, outputs, 3)
        self.shortcut = _conv(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


def _wide_resnet(depth: int, width: int, num_classes: int) -> nn.Module:
    """WRN-depth-width for 32x32 images: 6n + 4 layers."""
    blocks = (depth - 4) // 6
    layers: list[nn.Module] = [_conv(3, 16, 3)]
    inputs = 16
    for outputs, first_stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
        for block in range(blocks):
            layers.append(_WideBlock(inputs, outputs, first_stride if block == 0 else 1))
            inputs = outputs
    layers += [nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)]
    return _initialise(_Classifier(nn.Sequential(*layers), inputs, num_classes))


class _InvertedResidual(nn.Module):
    """Expand, depthwise, project (Sandler et al., 2018, "MobileNetV2"), with ReLU and, as in `_cifar_mobilenetv2`'s
    sources, with the first convolution even where it does not expand."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        self.layers = nn.Sequential(
            *(_conv(inputs, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True)),
            *(_conv(hidden, hidden, 3, stride, groups=hidden), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True)),
            *(_conv(hidden, outputs, 1), nn.BatchNorm2d(outputs)),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def _cifar_mobilenetv2(width: float, num_classes: int) -> nn.Module:
    """MobileNetV2 for 32x32 images, as distillation papers use it since Jin et al., "Knowledge Distillation via Route
    Constrained Optimization" (arXiv 1904.09149): the second stage keeps the size, so that the last feature map is 2x2,
    and numbers of channels are rounded down, not to multiples of eight."""
    inputs = int(32 * width)
    layers: list[nn.Module] = [_conv(3, inputs, 3, 2), nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)]
    stages = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expansion, count, repeats, first_stride in stages:
        outputs = int(count * width)
        for block in range(repeats):
            layers.append(_InvertedResidual(inputs, outputs, first_stride if block == 0 else 1, expansion))
            inputs = outputs
    layers += [_conv(inputs, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU(inplace=True)]
    model = _initialise(_Classifier(nn.Sequential(*layers), 1280, num_classes))
    nn.init.normal_(model.fc.weight, std=0.01)
    nn.init.zeros_(model.fc.bias)
    return model


class _Classifier(nn.Module):
    """Features, global average pooling, one linear layer."""

    def __init__(self, features: nn.Module, channels: int, num_classes: int):
        super().__init__()
        self.features = features
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(x).mean(dim=(2, 3)))


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "resnet8": partial(_cifar_resnet, 8),
    "resnet20": partial(_cifar_resnet, 20),
    "resnet32": partial(_cifar_resnet, 32),
    "resnet56": partial(_cifar_resnet, 56),
    "resnet110": partial(_cifar_resnet, 110),
    "wrn_16_2": partial(_wide_resnet, 16, 2),
    "wrn_40_1": partial(_wide_resnet, 40, 1),
    "wrn_40_2": partial(_wide_resnet, 40, 2),
    "mobilenetv2_075": partial(_cifar_mobilenetv2, 0.75),
}
"""Name -> a function of the number of classes."""

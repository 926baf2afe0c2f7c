"""A small student of no family: convolutions one after another, without shortcuts."""

from __future__ import annotations

from torch import nn


class PlainNet(nn.Sequential):
    """Three convolutions of stride 2 and a linear layer: float32 [n, 3, h, w] -> logits [n, num_classes]."""

    def __init__(self, num_classes: int):
        layers: list[nn.Module] = []
        for inputs, outputs, kernel in ((3, 16, 5), (16, 32, 3), (32, 64, 3)):
            convolution = nn.Conv2d(inputs, outputs, kernel, stride=2, padding=kernel // 2, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))

"""Networks by name: the CIFAR networks of the paper, and torchvision's classification models."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ckd_dist import checkpoint
from ckd_dist.config import require


def build_model(name: str, num_classes: int) -> nn.Module:
    """A freshly initialised network: float32 [n, 3, h, w] -> logits, float32 [n, num_classes].

    The last linear layer computes in float32 under autocast too, so that logits are not rounded to bfloat16. Raises
    `UserError` for an unknown name.
    """
    if name in _CIFAR:
        model = _CIFAR[name](num_classes)
    else:
        import torchvision  # takes more than a second

        known = model_names()
        near = difflib.get_close_matches(name, known, n=3) or known[:6]
        require(name in known, f"model.name: no model {name}; did you mean {' or '.join(near)}?")
        options = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    linear = [module for module in model.modules() if type(module) is nn.Linear]
    if linear:
        linear[-1].__class__ = _Float32Linear
    return model


def model_names() -> list[str]:
    """Every name that `build_model` knows."""
    import torchvision

    return [*_CIFAR, *torchvision.models.list_models(module=torchvision.models)]


def load_model(path: str | Path, option: str) -> tuple[nn.Module, dict]:
    """The network of a trajectory's checkpoint with its weights, and the checkpoint's metadata.

    The metadata has `model`, `num_classes`, `epoch`, `image_size` (it was trained at), `val_image_size` (evaluated at),
    `mean`, `std` and `dataset`.
    """
    state = checkpoint.load(path, option)
    require(
        {"weights", "metadata"} <= state.keys(),
        f"{option}: {path} is no checkpoint of this system: name a file epoch_*.pt of a run",
    )
    metadata = state["metadata"]
    model = build_model(metadata["model"], metadata["num_classes"])
    model.load_state_dict(state["weights"])
    return model, metadata


def require_classes(metadata: dict, num_classes: int, option: str) -> None:
    """Raise `UserError` unless a checkpoint has as many classes as the images."""
    found = metadata["num_classes"]
    require(found == num_classes, f"{option}: the checkpoint has {found} classes, the images have {num_classes}")


def feature_layer(model: nn.Module, image_size: int) -> str:
    """Name of the module that gives the last feature map before pooling: of all modules with an output of shape [n,
    channels, h, w] larger than 1x1, the one that ends last. Raises `UserError` when there is none (a transformer)."""
    last: list[str] = []

    def note(name: str) -> Callable:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, torch.Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
                last[:] = [name]

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    parameter = next(model.parameters())
    with torch.inference_mode():
        model(torch.zeros(1, 3, image_size, image_size, device=parameter.device))
    for hook in hooks:
        hook.remove()
    require(bool(last), "layer: the teacher has no feature map before a pooling: name a layer that has one")
    return last[0]


def load_weights(model: nn.Module, path: str) -> None:
    """Initial weights from `path`: a state dict, or a checkpoint of this system; raises `UserError` on any mismatch."""
    option = "model.weights"
    state = checkpoint.load(path, option)
    weights = state.get("weights", state)
    own = model.state_dict()
    differing = sorted(own.keys() ^ weights.keys()) or [
        name for name in sorted(own) if getattr(weights[name], "shape", None) != own[name].shape
    ]
    require(not differing, f"{option}: {path} does not fit the model: {', '.join(differing[:3])} missing or different")
    model.load_state_dict(weights)


class _Float32Linear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.float(), self.weight, self.bias)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def _initialise(model: nn.Module) -> nn.Module:
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
    """ResNet for 32x32 images with 6n + 2 layers and 16, 32, 64 filters."""
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
    """Expand, depthwise, project (Sandler et al., 2018, "MobileNetV2")."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [_conv(inputs, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)]
        layers += [_conv(hidden, hidden, 3, stride, groups=hidden), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)]
        layers += [_conv(hidden, outputs, 1), nn.BatchNorm2d(outputs)]
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def _cifar_mobilenetv2(width: float, num_classes: int) -> nn.Module:
    """MobileNetV2 for 32x32 images: the strides of the stem and of the second stage are 1, so that the last feature
    map is 4x4."""

    def channels(count: int) -> int:
        return max(8, int(count * width + 4) // 8 * 8)

    inputs = channels(32)
    layers: list[nn.Module] = [_conv(3, inputs, 3), nn.BatchNorm2d(inputs), nn.ReLU6(inplace=True)]
    stages = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expansion, count, repeats, first_stride in stages:
        for block in range(repeats):
            stride = first_stride if block == 0 else 1
            layers.append(_InvertedResidual(inputs, channels(count), stride, expansion))
            inputs = channels(count)
    layers += [_conv(inputs, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU6(inplace=True)]
    return _initialise(_Classifier(nn.Sequential(*layers), 1280, num_classes))


class _Classifier(nn.Module):
    """Features, global average pooling, one linear layer."""

    def __init__(self, features: nn.Module, channels: int, num_classes: int):
        super().__init__()
        self.features = features
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(x).mean(dim=(2, 3)))


_CIFAR: dict[str, Callable[[int], nn.Module]] = {
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

"""Networks by name: CIFAR networks, and torchvision's classification models.

The CIFAR networks are those of Tian, Krishnan, Isola, "Contrastive Representation Distillation" (arXiv 1910.10699), and
of mdistiller. The paper's own code has the same MobileNetV2, but ResNets whose shortcuts pad with zeros where the shape
changes; here, as in most published distillation results, these shortcuts are 1x1 convolutions.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import Node
from torch.func import functional_call

from ckd_dist.core import checkpoint, dist
from ckd_dist.core.errors import UserError, require


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
    """Every name that `build_model` accepts."""
    import torchvision

    return [*_CIFAR, *torchvision.models.list_models(module=torchvision.models)]


def load_model(path: str | Path, option: str) -> tuple[nn.Module, dict]:
    """The network of a training checkpoint with its weights, and the checkpoint's metadata."""
    state = checkpoint.load(path, option, checkpoint.KeptState, "name a file epoch_*.pt of a run")
    metadata = state["metadata"]
    model = build_model(metadata["model"], metadata["num_classes"])
    load_fitting(model, state["weights"], f"{option}: {path}", metadata["model"])
    return model, metadata


def require_fits(
    model: nn.Module, name: str, num_classes: int, image_size: int, option: str, *, train_images: int = 0
) -> None:
    """Raise `UserError` unless the model `name` takes images of the side `image_size`, which `option` sets, and gives
    logits [n, num_classes] of them; with `train_images`, the least that a process has of a batch, in train mode too.
    Leaves the model, its buffers and the random state as they were."""
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]

    def fault(images: int, training: bool) -> str | None:
        buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
        model.train(training)
        try:
            logits = functional_call(model, buffers, (torch.zeros(images, 3, image_size, image_size, device=device),))
        except Exception as error:  # a network may object in any way
            return (str(error).splitlines() or [type(error).__name__])[0]
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        return None if found == (images, num_classes) else f"it gives {found}, not logits {(images, num_classes)}"

    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        wrong = fault(1, False) or (fault(2, True) if train_images else None)
        alone = fault(1, True) if train_images == 1 and not wrong else None
    for module, training in modes:
        module.training = training
    require(not wrong, f"{option} {image_size} does not fit the model {name} ({wrong}): choose another of the two")
    require(
        not alone,
        f"data.batch_size leaves one image to some of {dist.world_size()} processes, too few for {name} at {image_size}"
        f" px ({alone}): give {2 * dist.world_size()} or more, or use fewer processes",
    )


def feature_layer(model: nn.Module, image_size: int) -> str:
    """Name of the module that gives the last feature map before the global pooling or the flattening.

    Modules count through whose output every path from the image to the logits leads: no branch of a block, nothing
    that the logits do not use. The output of the last of them that has spatial positions must be a map
    [n, channels, h, w] with h = w, since the image is square. Raises `UserError` when it is something else, such as
    the tokens of a transformer, and when there is none.
    """
    image = torch.zeros(1, 3, image_size, image_size, device=next(model.parameters()).device, requires_grad=True)
    outputs: list[tuple[str, torch.Size, Node]] = []

    def record(name: str) -> Callable:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, torch.Tensor) and output.grad_fn is not None:
                # The node as it is now: a later in-place operation replaces the tensor's grad_fn.
                outputs.append((name, output.shape, output.grad_fn))

        return hook

    hooks = [module.register_forward_hook(record(name)) for name, module in model.named_modules() if name]
    with torch.enable_grad():
        entrance = image.clone()
        logits = model(entrance)
    for hook in hooks:
        hook.remove()
    for name, shape, node in reversed(outputs):
        has_positions = sum(size > 1 for size in shape) > 1
        is_pooled = re.match("Adaptive(Avg|Max)Pool", node.name())  # to 7x7, say, as that of VGG
        if has_positions and not is_pooled and not _is_reached(entrance.grad_fn, logits.grad_fn, around=node):
            if len(shape) == 4 and shape[2] == shape[3]:
                return name
            break
    raise UserError("layer: the teacher has no feature map before a pooling: name a layer that has one")


def _is_reached(end: Node | None, start: Node | None, around: Node) -> bool:
    """Whether a path of the autograd graph leads from `start` to `end` without the node `around`."""
    seen, todo = {around}, [start]
    while todo:
        node = todo.pop()
        if node is end:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            todo += [each for each, _ in node.next_functions]
    return False


@lru_cache(maxsize=1)  # many students of a search begin with the same
def initial_weights(path: str) -> tuple[Any, str]:
    """The weights in the file that the user gave as model.weights, a state dict or a checkpoint of this system, and
    their sha256; raises `UserError` where there are none."""
    state = checkpoint.load(path, "model.weights")
    weights = state.get("weights", state)
    named = isinstance(weights, dict) and all(isinstance(each, torch.Tensor) for each in weights.values())
    require(named, f"model.weights: {path} holds no weights")
    return weights, checkpoint.weights_sha256(weights)


def load_weights(model: nn.Module, path: str) -> None:
    """Load the `initial_weights`; raises `UserError` where they do not fit the model."""
    load_fitting(model, initial_weights(path)[0], f"model.weights: {path}", "the model")


def load_fitting(model: nn.Module, weights: Any, what: str, name: str) -> None:
    """`model.load_state_dict`; raises `UserError` where names or shapes of the weights, which come from `what`, are not
    those of the model `name`."""
    require(isinstance(weights, dict), f"{what} holds no weights")
    own = model.state_dict()
    differing = sorted(own.keys() ^ weights.keys(), key=str) or [
        key for key in sorted(own) if getattr(weights[key], "shape", None) != own[key].shape
    ]
    require(not differing, f"{what} does not fit {name}: {', '.join(map(str, differing[:3]))} missing or different")
    model.load_state_dict(weights)


class _Float32Linear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.float(), self.weight, self.bias)


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

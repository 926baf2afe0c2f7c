"""The features of a network: which module gives them, and how they become a map."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.autograd.graph import Node

from ckd_dist.core.errors import UserError, require
from ckd_dist.nn.forward import autocast, logits_of
from ckd_dist.nn.probe import hooked, kept_modes


@dataclass(frozen=True)
class FeatureLayer:
    """A module whose output, of n images, is a map [n, channels, h, w], one with channels last, tokens [n, tokens,
    channels] or a vector [n, channels]."""

    name: str
    shape: tuple[int, ...]
    """Of its output of one image, without the first dimension."""
    prefix_tokens: int = 0
    """Of tokens, how many come before those that form a map: class tokens, registers."""
    call: int = 0
    """Which of its outputs of a forward pass, counted from 0, where the network calls the module several times."""

    def to_map(self, output: torch.Tensor) -> torch.Tensor:
        """The output as a map, [n, channels, h, w]: tokens in the order of rows and without those before them, a vector
        as a map of one position."""
        if output.ndim == 2:
            return output[:, :, None, None]
        if output.ndim == 3:
            return output[:, self.prefix_tokens :].mT.unflatten(2, (self._side, self._side))
        return output.permute(0, 3, 1, 2) if self._channels_last else output

    @property
    def channels(self) -> int:
        """Of the map."""
        return self.shape[0] if len(self.shape) == 3 and not self._channels_last else self.shape[-1]

    @property
    def side(self) -> int:
        """Of a map, that is square."""
        return self.shape[0] if self._channels_last else self.shape[-1]

    @property
    def words(self) -> str:
        """Its name and form, for people."""
        if len(self.shape) == 1:
            return f"{self.name} ({self.channels} values)"
        if len(self.shape) == 2:
            left_out = f", {self.prefix_tokens} before them (class token, registers) left out"
            tokens = f"{self.channels} channels of {self._side} x {self._side} tokens"
            return f"{self.name} ({tokens}{left_out if self.prefix_tokens else ''})"
        return f"{self.name} ({self.channels} channels of {self.side} x {self.side})"

    @property
    def _channels_last(self) -> bool:
        return len(self.shape) == 3 and self.shape[1] != self.shape[2]

    @property
    def _side(self) -> int:
        return math.isqrt(self.shape[0] - self.prefix_tokens)


def feature_layer(model: nn.Module, image_size: int, name: str | None = None) -> FeatureLayer:
    """The module `name`; by default the one that gives the last features before the global pooling or the flattening:
    of a convolutional network the last map, of a transformer the tokens of its last block.

    Modules count through whose output every path from the image to the logits leads: no branch of a block, nothing
    that the logits do not use. Maps and grids of tokens are square, since the image is. Raises `UserError` where there
    is no such module, or its output is something else.
    """
    outputs = _outputs(model, image_size)
    if name is not None:
        names = [each for each, _ in model.named_modules() if each]
        require(name in names, f"layer: the teacher has no module {name}; it has {', '.join(names[:40])}")
        shape = next((shape for each, shape, _ in reversed(outputs.made) if each == name), None)
        require(shape is not None, f"layer: {name} gives no tensor for an image: name a module that does")
        assert shape is not None
        found = _form(name, shape, outputs)
        require(found is not None, f"layer: {name} gives {tuple(shape[1:])} an image: no square map or grid of tokens")
        assert found is not None
        return found
    for each, shape, node in reversed(outputs.made):
        has_positions = sum(size > 1 for size in shape) > 1
        is_pooled = _is_adaptive_pooling(node)
        if has_positions and not is_pooled and not _is_reached(outputs.entrance, outputs.exit, around=node):
            if found := _form(each, shape, outputs):
                return found
            break
    raise UserError("layer: the teacher has no map or grid of tokens before a pooling: name a layer that has features")


STAGES = 4
"""Resolutions whose maps are compared, at most, the smallest ones: of an ImageNet network all but that of the stem."""


def stages(model: nn.Module, image_size: int, whose: str) -> list[FeatureLayer]:
    """The maps that the stages of a network end with, in their order: of every resolution the last one that all paths
    from the image to the logits lead through, within other modules only where there is none between these; of `STAGES`
    resolutions at most.

    Raises `UserError`, which says `whose` network it is, where it has maps of fewer than two resolutions, as a vision
    transformer has.
    """
    with kept_modes(model):
        outputs = _outputs(model.eval(), image_size)
    found: dict[int, tuple[int, FeatureLayer]] = {}  # by side
    made = [*enumerate(outputs.made)]
    for position, (name, shape, node) in sorted(made, key=lambda each: (_depth(model, each[1][0]), -each[0])):
        layer = _form(name, shape, outputs) if len(shape) == 4 and not _is_adaptive_pooling(node) else None
        if layer is None or layer.side == 1 or layer.side in found:
            continue
        if not _is_reached(outputs.entrance, outputs.exit, around=node):
            call = sum(each == name for each, _, _ in outputs.made[:position])
            found[layer.side] = position, replace(layer, call=call)
    require(
        len(found) > 1,
        f"kd.feature_weight: {whose} has square feature maps of {len(found) or 'no'} resolution, and two are needed: "
        "leave it out, or choose a network whose stages end with maps",
    )
    in_order = sorted(found.values(), key=lambda each: each[0])
    return [layer for _, layer in in_order][-STAGES:]


def _depth(model: nn.Module, name: str) -> int:
    """How many modules a module lies within, the network and rows of modules not counted."""
    words = name.split(".")
    around = [model.get_submodule(".".join(words[:count])) for count in range(1, len(words))]
    return sum(type(each) not in (nn.Sequential, nn.ModuleList) for each in around)


@contextmanager
def recorded(model: nn.Module, layers: Sequence[FeatureLayer]) -> Iterator[list[torch.Tensor]]:
    """While it is entered, a forward pass leaves the maps of the `layers` [n, channels, side, side] in the list, in
    their order."""
    maps: list[torch.Tensor] = [torch.empty(0)] * len(layers)
    calls: Counter[str] = Counter()

    def record(name: str) -> Callable:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if not isinstance(output, torch.Tensor):
                return
            for position, layer in enumerate(layers):
                if (layer.name, layer.call) == (name, calls[name]):
                    maps[position] = layer.to_map(output)
            calls[name] += 1

        return hook

    names = dict.fromkeys(layer.name for layer in layers)
    with hooked([(name, model.get_submodule(name)) for name in names], record):
        yield maps


@torch.no_grad()  # and not inference mode: a student's graph keeps the maps
def forward_maps(
    model: nn.Module, layers: Sequence[FeatureLayer], images: torch.Tensor, amp: str
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(logits of a model in eval mode in float32, maps of the `layers` in the type of `amp`), without gradients."""
    with recorded(model, layers) as maps, autocast(images.device, amp):
        logits = logits_of(model(images)).float()
    return logits, maps


@dataclass(frozen=True)
class _Outputs:
    """What the modules of a network give for one image."""

    made: list[tuple[str, torch.Size, Node]]
    """Name, shape and node of each output, in the order of the forward pass."""
    entrance: Node | None
    """The node of the image."""
    exit: Node | None
    """That of the logits."""

    @property
    def sides(self) -> set[int]:
        """Of square maps."""
        return {shape[3] for _, shape, _ in self.made if len(shape) == 4 and shape[2] == shape[3]}


def _outputs(model: nn.Module, image_size: int) -> _Outputs:
    image = torch.zeros(1, 3, image_size, image_size, device=next(model.parameters()).device, requires_grad=True)
    made: list[tuple[str, torch.Size, Node]] = []

    def record(name: str) -> Callable:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, torch.Tensor) and output.grad_fn is not None:
                # The node as it is now: a later in-place operation replaces the tensor's grad_fn.
                made.append((name, output.shape, output.grad_fn))

        return hook

    with hooked([(name, module) for name, module in model.named_modules() if name], record), torch.enable_grad():
        entrance = image.clone()
        logits = logits_of(model(entrance))
    return _Outputs(made, entrance.grad_fn, logits.grad_fn)


def _form(name: str, shape: torch.Size, outputs: _Outputs) -> FeatureLayer | None:
    """The layer `name` whose output of one image has this shape, None where that is neither map nor tokens nor vector.

    Tokens are the grid of a map that the network has made before, of its patches mostly, and others before them; where
    there is no such map, the largest square.
    """
    sizes = tuple(shape[1:])
    if len(sizes) == 1 or (len(sizes) == 3 and (sizes[1] == sizes[2] or sizes[0] == sizes[1])):
        return FeatureLayer(name, sizes)
    if len(sizes) != 2:
        return None
    count = sizes[0]
    squares = [side * side for side in outputs.sides if side > 1 and side * side <= count <= side * side + 16]
    largest = max(squares, default=math.isqrt(count) ** 2)
    return FeatureLayer(name, sizes, prefix_tokens=count - largest) if count - largest <= 16 else None


def _is_adaptive_pooling(node: Node) -> bool:
    """Whether it makes a map of a fixed size, of 7x7, say, as that of VGG."""
    return re.match("Adaptive(Avg|Max)Pool", node.name()) is not None


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

"""What one batch tells of a network before anything is made for it: that it takes the images and gives logits, which
modules make them, and which parameters have a part in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import Node
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from ckd_dist.core import dist
from ckd_dist.core.errors import require
from ckd_dist.nn.forward import auxiliary_logits, logits_of


def prepare(model: nn.Module, name: str, num_classes: int, image_size: int, option: str) -> nn.Module:
    """The model `name`, made ready for images of the side `image_size`, which `option` sets: lazy layers have their
    weights, and the modules that make the logits compute in float32 under autocast too, so that logits are not rounded
    to bfloat16. Raises `UserError` where it does not take such an image, or does not give logits [n, num_classes]."""
    parameters = [*model.parameters(), *model.buffers()]
    if any(is_lazy(each) for each in parameters):
        with kept_modes(model), torch.no_grad():
            model.eval()
            wrong = _fault(lambda: model(_image(model, image_size)), 1, num_classes)
            require(wrong is None, _misfit(name, image_size, option, wrong))
    require_fits(model, name, num_classes, image_size, option)
    for key in logit_modules(model, image_size):
        module = model.get_submodule(key)
        module.__class__ = _in_float32(type(module))  # type: ignore[arg-type]
    return model


def require_fits(
    model: nn.Module, name: str, num_classes: int, image_size: int, option: str, *, train_images: int = 0
) -> None:
    """Raise `UserError` unless the model `name` takes images of the side `image_size`, which `option` sets, and gives
    logits [n, num_classes] of them; with `train_images`, the least that a process has of a batch, in train mode too.
    Leaves the model, its buffers and the random state as they were."""
    device = next(model.parameters()).device

    def fault(images: int, training: bool) -> str | None:
        buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
        model.train(training)
        batch = torch.zeros(images, 3, image_size, image_size, device=device)
        return _fault(lambda: functional_call(model, buffers, (batch,)), images, num_classes)

    with kept_modes(model), torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        wrong = fault(1, False) or (fault(2, True) if train_images else None)
        alone = fault(1, True) if train_images == 1 and not wrong else None
    require(wrong is None, _misfit(name, image_size, option, wrong))
    require(
        not alone,
        f"data.batch_size leaves one image to some of {dist.world_size()} processes, too few for {name} at {image_size}"
        f" px ({alone}): give {2 * dist.world_size()} or more, or use fewer processes",
    )


def _fault(forward: Callable[[], Any], images: int, num_classes: int) -> str | None:
    """What is wrong with a forward pass of so many images, in a few words."""
    try:
        found = tuple(logits_of(forward()).shape)
    except Exception as error:  # a network may object in any way
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None if found == (images, num_classes) else f"it gives {found}, not logits {(images, num_classes)}"


def _misfit(name: str, image_size: int, option: str, wrong: str | None) -> str:
    choice = "choose another of the two, or see whether --model.options can say the size or the number of classes"
    return f"{option} {image_size} does not fit the model {name} ({wrong}): {choice}"


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Each module is in train or eval mode again in the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# ------------------------------------------------------------------------------------------- the graph


def logit_modules(model: nn.Module, image_size: int) -> list[str]:
    """Names of the modules that make the logits: without children and with parameters, and with nothing but functions
    without parameters between their output and the logits. Both heads of a network that averages two; a convolution
    where that is what ends in logits."""
    makers: dict[Node, str] = {}

    def record(name: str) -> Callable:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, torch.Tensor) and output.grad_fn is not None:
                makers[output.grad_fn] = name

        return hook

    leaves = [
        (name, module)
        for name, module in model.named_modules()
        if name and next(module.children(), None) is None and next(module.parameters(), None) is not None
    ]
    with hooked(leaves, record), kept_modes(model), _all_require_grad(model), torch.enable_grad():
        model.eval()
        logits = logits_of(model(_image(model, image_size)))
    found, seen, todo = [], set(), [logits.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in makers:
            found.append(makers[node])
        else:
            todo += [each for each, _ in node.next_functions]
    return found


def unused_parameters(model: nn.Module, name: str, image_size: int, *, auxiliary: bool) -> list[str]:
    """Names of the parameters that have no part in the logits of a batch in train mode nor, with `auxiliary`, in those
    of auxiliary heads: they are to be frozen, since DDP waits for the gradient of every other one. Raises `UserError`
    where there are no auxiliary heads to train. Leaves the model, its buffers and the random state as they were."""
    device = next(model.parameters()).device
    with kept_modes(model), torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        model.train()
        buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
        output = functional_call(model, buffers, (torch.zeros(2, 3, image_size, image_size, device=device),))
        others = auxiliary_logits(output) if auxiliary else []
        require(
            not auxiliary or bool(others),
            f"model.auxiliary_weight: {name} gives no logits beside its own: leave it out, or see --model.options",
        )
        torch.stack([each.float().sum() for each in (logits_of(output), *others)]).sum().backward()
    unused = [key for key, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    model.zero_grad(set_to_none=True)
    return unused


@contextmanager
def hooked(modules: list[tuple[str, nn.Module]], make: Callable[[str], Callable]) -> Iterator[None]:
    """While it is entered, what `make` gives for its name is called with each module's output."""
    hooks = [module.register_forward_hook(make(name)) for name, module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _all_require_grad(model: nn.Module) -> Iterator[None]:
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def _image(model: nn.Module, image_size: int) -> torch.Tensor:
    return torch.zeros(1, 3, image_size, image_size, device=next(model.parameters()).device)


def float32_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that `prepare` had compute in float32, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(type(module), "_prepared_of")}


@cache
def _in_float32(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a module that makes logits, which is of the `kind`."""

    def forward(self: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast(inputs[0].device.type, enabled=False):
            return kind.forward(self, *(each.float() for each in inputs))

    if hasattr(kind, "_prepared_of"):
        return kind
    return type(f"Float32{kind.__name__}", (kind,), {"forward": forward, "_prepared_of": kind})


def unprepare(model: nn.Module) -> nn.Module:
    """The model without what `prepare` did to it for autocast: other programs are to run it."""
    for module in float32_modules(model).values():
        module.__class__ = type(module)._prepared_of  # type: ignore[attr-defined]
    return model

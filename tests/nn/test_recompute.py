"""Activations that are computed again: the same training, with less in memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ckd_dist.core.errors import UserError
from ckd_dist.nn.models import build_model
from ckd_dist.nn.recompute import recompute_blocks

MODELS = {
    "resnet20": {},
    "resnet18": {},
    "mobilenet_v2": {},
    "vit_b_16": {"image_size": 32},
    "timm/vit_tiny_patch16_224": {"img_size": 32, "depth": 2, "drop_path_rate": 0.5},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_training_is_the_same_with_less_in_memory(name):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    plain = build_model(name, 10, MODELS[name]).train()
    ours, images = copy.deepcopy(plain), torch.randn(4, 3, 32, 32)
    recompute_blocks(ours, name)
    kept = [trained(model, images) for model in (plain, ours)]
    assert kept[1] < 0.7 * kept[0]
    assert plain.state_dict().keys() == ours.state_dict().keys()
    for (key, one), other in zip(plain.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(one, other), key
    copied = copy.deepcopy(ours)  # as a moving average of the weights is made
    with torch.no_grad():
        for p in ours.parameters():
            p.zero_()
        assert torch.equal(copied.eval()(images), plain.eval()(images))


def trained(model, images):
    """Two steps; gives the bytes that the forward pass of the second kept for the way back."""
    optimizer, kept = torch.optim.SGD(model.parameters(), lr=0.1), {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for step in range(2):
        torch.manual_seed(step)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(images).square().mean()
        found = sum(size for place, size in kept.items() if place not in known)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match="recompute: vgg11 is not made of blocks"):
        recompute_blocks(build_model("vgg11", 10), "vgg11")
    with pytest.raises(UserError, match="recompute: mine"):
        recompute_blocks(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), "mine")

"""Schedules are pure functions of the step; parameter groups decay what they should."""

from __future__ import annotations

import math

import pytest
import torch

from ckd_dist.core.errors import UserError
from ckd_dist.nn.models import build_model
from ckd_dist.nn.optim import build_optimizer, image_size, learning_rate, parameter_groups
from ckd_dist.nn.options import OptimConfig


def rates(epochs=10, steps_per_epoch=10, **options):
    config = OptimConfig(lr=1.0, **options)
    return [
        learning_rate(s, config, steps_per_epoch=steps_per_epoch, epochs=epochs)
        for s in range(epochs * steps_per_epoch)
    ]


def test_cosine_falls_from_the_peak_to_zero():
    values = rates(schedule="cosine")
    assert values == pytest.approx([0.5 * (1 + math.cos(math.pi * s / 100)) for s in range(100)])


def test_linear_with_warmup_is_a_triangle():
    values = rates(schedule="linear", warmup_epochs=2)
    assert values[:20] == pytest.approx([(s + 1) / 20 for s in range(20)])
    assert values[20:] == pytest.approx([1 - s / 80 for s in range(80)])


def test_a_cosine_in_cycles_begins_anew_and_warms_up_once():
    values = rates(schedule="cosine", cycles=2)
    assert values == pytest.approx([0.5 * (1 + math.cos(math.pi * s / 50)) for s in range(50)] * 2)
    values = rates(schedule="cosine", cycles=5, warmup_epochs=1)
    assert values[:20] == pytest.approx(
        [(s + 1) / 10 for s in range(10)] + [0.5 * (1 + math.cos(math.pi * s / 10)) for s in range(10)]
    )
    assert values[20:] == pytest.approx([0.5 * (1 + math.cos(math.pi * s / 20)) for s in range(20)] * 4)
    with pytest.raises(UserError, match=r"optim\.cycles goes with --optim.schedule cosine"):
        OptimConfig(schedule="linear", cycles=2)


def test_trapezoid_is_constant_and_falls_in_the_last_fifth():
    values = rates(schedule="trapezoid", warmup_epochs=1)
    assert values[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert values[10:81] == pytest.approx([1.0] * 71)
    assert values[80:] == pytest.approx([(100 - s) / 20 for s in range(80, 100)])


@pytest.mark.parametrize("warmup_epochs", [0.04, 0.1, 0.15, 0.3, 1.99])
def test_no_warm_up_overshoots_the_peak(warmup_epochs):
    for schedule in ("cosine", "constant"):
        values = rates(schedule=schedule, warmup_epochs=warmup_epochs)
        assert max(values) == pytest.approx(1.0, abs=1e-3) and max(values) <= 1.0
        steps = int(10 * warmup_epochs)
        assert values[:steps] == pytest.approx([(s + 1) / (10 * warmup_epochs) for s in range(steps)])


def test_step_and_multistep_count_epochs_of_the_run():
    assert rates(schedule="step", step_epochs=4, gamma=0.1) == pytest.approx([1.0] * 40 + [0.1] * 40 + [0.01] * 20)
    values = rates(schedule="multistep", milestones=[3, 8], gamma=0.5, warmup_epochs=1)
    assert values[10:] == pytest.approx([1.0] * 20 + [0.5] * 50 + [0.25] * 20)
    assert rates(schedule="constant") == [1.0] * 100


def test_milestones_without_multistep_are_refused():
    with pytest.raises(UserError, match=r"optim\.milestones"):
        OptimConfig(milestones=[3])


def test_norms_and_biases_are_spared_when_asked():
    model = build_model("resnet8", 10)
    everything = list(model.parameters())
    assert [len(g["params"]) for g in parameter_groups(model, OptimConfig(weight_decay=0.1))] == [len(everything)]
    decayed, spared = parameter_groups(model, OptimConfig(weight_decay=0.1, decay_norm_and_bias=False))
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    norms = {id(p) for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()}
    assert {id(p) for p in spared["params"]} == norms | {id(model.fc.bias)}
    assert len(decayed["params"]) + len(spared["params"]) == len(everything)


def test_every_optimiser_steps():
    for name in ("sgd", "adamw", "lamb"):
        model = build_model("resnet8", 10)
        before = model.fc.weight.detach().clone()
        optimizer = build_optimizer(model, OptimConfig(name=name, decay_norm_and_bias=False))
        model(torch.randn(4, 3, 28, 28)).sum().backward()
        optimizer.step()
        assert not torch.equal(before, model.fc.weight)


def test_lower_layers_learn_at_a_smaller_rate():
    pytest.importorskip("timm")
    model = build_model("timm/vit_tiny_patch16_224", 10, {"img_size": 32, "depth": 3})
    config = OptimConfig(name="adamw", lr=1.0, layer_decay=0.5, decay_norm_and_bias=False, weight_decay=0.1)
    groups = build_optimizer(model, config).param_groups
    of = {id(p): group for group in groups for p in group["params"]}
    assert len(of) == len(list(model.parameters()))
    rates = {name: of[id(p)]["lr_scale"] for name, p in model.named_parameters()}
    assert rates["head.weight"] == 1.0 and rates["patch_embed.proj.weight"] == 0.5**4
    assert [rates[f"blocks.{k}.attn.qkv.weight"] for k in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert of[id(model.head.weight)]["weight_decay"] == 0.1 and of[id(model.head.bias)]["weight_decay"] == 0.0
    with pytest.raises(UserError, match=r"optim\.layer_decay: .* timm/NAME"):
        build_optimizer(build_model("resnet8", 10), config)


def test_image_size_rises_towards_the_end_of_training():
    sizes = [image_size(epoch, start=128, final=192, epochs=20) for epoch in range(20)]
    assert sizes == [128] * 16 + [160] + [192] * 3
    assert [image_size(epoch, start=20, final=28, epochs=10) for epoch in range(10)] == [20] * 8 + [24] + [28]
    assert [image_size(epoch, start=160, final=192, epochs=40) for epoch in range(40)] == [160] * 32 + [192] * 8
    assert image_size(3, start=None, final=224, epochs=4) == 224

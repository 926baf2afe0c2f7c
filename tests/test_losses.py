"""Losses against direct computations, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ckd_dist import losses


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(16, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(10, (16,), generator=generator)


@pytest.mark.parametrize(("alpha", "temperature"), [(0.5, 4.0), (0.0, 1.0), (1.0, 5.0), (0.1, 20.0)])
def test_distillation_is_the_papers_loss(case, alpha, temperature):
    student, teacher, labels = case
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1), reduction="batchmean"
    )
    expected = alpha * F.cross_entropy(student, labels) + (1 - alpha) * temperature**2 * divergence
    (expected_gradient,) = torch.autograd.grad(expected, student)
    found = losses.distillation(student, teacher, labels, alpha=alpha, temperature=temperature)
    (gradient,) = torch.autograd.grad(found["loss"].mean(), student)
    torch.testing.assert_close(found["loss"].mean(), expected)
    torch.testing.assert_close(gradient, expected_gradient)
    torch.testing.assert_close(found["loss"], alpha * found["ce"] + (1 - alpha) * found["kd"])


def test_alpha_weighs_the_label_and_the_gradient_keeps_its_size_over_temperature(case):
    student, teacher, labels = case
    only_label = losses.distillation(student, teacher, labels, alpha=1.0, temperature=4.0)["loss"]
    torch.testing.assert_close(only_label, F.cross_entropy(student, labels, reduction="none"))
    # T^2 * dKL/dz = T * (softmax(z / T) - softmax(t / T)), which tends to (z - t - mean) / classes for large T.
    loss = losses.soft_target_divergence(student, teacher, 1e4).sum()
    (gradient,) = torch.autograd.grad(loss, student)
    difference = student - teacher
    torch.testing.assert_close(gradient, (difference - difference.mean(1, keepdim=True)) / 10, rtol=1e-3, atol=1e-4)


def test_label_smoothing_is_torchs(case):
    student, _, labels = case
    found = losses.cross_entropy(student, labels, 0.1).mean()
    torch.testing.assert_close(found, F.cross_entropy(student, labels, label_smoothing=0.1))


def test_an_ensemble_is_the_mean_of_logits():
    members = [torch.randn(5, 7).half() for _ in range(3)]
    torch.testing.assert_close(losses.ensemble_logits(members), torch.stack(members).float().mean(0))
    assert losses.ensemble_logits(members).dtype == torch.float32

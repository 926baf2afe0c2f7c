"""Losses against direct computations, gradients included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ckd_dist.data import batch
from ckd_dist.nn import losses
from ckd_dist.nn.options import KDConfig


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
    found = losses.distillation(student, teacher, labels, KDConfig(alpha=alpha, temperature=temperature))
    (gradient,) = torch.autograd.grad(found["loss"].mean(), student)
    torch.testing.assert_close(found["loss"].mean(), expected)
    torch.testing.assert_close(gradient, expected_gradient)
    torch.testing.assert_close(found["loss"], alpha * found["ce"] + (1 - alpha) * found["kd"])


@pytest.mark.parametrize("loss", ["kd", "dkd"])
def test_a_mixed_image_has_the_loss_of_both_labels_by_their_weights(case, loss):
    student, teacher, labels = case
    mixed = batch.Mixed(labels.roll(1), torch.linspace(0, 1, 16, dtype=torch.float64))
    config = KDConfig(loss=loss)
    found, own, other = (
        losses.distillation(student, teacher, each, config, 0.1, both)["loss"]
        for each, both in ((labels, mixed), (labels, None), (mixed.labels, None))
    )
    torch.testing.assert_close(found, mixed.weights * own + (1 - mixed.weights) * other)
    assert not torch.allclose(own, other)


def test_alpha_weighs_the_label_and_the_gradient_keeps_its_size_over_temperature(case):
    student, teacher, labels = case
    only_label = losses.distillation(student, teacher, labels, KDConfig(alpha=1.0, temperature=4.0))["loss"]
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


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_is_torchs_of_targets_as_timm_makes_them(case, smoothing):
    student, teacher, labels = case
    others, weights = labels.flip(0), torch.rand(len(labels), dtype=torch.float64)
    classes = student.shape[1]
    hot = [smoothing / classes + (1 - smoothing) * F.one_hot(each, classes) for each in (labels, others)]
    target = weights[:, None] * hot[0] + (1 - weights[:, None]) * hot[1]
    for mixed, wanted in ((None, hot[0]), (batch.Mixed(others, weights), target)):
        found = losses.binary_cross_entropy(student, labels, smoothing, mixed)
        expected = F.binary_cross_entropy_with_logits(student, wanted.double(), reduction="none").mean(dim=1)
        torch.testing.assert_close(found, expected)
        both = losses.distillation(
            student, teacher, labels, KDConfig(), smoothing, mixed, label_loss="binary_cross_entropy"
        )
        torch.testing.assert_close(both["ce"], expected)
    extreme = losses.binary_cross_entropy(torch.tensor([[200.0, -200.0]]), torch.tensor([0]))
    torch.testing.assert_close(extreme, torch.zeros(1))


def test_an_ensemble_is_the_mean_of_logits():
    members = [torch.randn(5, 7).half() for _ in range(3)]
    torch.testing.assert_close(losses.ensemble_logits(members), torch.stack(members).float().mean(0))
    assert losses.ensemble_logits(members).dtype == torch.float32


def softmax(logits):
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def by_definition(kind, students, teachers, labels, temperature, beta):
    """Every loss once more, sample by sample, in plain numpy."""
    values = []
    ours, theirs = (np.array([softmax(row / temperature) for row in logits]) for logits in (students, teachers))
    within = [np.corrcoef(a, b)[0, 1] for a, b in zip(ours, theirs, strict=True)]
    between = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(ours.T, theirs.T, strict=True)])
    for i, (s, t, label) in enumerate(zip(students, teachers, labels, strict=True)):
        p, q, others = ours[i], theirs[i], np.arange(len(s)) != label
        if kind == "soft_target":
            value = -(temperature**2) * sum(q[c] * np.log(p[c]) for c in range(len(s)))
        elif kind == "mse":
            value = np.mean((s - t) ** 2)
        elif kind == "dkd":
            target = q[label] * np.log(q[label] / p[label]) + q[others].sum() * np.log(
                q[others].sum() / p[others].sum()
            )
            p_rest, q_rest = p[others] / p[others].sum(), q[others] / q[others].sum()
            value = temperature**2 * (target + beta * np.sum(q_rest * np.log(q_rest / p_rest)))
        elif kind == "dist":
            value = temperature**2 * ((1 - within[i]) + (1 - between))
        else:
            p, q = (softmax((z - z.mean()) / z.std(ddof=1) / temperature) for z in (s, t))
            value = temperature**2 * np.sum(q * np.log(q / p))
        values.append(value)
    return np.array(values)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("kind", ["soft_target", "mse", "dkd", "dist", "standardized"])
def test_every_loss_is_its_papers_gradient_included(case, kind, temperature):
    student, teacher, labels = case
    config = KDConfig(loss=kind, alpha=0.0, temperature=temperature, beta=3.0)
    asked = losses.standardize(teacher) if kind == "standardized" else teacher
    found = losses.distillation(student, asked, labels, config)["loss"]
    arguments = (teacher.numpy(), labels.numpy(), temperature, 3.0)
    start = student.detach().numpy()
    np.testing.assert_allclose(found.detach().numpy(), by_definition(kind, start, *arguments), rtol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    rng = np.random.default_rng(0)
    for _ in range(5):
        direction = rng.normal(size=start.shape)
        up, down = (by_definition(kind, start + sign * 1e-5 * direction, *arguments).sum() for sign in (1, -1))
        assert (gradient.numpy() * direction).sum() == pytest.approx((up - down) / 2e-5, rel=1e-4)


def test_soft_target_and_divergence_differ_by_the_teachers_entropy_only(case):
    student, teacher, _ = case
    difference = losses.soft_target_cross_entropy(student, teacher, 2.0) - losses.soft_target_divergence(
        student, teacher, 2.0
    )
    entropy = torch.distributions.Categorical(logits=teacher / 2.0).entropy()
    torch.testing.assert_close(difference, 4.0 * entropy)

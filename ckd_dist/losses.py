"""Losses as pure functions of tensors, one value a sample, so that the caller chooses the mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross entropy with the label, in nats: logits float [n, classes], labels int64 [n] -> [n]."""
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)


def soft_target_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), in nats: logits float [n, classes] twice -> [n].

    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531): T^2 keeps the size of the
    gradient when T changes.
    """
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)


def distillation(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    *,
    alpha: float,
    temperature: float,
    label_smoothing: float = 0.0,
) -> dict[str, torch.Tensor]:
    """The paper's loss, alpha * CE(label) + (1 - alpha) * T^2 * KL(teacher/T || student/T), as [n] under `loss`, and
    its parts under `ce` and `kd`.

    Wang et al., "Efficient Knowledge Distillation from Model Checkpoints" (arXiv 2210.06458), as its published code
    computes it: alpha weighs the label.
    """
    ce = cross_entropy(student, labels, label_smoothing)
    kd = soft_target_divergence(student, teacher, temperature)
    return {"loss": alpha * ce + (1 - alpha) * kd, "ce": ce, "kd": kd}


def ensemble_logits(members: list[torch.Tensor]) -> torch.Tensor:
    """Teacher logits of an ensemble, the uniform mean of its members' logits: each [n, classes] -> float32
    [n, classes]."""
    total = members[0].float()
    for member in members[1:]:
        total = total + member.float()
    return total / len(members)

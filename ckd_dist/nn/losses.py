"""Losses as pure functions of tensors, one value a sample, so that the caller chooses the mean."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ckd_dist.data.batch import Mixed, over_labels
from ckd_dist.nn.options import KDConfig, LabelLossName


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0, mixed: Mixed | None = None
) -> torch.Tensor:
    """Cross entropy with the label or labels, in nats: logits float [n, classes], labels int64 [n] -> [n]."""
    return over_labels(
        lambda each: F.cross_entropy(logits, each, reduction="none", label_smoothing=label_smoothing), labels, mixed
    )


def binary_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0, mixed: Mixed | None = None
) -> torch.Tensor:
    """Mean over the classes of the binary cross entropy with "it is this class", in nats: logits float [n, classes],
    labels int64 [n] -> [n]. A mixed image is both, each by its weight.

    Wightman et al., "ResNet strikes back" (arXiv 2110.00476); label smoothing as in timm.
    """
    classes = logits.shape[1]

    def value(each: torch.Tensor) -> torch.Tensor:
        of_label = (1 - label_smoothing) * logits.gather(1, each[:, None])[:, 0] / classes
        return F.softplus(logits).mean(dim=1) - of_label - label_smoothing / classes * logits.mean(dim=1)

    return over_labels(value, labels, mixed)


LABEL_LOSSES = {"cross_entropy": cross_entropy, "binary_cross_entropy": binary_cross_entropy}


SCALES = [2 ** (step / 4) for step in range(-12, 13)]
"""Factors of logits, from 1/8 to 8, among which the one that suits a network best is sought: what it was taught at sets
the scale of its logits, which says nothing of how good it is."""


def scaled_cross_entropies(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy with the label in nats of the logits times each of `SCALES`: logits float [n, classes], labels
    int64 [n] -> [n, scales]. The scale of the least mean is the temperature scaling of Guo et al. (arXiv 1706.04599).
    """
    return torch.stack([F.cross_entropy(scale * logits, labels, reduction="none") for scale in SCALES], dim=1)


def soft_target_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), in nats: logits float [n, classes] twice -> [n].

    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531): T^2 keeps the size of the
    gradient when T changes.
    """
    teacher = teacher / temperature
    probabilities = F.softmax(teacher, dim=1)
    entropy = -(probabilities * F.log_softmax(teacher, dim=1)).sum(dim=1)
    return temperature**2 * (F.cross_entropy(student / temperature, probabilities, reduction="none") - entropy)


def soft_target_cross_entropy(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 * cross entropy of softmax(student / T) under softmax(teacher / T), in nats: logits float [n, classes] twice
    -> [n]. It differs from `soft_target_divergence` by the teacher's entropy, which has no gradient."""
    probabilities = F.softmax(teacher / temperature, dim=1)
    return temperature**2 * F.cross_entropy(student / temperature, probabilities, reduction="none")


def logit_mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared difference of the logits, the mean over classes: float [n, classes] twice -> [n].

    Ba and Caruana, "Do Deep Nets Really Need to be Deep?" (arXiv 1312.6184), without its factor 1/2; Kim et al.
    (arXiv 2105.08919) compare it with the divergence.
    """
    return (student - teacher).square().mean(dim=1)


def decoupled(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, temperature: float, beta: float
) -> torch.Tensor:
    """DKD: T^2 * (TCKD + beta * NCKD), in nats: logits float [n, classes] twice, labels int64 [n] -> [n].

    TCKD compares the probabilities of the label, NCKD those of the other classes among themselves. Zhao et al.,
    "Decoupled Knowledge Distillation" (arXiv 2203.08679), with its alpha = 1.
    """
    label = labels[:, None]
    others = torch.arange(student.shape[1] - 1, device=labels.device).expand(len(labels), -1)
    others = others + (others >= label)  # all classes but the label: a mask would have the host wait for the device

    def parts(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log probabilities: of the label and of all others together [n, 2], and among the others [n, classes - 1]."""
        logits = logits / temperature
        rest = logits.gather(1, others)
        together = torch.cat([logits.gather(1, label), rest.logsumexp(dim=1, keepdim=True)], dim=1)
        return F.log_softmax(together, dim=1), F.log_softmax(rest, dim=1)

    tckd, nckd = (
        F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1)
        for ours, theirs in zip(parts(student), parts(teacher), strict=True)
    )
    return temperature**2 * (tckd + beta * nckd)


def correlation(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """DIST: T^2 * ((1 - correlation over classes) + (1 - mean correlation over the batch)): logits float [n, classes]
    twice -> [n].

    Correlations are Pearson's, of the softmaxes at T; the second term relates the samples of this call, so it is the
    same for all of them and, under DDP, of this rank's part of the batch. Huang et al., "Knowledge Distillation from A
    Stronger Teacher" (arXiv 2205.10536), with its beta = gamma.
    """
    ours, theirs = (F.softmax(logits / temperature, dim=1) for logits in (student, teacher))

    def one_minus_pearson(dim: int) -> torch.Tensor:
        centred = (ours - ours.mean(dim=dim, keepdim=True), theirs - theirs.mean(dim=dim, keepdim=True))
        return 1 - F.cosine_similarity(*centred, dim=dim, eps=1e-8)

    return temperature**2 * (one_minus_pearson(1) + one_minus_pearson(0).mean())


STANDARDIZE_EPS = 1e-7


def standardize(logits: torch.Tensor) -> torch.Tensor:
    """Logits float [n, classes] with mean 0 and standard deviation 1 over the classes."""
    return (logits - logits.mean(dim=1, keepdim=True)) / (logits.std(dim=1, keepdim=True) + STANDARDIZE_EPS)


def standardized_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 * KL of the softmaxes of standardised logits divided by T, in nats: logits float [n, classes] twice -> [n].
    The student's are standardised here, the teacher's are already (`standardize`): a sparse store knows their deviation
    better than the tensor shows.

    Sun et al., "Logit Standardization in Knowledge Distillation" (arXiv 2403.01427).
    """
    return soft_target_divergence(standardize(student), teacher, temperature)


def distillation(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    config: KDConfig,
    label_smoothing: float = 0.0,
    mixed: Mixed | None = None,
    compared: torch.Tensor | None = None,
    label_loss: LabelLossName = "cross_entropy",
) -> dict[str, torch.Tensor]:
    """alpha * `label_loss` + (1 - alpha) * the loss that `config.loss` names, as [n] under `loss`, and its parts under
    `ce` and `kd`; student and teacher are logits float [n, classes] (for standardized, the teacher's standardised),
    labels int64 [n]. `compared` are the student's logits over the classes of `teacher`, where these are not all.

    With `config.loss` kd it is the paper's loss: Wang et al., "Efficient Knowledge Distillation from Model Checkpoints"
    (arXiv 2210.06458), as its published code computes it: alpha weighs the label.
    """
    temperature, ours = config.temperature, student if compared is None else compared
    if config.loss == "kd":
        kd = soft_target_divergence(ours, teacher, temperature)
    elif config.loss == "soft_target":
        kd = soft_target_cross_entropy(ours, teacher, temperature)
    elif config.loss == "mse":
        kd = logit_mse(ours, teacher)
    elif config.loss == "dkd":
        kd = over_labels(lambda each: decoupled(ours, teacher, each, temperature, config.beta), labels, mixed)
    elif config.loss == "dist":
        kd = correlation(ours, teacher, temperature)
    else:
        kd = standardized_divergence(ours, teacher, temperature)
    ce = LABEL_LOSSES[label_loss](student, labels, label_smoothing, mixed)
    return {"loss": config.alpha * ce + (1 - config.alpha) * kd, "ce": ce, "kd": kd}


def ensemble_logits(
    members: list[torch.Tensor],
    weights: list[float] | None = None,
    combine: str = "logits",
    temperature: float = 1.0,
) -> torch.Tensor:
    """Teacher logits of an ensemble, from its members' logits, each [n, classes] -> float32 [n, classes].

    `combine` logits: their mean (the paper's ensemble); probabilities: logits whose softmax at `temperature` is the
    mean of the members' softmaxes at it. `weights` of the members sum to 1; default: equal.
    """
    weights = weights or [1 / len(members)] * len(members)
    if combine == "logits":
        return sum(weight * member.float() for weight, member in zip(weights, members, strict=True))  # type: ignore
    weighted = [  # log(weight * probability)
        F.log_softmax(member.float() / temperature, dim=1) + math.log(weight)
        for weight, member in zip(weights, members, strict=True)
    ]
    return temperature * torch.logsumexp(torch.stack(weighted), dim=0)

"""How much a checkpoint's features F tell of the image X and of the label Y: estimates by probes, in nats.

A decoder restores the image from F, a small classifier predicts the label; what they achieve on images that they were
not trained on bounds the mutual information from below (Wang et al., arXiv 2210.06458, who follow Wang et al.,
"Revisiting Locally Supervised Learning", arXiv 2101.10832, section 3):

    I(X;F) = H(X) - reconstruction loss     binary cross entropy a pixel value, of pixels in [0, 1]
    I(Y;F) = H(Y) - cross entropy

H(Y) is the entropy of the labels. H(X) is not known and the same for all checkpoints; in its place stands the loss of
guessing the mean colour everywhere, the best that this decoder can do without features: so I(X;F) is 0 for features
that tell nothing.
"""

from __future__ import annotations

from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ckd_dist.core.options import Scaling

SCALINGS: tuple[Scaling, ...] = get_args(Scaling)


class ConvOfEnlarged(nn.Module):
    """A 3x3 convolution of features that are first enlarged, bilinearly, to the size of the image.

    Enlarging acts on each channel alone, so the mixing of channels may come before it: nine maps an output channel, one
    a weight of the kernel, are enlarged instead of all input channels, and added up shifted. Where that is fewer maps
    it is what is done: 2048 channels at 224 px would be 205 MB an image in bfloat16.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, features: torch.Tensor, size: int) -> torch.Tensor:
        """[n, in, h, w] -> [n, out, size, size]."""
        weight, bias = self.conv.weight, self.conv.bias
        if weight.shape[1] <= 9 * weight.shape[0]:
            return self.conv(_enlarge(features, size))
        assert bias is not None
        maps = weight.flip(2, 3).permute(0, 2, 3, 1).reshape(9 * weight.shape[0], weight.shape[1], 1, 1)
        enlarged = _enlarge(F.conv2d(features, maps), size)
        return F.fold(enlarged.flatten(2), (size, size), 3, padding=1) + bias[:, None, None]


def _enlarge(features: torch.Tensor, size: int) -> torch.Tensor:
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False)


class Probes(nn.Module):
    """Decoders and classifiers of one feature map, float [n, channels, h, w]: `repeats` of each, that differ in their
    initial weights and have nothing in common but the features; each as in the published code of InfoPro, but that the
    classifier is 256 channels wide at most."""

    def __init__(self, channels: int, num_classes: int, repeats: int = 1):
        super().__init__()
        self.repeats = repeats
        self.enter = ConvOfEnlarged(channels, 12 * repeats)
        self.decoder = nn.Sequential(
            nn.BatchNorm2d(12 * repeats),
            nn.ReLU(inplace=True),
            nn.Conv2d(12 * repeats, 3 * repeats, 3, padding=1, groups=repeats),
        )
        width = min(channels, 256)
        self.classifier = nn.Sequential(
            nn.Conv2d(channels, width * repeats, 3, padding=1),
            nn.BatchNorm2d(width * repeats),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width * repeats, 128 * repeats, 1, groups=repeats),  # linear layers, one a repeat
            nn.ReLU(inplace=True),
            nn.Conv2d(128 * repeats, num_classes * repeats, 1, groups=repeats),
        )

    def forward(
        self, features: torch.Tensor, pixels: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of the two on images `pixels`, float [n, 3, size, size] in [0, 1], from their features: (binary cross
        entropy, the mean over pixel values; cross entropy), each [repeats, n], in nats."""
        n, shape = len(features), (self.repeats, *pixels.shape[1:])
        restored = self.decoder(self.enter(features, pixels.shape[-1])).float().view(n, *shape)
        target = pixels[:, None].expand(n, *shape)
        reconstruction = F.binary_cross_entropy_with_logits(restored, target, reduction="none").flatten(2).mean(2)
        logits = self.classifier(features).float().view(n * self.repeats, -1)
        cross_entropy = F.cross_entropy(logits, labels.repeat_interleave(self.repeats), reduction="none")
        return reconstruction.T, cross_entropy.view(n, self.repeats).T


def label_entropy(counts: np.ndarray) -> float:
    """H(Y) in nats, of labels that occur `counts` times each."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def mean_colour_loss(mean_colour: torch.Tensor, held_out_mean: torch.Tensor) -> float:
    """Binary cross entropy a pixel value, in nats, of guessing `mean_colour`, float [3] in [0, 1], for images whose
    mean colour is `held_out_mean`."""
    guess, truth = mean_colour.double().clamp(1e-4, 1 - 1e-4), held_out_mean.double()
    return float(-(truth * guess.log() + (1 - truth) * (1 - guess).log()).mean())


def scores(image: np.ndarray, label: np.ndarray, scaling: Scaling, weight: float) -> np.ndarray:
    """I(X;F) + weight * I(Y;F) of each checkpoint, [n] from [n] twice, each term first scaled over the checkpoints.

    raw: as they are, nats a pixel value beside nats a label; minmax: to 0 to 1; zscore: to mean 0 and deviation 1. A
    term that does not differ between checkpoints counts nothing. All values are finite.
    """
    assert np.isfinite(image).all() and np.isfinite(label).all(), "a score of what is not a number"

    def scale(values: np.ndarray) -> np.ndarray:
        if scaling == "raw":
            return values
        offset, unit = (values.min(), np.ptp(values)) if scaling == "minmax" else (values.mean(), values.std())
        return (values - offset) / unit if unit > 1e-12 else np.zeros_like(values)

    return scale(np.asarray(image, dtype=np.float64)) + weight * scale(np.asarray(label, dtype=np.float64))


# ------------------------------------------------------------------------------------------- from logits alone


def mean_entropy(logits: torch.Tensor) -> float:
    """Mean entropy of the softmax, in nats: logits float [n, classes]."""
    log_p = F.log_softmax(logits.double(), dim=1)
    return float(-(log_p.exp() * log_p).sum(1).mean())


def calibration_error(logits: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> float:
    """Expected calibration error in [0, 1]: the difference of confidence and accuracy, averaged over equal bins of
    confidence (Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599): logits float [n, classes],
    labels int64 [n]."""
    confidence, predicted = logits.double().softmax(1).max(1)
    right = (predicted == labels).double()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, index.cpu(), (confidence - right).cpu())
    return float(gap.abs().sum() / len(labels))


def conditional_mutual_information(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """I(X; Y' | Y) in nats, Y' drawn from the softmax: how far the softmaxes of images of one class differ from their
    mean (Ye et al., "Bayes Conditional Distribution Estimation for Knowledge Distillation Based on Conditional
    Mutual Information", arXiv 2401.08732): logits float [n, classes], labels int64 [n]."""
    log_p = F.log_softmax(logits.double(), dim=1)
    p = log_p.exp()
    classes = logits.shape[1]
    sums = torch.zeros(classes, classes, dtype=p.dtype, device=p.device).index_add(0, labels, p)
    means = sums / torch.bincount(labels, minlength=classes).clamp(min=1)[:, None]
    return float((p * (log_p - means[labels].clamp(min=1e-300).log())).sum(1).mean())

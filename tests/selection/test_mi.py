"""Estimates of mutual information where the truth is known, and the scores of logits against direct computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ckd_dist.nn.losses import SCALES, scaled_cross_entropies
from ckd_dist.selection import mi
from data_prep.sources.datasets import load_source


def train(features, pixels, labels, num_classes, steps=250, seed=0):
    """(I(X;F), I(Y;F)) by probes trained on the first three quarters and scored on the rest."""
    torch.manual_seed(seed)
    probes = mi.Probes(features.shape[1], num_classes)
    optimizer = torch.optim.Adam(probes.parameters(), lr=5e-3)
    cut = len(features) * 3 // 4
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - step / steps)
        chosen = torch.randint(cut, (64,))
        reconstruction, cross_entropy = probes(features[chosen], pixels[chosen], labels[chosen])
        optimizer.zero_grad()
        (reconstruction.mean() + cross_entropy.mean()).backward()
        optimizer.step()
    probes.eval()
    with torch.no_grad():
        scored = probes(features[cut:], pixels[cut:], labels[cut:])
        image_loss, label_loss = (each.mean().item() for each in scored)
    entropy = mi.label_entropy(np.bincount(labels[cut:].numpy(), minlength=num_classes))
    return mi.mean_colour_loss(
        pixels[:cut].mean((0, 2, 3)), pixels[cut:].mean((0, 2, 3))
    ) - image_loss, entropy - label_loss


def test_mixing_channels_before_enlarging_changes_nothing():
    features = torch.randn(3, 40, 7, 7, dtype=torch.float64)
    conv = mi.ConvOfEnlarged(40, 4).double()
    enlarged = F.interpolate(features, size=28, mode="bilinear")
    expected = F.conv2d(enlarged, conv.conv.weight, conv.conv.bias, padding=1)
    torch.testing.assert_close(conv(features, 28), expected, rtol=1e-12, atol=1e-12)
    few = mi.ConvOfEnlarged(40, 5).double()
    torch.testing.assert_close(few(features, 28), F.conv2d(enlarged, few.conv.weight, few.conv.bias, padding=1))


def test_repeats_have_nothing_in_common():
    torch.manual_seed(0)
    features, pixels, labels = torch.randn(8, 6, 4, 4), torch.rand(8, 3, 12, 12), torch.randint(5, (8,))
    both = mi.Probes(6, 5, repeats=2)
    losses = both(features, pixels, labels)
    assert losses[0].shape == losses[1].shape == (2, 8) and not torch.allclose(losses[0][0], losses[0][1])
    for repeat in (0, 1):
        alone = mi.Probes(6, 5)
        for (name, mine), theirs in zip(alone.state_dict().items(), both.state_dict().values(), strict=True):
            if mine.ndim and "num_batches" not in name:
                mine.copy_(theirs.chunk(2)[repeat])
        for mine, theirs in zip(alone(features, pixels, labels), losses, strict=True):
            torch.testing.assert_close(mine[0], theirs[repeat])
        both.zero_grad()
        sum(part[repeat].sum() for part in both(features, pixels, labels)).backward()
        other = [p.grad.chunk(2)[1 - repeat] for p in both.parameters()]
        assert all(not gradient.any() for gradient in other)


@pytest.fixture(scope="module")
def images():
    """1600 images of Fashion-MNIST, 14 px: pixels in [0, 1] and labels."""
    source = load_source("fashion_mnist", None, train=False)
    pixels = torch.from_numpy(source.images[:1600].copy()).float()[:, None] / 255
    return F.avg_pool2d(pixels, 2).expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(source.labels[:1600].copy())


def test_features_that_are_the_label_tell_all_of_it_and_noise_nothing(images):
    pixels, labels = images
    one_hot = F.one_hot(labels, 10).float()[:, :, None, None].expand(-1, -1, 4, 4).contiguous()
    entropy = mi.label_entropy(np.bincount(labels[1200:].numpy(), minlength=10))
    assert entropy == pytest.approx(np.log(10), abs=0.02)
    image, label = train(one_hot, pixels, labels, 10)
    assert label == pytest.approx(entropy, abs=0.02)
    noise_image, noise_label = train(torch.randn(len(labels), 10, 4, 4), pixels, labels, 10, steps=100)
    assert -0.2 < noise_label < 0.05 and noise_image < 0.3 * image  # a label tells something of an image


@pytest.mark.parametrize("distance", [1.0, 2.0, 4.0])
def test_gaussians_of_known_overlap(images, distance):
    pixels, _ = images
    n = 1600
    labels = torch.randint(2, (n,), generator=torch.Generator().manual_seed(0))
    value = distance * (labels - 0.5) + torch.randn(n, generator=torch.Generator().manual_seed(1))
    features = value[:, None, None, None].expand(-1, 1, 4, 4).contiguous()
    # I(Y;F) = ln 2 - E[H(Y | f)], by integration.
    f = np.linspace(-12, 12, 20001)
    density = [np.exp(-((f - sign * distance / 2) ** 2) / 2) / np.sqrt(2 * np.pi) for sign in (-1, 1)]
    posterior = density[1] / (density[0] + density[1])
    inner = posterior * np.log(posterior + 1e-300) + (1 - posterior) * np.log(1 - posterior + 1e-300)
    truth = np.log(2) + np.trapezoid((density[0] + density[1]) / 2 * inner, f)
    _, found = train(features, pixels, labels, 2)
    assert found == pytest.approx(truth, abs=0.06)


def test_the_more_is_lost_the_less_features_tell_of_the_image(images):
    pixels, labels = images
    sizes = (14, 7, 4, 2)
    found = [train(F.adaptive_avg_pool2d(pixels, size), pixels, labels, 10, steps=150)[0] for size in sizes]
    nothing = train(torch.zeros(len(labels), 3, 4, 4), pixels, labels, 10, steps=150)[0]
    assert sorted(found, reverse=True) == found and found[-1] > nothing + 0.005
    assert nothing == pytest.approx(0, abs=0.05)
    # What the mean colour loses is all that can be told, but for the grey pixels' own entropy.
    colour = pixels.mean((0, 2, 3))
    assert found[0] < mi.mean_colour_loss(colour, colour) - F.binary_cross_entropy(pixels, pixels).item()


def test_scores_add_what_is_scaled_alike():
    image, label = np.array([0.1, 0.3, 0.2]), np.array([1.0, 0.0, 2.0])
    np.testing.assert_allclose(mi.scores(image, label, "raw", 2.0), image + 2 * label)
    np.testing.assert_allclose(mi.scores(image, label, "minmax", 1.0), [0.5, 1.0, 1.5])
    zscore = mi.scores(image, label, "zscore", 0.0)
    assert zscore.mean() == pytest.approx(0) and zscore.std() == pytest.approx(1)
    np.testing.assert_allclose(mi.scores(image, np.ones(3), "zscore", 5.0), zscore)  # what is equal counts nothing
    for scaling in mi.SCALINGS:
        with pytest.raises(AssertionError, match="not a number"):
            mi.scores(image, np.array([1.0, np.nan, 2.0]), scaling, 1.0)


def test_scores_of_logits_are_what_their_definitions_say():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, 7, generator=generator)
    labels = torch.randint(7, (500,), generator=generator)
    p = logits.double().softmax(1).numpy()
    assert mi.mean_entropy(logits) == pytest.approx(-(p * np.log(p)).sum(1).mean())
    scaled = scaled_cross_entropies(logits, labels)
    assert scaled.shape == (500, 25) and SCALES[::12] == [1 / 8, 1, 8]
    right = np.log(torch.softmax(8 * logits.double(), 1).numpy()[range(500), labels.numpy()])
    np.testing.assert_allclose(scaled[:, -1].numpy(), -right, rtol=1e-4, atol=1e-5)
    confidence, right = p.max(1), p.argmax(1) == labels.numpy()
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert mi.calibration_error(logits, labels) == pytest.approx(expected, abs=1e-9)
    cmi = np.mean([(p[i] * np.log(p[i] / p[labels.numpy() == labels[i].item()].mean(0))).sum() for i in range(500)])
    assert mi.conditional_mutual_information(logits, labels) == pytest.approx(cmi)
    one_answer_a_class = torch.eye(7)[labels] * 4
    assert mi.conditional_mutual_information(one_answer_a_class, labels) == pytest.approx(0, abs=1e-9)

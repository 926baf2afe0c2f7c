"""Codecs: what a record holds, what the losses get of it, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ckd_dist.core.errors import UserError
from ckd_dist.data.views.draws import SAMPLED_CODEC, uniforms
from ckd_dist.nn import losses
from ckd_dist.nn.options import KDConfig
from ckd_dist.store.codecs import Dense, Sampled, TopK, factory, targets
from ckd_dist.store.options import CodecConfig


def case(n=64, classes=100, seed=0):
    """Logits as a network gives them, some large ones and a tail, with labels and draws."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator)
    logits += 8 * torch.rand(n, classes, generator=generator) ** 20
    labels = torch.randint(classes, (n,), generator=generator)
    draws = torch.rand(n, generator=generator, dtype=torch.float64)
    return logits, labels, draws


def decoded(codec, logits, labels, draws, kd, student=None):
    return targets.teacher_logits([codec], codec.encode(logits, labels, draws)[:, None], kd, student)


def array(codec, records):
    """Records as numpy opens a shard of them."""
    dtype, shape = codec.array(len(records))
    return np.frombuffer(records.numpy().tobytes(), dtype).reshape(shape)


@pytest.mark.parametrize(
    ("codec", "size"),
    [
        (Dense(1000), 2000),
        (Dense(1000, "bfloat16"), 2000),
        (TopK(1000, 8), 4 * 8 + 12),
        (TopK(70, 33), 4 * 33 + 12),
        (Sampled(1000, 11), 4 * 11),
    ],
)
def test_a_record_has_the_documented_size(codec, size):
    records = codec.encode(*case(classes=codec.num_classes))
    assert records.dtype == torch.uint8 and records.shape == (64, size)
    assert codec.record_bytes == size
    assert array(codec, records).nbytes == 64 * size


def test_numpy_reads_what_a_record_holds():
    logits, labels, draws = case()
    np.testing.assert_array_equal(array(Dense(100), Dense(100).encode(logits)), logits.half().numpy())
    bits = array(Dense(100, "bfloat16"), Dense(100, "bfloat16").encode(logits))
    np.testing.assert_array_equal((bits.astype(np.uint32) << 16).view(np.float32), logits.bfloat16().float().numpy())
    topk = array(TopK(100, 7), TopK(100, 7).encode(logits, labels, draws))
    np.testing.assert_array_equal(
        np.take_along_axis(logits.half().numpy(), topk["classes"].astype(int), 1), topk["logits"]
    )
    exact = logits.half().double()
    np.testing.assert_allclose(topk["log_sum_exp"], exact.logsumexp(1), rtol=1e-6)
    np.testing.assert_allclose(topk["mean"], exact.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(topk["std"], exact.std(1), rtol=1e-6)
    sampled = array(Sampled(100, 7), Sampled(100, 7).encode(logits, labels, draws))
    assert all(len(set(classes)) == 7 for classes in sampled["classes"].tolist())
    np.testing.assert_allclose(sampled["weights"].astype(float).sum(1), 1, atol=2e-3)


def test_topk_chooses_in_float32_and_always_keeps_the_label():
    logits, labels, draws = case()
    logits[0, :3] = torch.tensor([20.0, 20.001, 20.002])  # equal in float16
    logits[1, 40:44] = 20.0  # equal in float32: the order of classes decides
    labels[:2] = 99
    classes = array(TopK(100, 3), TopK(100, 3).encode(logits, labels, draws))["classes"].astype(int)
    assert classes[0].tolist() == [2, 1, 99] and classes[1].tolist() == [40, 41, 99]
    for i in range(2, 64):
        best = np.argsort(-logits[i].numpy(), kind="stable")[:3].tolist()
        assert classes[i].tolist() == (best if labels[i] in best else [*best[:2], int(labels[i])])


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("topk", kind) for kind in ("kd", "soft_target", "dkd", "standardized")]
    + [("sampled", kind) for kind in ("kd", "soft_target")],
)
def test_with_all_classes_kept_sparse_losses_are_the_dense_ones_gradient_included(name, kind, temperature):
    kd = KDConfig(loss=kind, alpha=0.3, temperature=temperature)
    codec = TopK(10, 10) if name == "topk" else Sampled(10, 10, temperature)
    logits, labels, draws = case(classes=10)
    student = torch.randn(64, 10, generator=torch.Generator().manual_seed(1)).requires_grad_()
    results = []
    for each in (Dense(10), codec):
        teacher = decoded(each, logits, labels, draws, kd, student)
        loss = losses.distillation(student, teacher, labels, kd)["loss"]
        results.append((loss, *torch.autograd.grad(loss.sum(), student)))
    # topk keeps the same float16 logits; the weights of sampled are float16 probabilities.
    rtol, atol = (1e-4, 1e-4) if name == "topk" else (2e-2, temperature**2 * 1e-3)
    torch.testing.assert_close(results[1][0], results[0][0], rtol=rtol, atol=atol)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", ["kd", "soft_target", "dkd", "standardized"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
def test_topk_is_exact_at_every_temperature_where_the_rest_is_even(kind, temperature):
    kd = KDConfig(loss=kind, temperature=temperature)
    logits, labels, draws = case(classes=50)
    keep = logits.topk(9).indices
    rest = torch.full_like(logits, -2.5).scatter(1, keep, logits.gather(1, keep)).half().float()
    student = torch.randn(64, 50, generator=torch.Generator().manual_seed(1))
    exact, sparse = (
        losses.distillation(student, decoded(codec, rest, labels, draws, kd), labels, kd)["kd"]
        for codec in (Dense(50), TopK(50, 10))
    )
    torch.testing.assert_close(sparse, exact, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("kind", ["kd", "standardized"])
def test_topk_compares_the_rest_as_one_class(kind, temperature):
    kd = KDConfig(loss=kind, temperature=temperature)
    logits, labels, draws = case(classes=50)
    teacher = logits.half().double()
    top = TopK(50, 6).encode(logits, labels, draws)
    classes = torch.from_numpy(array(TopK(50, 6), top)["classes"].astype(np.int64))
    # The mass of the rest at other temperatures than 1 is the codec's own estimate, tested below.
    estimate = targets.teacher_logits([TopK(50, 6)], top[:, None], kd).double()
    scale = 1.0 if kind == "kd" else teacher.std(1, keepdim=True)
    p = (estimate / temperature).softmax(1)
    exact = (teacher / scale / temperature).softmax(1)
    torch.testing.assert_close(p.gather(1, classes), exact.gather(1, classes), rtol=0.05, atol=1e-3)

    def grouped(student):
        ours = losses.standardize(student) if kind == "standardized" else student
        q = (ours / temperature).softmax(1)
        p_top, q_top = p.gather(1, classes), q.gather(1, classes)
        p_rest, q_rest = 1 - p_top.sum(1), 1 - q_top.sum(1)
        return temperature**2 * ((p_top * (p_top / q_top).log()).sum(1) + p_rest * (p_rest / q_rest).log())

    student = torch.randn(64, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    found = losses.distillation(student, decoded(TopK(50, 6), logits, labels, draws, kd, student), labels, kd)["kd"]
    torch.testing.assert_close(found, grouped(student), rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(loss.sum(), student)[0] for loss in (found, grouped(student))]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_the_teacher_itself_is_the_best_student_of_topk():
    logits, labels, draws = case(classes=50)
    for kind in ("kd", "dkd", "standardized"):
        kd = KDConfig(loss=kind, temperature=1.0)
        student = logits.clone().requires_grad_()
        teacher = decoded(TopK(50, 6), logits, labels, draws, kd, student)
        loss = losses.distillation(student, teacher, labels, kd)["kd"]
        assert loss.max() < (2e-3 if kind != "standardized" else 2e-2)


def test_topk_knows_the_mass_of_the_rest_at_other_temperatures():
    logits, labels, draws = case(classes=1000)
    codec = TopK(1000, 8)
    records = codec.encode(logits, labels, draws)
    # Exact at T = 1 but for float16; a cubic in 1/T that is right to second order where 1/T is small.
    for temperature, tolerance in ((1.0, 2e-3), (2.0, 0.03), (4.0, 0.01), (20.0, 1e-3)):
        found = (codec.decode(records, temperature) / temperature).logsumexp(1)
        torch.testing.assert_close(found, (logits / temperature).logsumexp(1), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("temperature", "tolerance"), [(0.9, 2e-3), (0.5, 0.02), (0.25, 0.01)])
def test_topk_below_temperature_1_is_the_teachers_softmax_within_what_the_record_can_say(temperature, tolerance):
    logits, labels, draws = case(n=512, classes=1000)
    logits = (1.5 * logits).half().double()
    codec = TopK(1000, 8)
    records = codec.encode(logits.float(), labels, draws)
    classes, kept, *statistics = codec._fields(records)
    found = codec._rest_mass(temperature, kept, *statistics)
    each = codec._rest_mass(torch.full((512, 1), temperature), kept, *statistics)  # as standardized asks
    torch.testing.assert_close(each, found, rtol=1e-6, atol=1e-6)
    exact = (logits / temperature).scatter(1, classes, -torch.inf).logsumexp(1, keepdim=True)
    rest = logits.scatter(1, classes, -torch.inf)
    mass, largest = rest.logsumexp(1, keepdim=True), kept[:, -2:-1].double()
    cold = 1 / temperature - 1
    for value in (found, exact):  # both are within the bounds, but for the rounding of the statistics
        assert (value < mass + cold * torch.minimum(largest, mass) + 1e-3).all()
        assert (value > (1 + cold) * mass - cold * np.log(992) - 1e-3).all()
    top = (logits / temperature).gather(1, classes)
    ours, theirs = (torch.cat([top, mass], dim=1).log_softmax(1) for mass in (found, exact))
    divergence = (theirs.exp() * (theirs - ours)).sum(1).mean()
    assert divergence < tolerance  # of the classes that the codec compares; without the bounds 16 to 200 times


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_sampled_targets_are_unbiased_and_those_of_topk_are_not(temperature):
    classes, k, n = 30, 6, 40_000
    logits = case(1, classes)[0]
    truth = (logits / temperature).softmax(1)[0].double()
    draws = torch.from_numpy(uniforms(0, 0, np.arange(n), SAMPLED_CODEC))
    codec, kd = Sampled(classes, k, temperature), KDConfig(temperature=temperature)
    target = (decoded(codec, logits.expand(n, -1), None, draws, kd) / temperature).softmax(1).double()
    error = target.std(0) / n**0.5 + 5e-4 * truth + 1e-7  # of the mean; weights are rounded to float16
    assert ((target.mean(0) - truth).abs() < 5 * error).all()
    assert (target.std(0) > 0).sum() >= classes - k  # the other classes are drawn, now and then
    # The k largest, made to sum to 1 as most systems keep them, are off by far more than chance explains.
    top = torch.zeros_like(truth).scatter(0, truth.topk(k).indices, truth.topk(k).values)
    bias_naive = (top / top.sum() - truth).abs().max()
    bias_topk = (decoded(TopK(classes, k), logits, torch.tensor([0]), None, kd) / temperature).softmax(1)[0] - truth
    bias_sampled = (target.mean(0) - truth).abs().max()
    assert bias_naive > 10 * error.max() and bias_naive > 10 * bias_sampled
    assert bias_topk.abs().max() > 2 * bias_sampled  # spreading the rest evenly helps, and is still a bias


def test_the_gradient_of_sampled_targets_is_unbiased():
    classes, n, kd = 30, 40_000, KDConfig(alpha=0.0, temperature=1.0)
    logits, student = case(1, classes)[0], torch.randn(1, classes, generator=torch.Generator().manual_seed(2))
    draws = torch.from_numpy(uniforms(0, 0, np.arange(n), SAMPLED_CODEC))
    students = student.expand(n, -1).clone().requires_grad_()
    teacher = decoded(Sampled(classes, 6), logits.expand(n, -1), None, draws, kd)
    (gradients,) = torch.autograd.grad(losses.soft_target_divergence(students, teacher, 1.0).sum(), students)
    expected = student.softmax(1) - logits.softmax(1)
    error = gradients.std(0) / n**0.5 + 5e-4 * logits.softmax(1)[0] + 1e-6
    assert ((gradients.mean(0) - expected[0]).abs() < 5 * error).all()


def test_draws_belong_to_a_sample_and_a_view_whatever_the_order():
    ids = np.random.default_rng(0).permutation(1000)
    draws = uniforms(7, 3, ids, SAMPLED_CODEC)
    np.testing.assert_array_equal(draws, uniforms(7, 3, np.arange(1000), SAMPLED_CODEC)[ids])
    assert draws.min() >= 0 and draws.max() < 1 and abs(draws.mean() - 0.5) < 0.05
    for other in (uniforms(7, 4, ids, 1000), uniforms(8, 3, ids, 1000), uniforms(7, 3, ids, 1001)):
        assert abs(np.corrcoef(draws, other)[0, 1]) < 0.15


def test_an_ensemble_averages_logits_or_probabilities_by_weight():
    members = [case(seed=seed)[0].half().float() for seed in range(3)]
    weights = [0.5, 0.3, 0.2]
    records = torch.stack([Dense(100).encode(member) for member in members], dim=1)
    kd = KDConfig(temperature=4.0)
    dense = [Dense(100)] * records.shape[1]
    mean = targets.teacher_logits(dense, records, kd, weights=weights)
    torch.testing.assert_close(mean, sum(w * m for w, m in zip(weights, members, strict=True)))
    target = targets.teacher_logits(dense, records, kd, weights=weights, combine="probabilities")
    expected = sum(w * (m / 4).softmax(1) for w, m in zip(weights, members, strict=True))
    torch.testing.assert_close((target / 4).softmax(1), expected)
    standardized = targets.teacher_logits(dense, records, KDConfig(loss="standardized"), weights=weights)
    torch.testing.assert_close(standardized, losses.standardize(mean))


@pytest.mark.parametrize(
    ("codec", "kd", "combine", "expected"),
    [
        (
            TopK(10, 4),
            KDConfig(loss="mse"),
            None,
            r"mse needs the logits of all 10 classes, and 4.*codec dense or transform can",
        ),
        (
            TopK(10, 4),
            KDConfig(loss="dist"),
            None,
            "dist needs the logits of all 10 classes.*codec dense or transform can",
        ),
        (
            TopK(10, 4),
            KDConfig(loss="standardized"),
            "logits",
            "all checkpoints together.*codec dense or transform can",
        ),
        (
            Sampled(10, 4),
            KDConfig(loss="dkd", temperature=1),
            None,
            "dkd needs logits.*codec dense or transform or topk can",
        ),
        (Sampled(10, 4), KDConfig(temperature=4), None, r"4.*drawn at 1\.0.*codec dense or transform or topk can"),
        (Sampled(10, 4), KDConfig(temperature=1), "logits", "give --teacher.combine probabilities"),
        (Dense(10), KDConfig(loss="mse"), "probabilities", "combine probabilities gives none"),
    ],
)
def test_a_loss_that_a_codec_cannot_serve_is_refused_with_those_that_can(codec, kd, combine, expected):
    with pytest.raises(UserError, match=f"codec is {codec.name}: .*{expected}"):
        targets.require_supported(codec, kd, combine)


@pytest.mark.parametrize("loss", ["kd", "soft_target", "dkd", "standardized", "mse", "dist"])
def test_what_a_codec_serves_is_finite(loss):
    logits, labels, draws = case()
    logits[0] = torch.linspace(-3e4, 3e4, 100)  # as sure as can be
    logits[1] = 0.0
    kd = KDConfig(loss=loss, temperature=1.0)
    served = [codec for codec in (Dense(100), TopK(100, 5), Sampled(100, 5)) if codec.unsupported(kd, None) is None]
    for codec in served:
        student = torch.randn(64, 100, generator=torch.Generator().manual_seed(1)).requires_grad_()
        teacher = decoded(codec, logits, labels, draws, kd, student)
        loss = losses.distillation(student, teacher, labels, kd)["loss"]
        assert torch.isfinite(loss[2:]).all() and torch.isfinite(loss[1] if kd.loss != "dist" else loss[2])
        (gradient,) = torch.autograd.grad(loss[2:].sum(), student)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"codec": "topk"}, "k goes with --codec topk and sampled"),
        ({"k": 8}, "k goes with --codec topk and sampled"),
        ({"codec": "topk", "k": 1}, "k is 1: give 2 to 1,000,000"),
        ({"codec": "topk", "k": 8, "dtype": "float16"}, "dtype is for --codec dense"),
        ({"codec": "topk", "k": 8, "sample_temperature": 4}, "sample_temperature is for --codec sampled"),
        ({"codec": "sampled", "k": 8, "sample_temperature": 0}, "sample_temperature is 0: give 0.001 to 1,000"),
        ({"codec": "topk", "k": 11}, "k is 11, the images have 10 classes"),
    ],
)
def test_codec_options_that_contradict_each_other_are_refused(options, expected):
    with pytest.raises(UserError, match=expected):
        factory.from_config(CodecConfig(**options), 10)


def test_a_codec_survives_the_manifest():
    for codec in (Dense(10), Dense(10, "bfloat16"), TopK(10, 4), Sampled(10, 4, 2.5)):
        assert factory.from_dict(codec.to_dict(), 10) == codec

"""The host gives the device work and never waits for it: the train step, and a teacher's pass."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ckd_dist.bench.step import CLASSES, learner, memory_batch, plain_loss
from ckd_dist.core.options import load_config
from ckd_dist.data.batch import Batch, Mixed
from ckd_dist.data.options import TrainDataConfig
from ckd_dist.data.pairs import PairMixing
from ckd_dist.nn import features, forward, models
from ckd_dist.nn.review import ReviewingStudent
from ckd_dist.store.codecs import Dense, Sampled, TopK, Transform
from ckd_dist.store.codecs.transform import fit
from ckd_dist.train.learner import Learner
from ckd_dist.train.objective import DistillationLoss
from ckd_dist.train.options import DistillConfig
from ckd_dist.train.records import OnlineRecords

DENSE, TOPK, SAMPLED = Dense(CLASSES), TopK(CLASSES, 8), Sampled(CLASSES, 8, 4.0)
TRANSFORM = Transform(CLASSES, 20, 2)
TRANSFORM = TRANSFORM.fitted(fit(TRANSFORM, torch.randn(600, 20) @ torch.randn(20, CLASSES), 0))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
aten = torch.ops.aten


class _Waits(TorchDispatchMode):
    """Collects operations whose result's shape or value the host must know, which on a GPU makes it wait."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        reading = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.lift_fresh)
        masked = function in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default) and any(
            each is not None and each.dtype == torch.bool for each in args[1]
        )
        if masked or function.overloadpacket in reading:
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@contextmanager
def no_waiting(device):
    """Fails where the host waits for the device: on a GPU as CUDA sees it, on a CPU by the operations themselves."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with _Waits() as waits:
        yield
    assert waits.found == []


def encoded(codec, logits, labels):
    """Records uint8 [n, bytes]."""
    return codec.encode(logits, labels, torch.rand(len(logits), dtype=torch.float64, device=logits.device))


CASES = [
    *((DENSE, loss, 1) for loss in ("kd", "soft_target", "mse", "dkd", "dist", "standardized")),
    *((TOPK, loss, 1) for loss in ("kd", "soft_target", "dkd", "standardized")),
    *((TRANSFORM, loss, 1) for loss in ("kd", "mse", "standardized")),
    (SAMPLED, "kd", 1),
    (DENSE, "kd", 2),
    (TOPK, "kd", 2),
    (TRANSFORM, "kd", 2),
    (None, "kd", 0),
]


@pytest.mark.parametrize("codec, loss, members", CASES)
@pytest.mark.parametrize("mixed", [None, "views", "pairs"])
def test_a_train_step_does_not_wait(codec, loss, members, mixed, tmp_path):
    batch, function = memory_batch(16, 8, DEVICE), plain_loss
    if mixed == "views":
        batch.mixed = Mixed(batch.labels.flip(0), torch.rand(16, device=DEVICE))
    if codec is not None:
        logits = torch.randn(members + 1, 16, CLASSES, device=DEVICE)
        batch.teacher_records = torch.stack([encoded(codec, each, batch.labels) for each in logits], dim=1)
        teacher = ["--teacher.store=-", f"--teacher.checkpoints={[*range(members)]}", f"--kd.loss={loss}"]
        words = ["--data.train=-", "--model.name=resnet8", "--run_dir=-", "--epochs=1000", "--kd.temperature=4"]
        config, columns = load_config(DistillConfig, [*words, *teacher]), [[*range(members)]] * 1000
        function = DistillationLoss(config, [[codec] * members] * 1000, columns, weights=[1 / members] * members)
    options = ["--optim.clip_grad_norm=1", "--optim.name=adamw"] if mixed else []
    one = learner(tmp_path / "run", "resnet8", function, DEVICE, 16, *options)
    one.train_step(batch)  # the first sets up what is kept
    if mixed == "pairs":  # whose draws are made on the host, and copied without waiting
        batch = PairMixing(TrainDataConfig(train="-", batch_size=16, pair_mixup=1.0, pair_cutmix=1.0), 0)(batch, 1)
    with no_waiting(DEVICE):
        one.train_step(batch)


@pytest.mark.parametrize("codec", [DENSE, TOPK], ids=["dense", "topk"])
@pytest.mark.parametrize("loss", ["kd", "dkd"])
def test_answers_to_both_images_count_by_their_weights(codec, loss):
    config = load_config(DistillConfig, ["--data.train=-", "--model.name=resnet8", "--run_dir=-", f"--kd.loss={loss}"])
    labels, others, weights = torch.arange(16), torch.arange(16).flip(0), torch.rand(16)
    records, student = codec.encode(torch.randn(16, CLASSES), labels)[:, None], torch.randn(16, CLASSES)
    function, images = DistillationLoss(config, [[codec]], [[0]], weights=[1.0]), torch.empty(16, 0)
    both = {"teacher_records": records, "partner_records": records.flip(0)}
    found = function(student, Batch(images, labels, labels, mixed=Mixed(others, weights), **both), 0)
    own, other = (
        function(student, Batch(images, each, labels, teacher_records=theirs), 0)
        for each, theirs in ((labels, records), (others, records.flip(0)))
    )
    for name in ("loss", "ce", "kd", "teacher_top1", "agreement"):
        torch.testing.assert_close(found[name], weights * own[name] + (1 - weights) * other[name])


def test_the_loss_of_both_answers_is_that_of_the_mean_of_their_softmaxes(tmp_path):
    words = ["--data.train=-", "--model.name=resnet8", "--run_dir=-", "--kd.alpha=0.3", "--kd.temperature=2"]
    config, labels, weights = load_config(DistillConfig, words), torch.arange(16), torch.rand(16)
    teacher, student = torch.randn(16, CLASSES), torch.randn(16, CLASSES, requires_grad=True)
    records = DENSE.encode(teacher, labels)[:, None]
    both = {"teacher_records": records, "partner_records": records.flip(0)}
    batch = Batch(torch.empty(16, 0), labels, labels, mixed=Mixed(labels.flip(0), weights), **both)
    function = DistillationLoss(config, [[DENSE]], [[0]], weights=[1.0])
    (found,) = torch.autograd.grad(function(student, batch, 0)["loss"].sum(), student)
    softmaxes = (DENSE.decode(records[:, 0], 2.0) / 2).softmax(dim=1)
    target = torch.lerp(softmaxes.flip(0), softmaxes, weights[:, None])
    hot = torch.nn.functional.one_hot(labels, CLASSES).float()
    label = torch.lerp(hot.flip(0), hot, weights[:, None])
    kd = 4 * torch.nn.functional.cross_entropy(student / 2, target, reduction="sum")
    loss = 0.3 * torch.nn.functional.cross_entropy(student, label, reduction="sum") + 0.7 * kd
    (wanted,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_model_is_compiled_in_the_mode_that_the_option_says(tmp_path, monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda model, *, dynamic, mode: modes.append(mode) or model)
    for word in ("--compile=false", "--compile=true", "--compile=reduce-overhead"):
        learner(tmp_path / "run", "resnet8", plain_loss, DEVICE, 4, word).train_step(memory_batch(4, 8, DEVICE))
    assert modes == [None, "reduce-overhead"]


def test_a_batch_in_parts_is_the_same_step(tmp_path):
    batch, seen, options = memory_batch(15, 8, DEVICE), [], ["--amp=off", "--optim.momentum=0"]
    batch.mixed = Mixed(batch.labels.flip(0), torch.rand(15, device=DEVICE))
    batch.teacher_records = encoded(DENSE, torch.randn(15, CLASSES, device=DEVICE), batch.labels)[:, None]
    config = load_config(DistillConfig, ["--data.train=-", "--model.name=resnet8", "--run_dir=-", "--epochs=1000"])
    weights = []
    for parts in (1, 4):
        function = DistillationLoss(config, [[DENSE]] * 1000, [[0]] * 1000, weights=[1.0])
        one = learner(tmp_path / "run", "resnet8", function, DEVICE, 15, f"--accumulate={parts}", *options)
        for norm in [module for module in one.model.modules() if isinstance(module, torch.nn.BatchNorm2d)]:
            norm.eval()  # with the statistics that it begins with, whatever the batch
        one.model.register_forward_pre_hook(lambda model, arguments: seen.append(len(arguments[0])))
        one.train_step(batch)
        weights.append([p.detach().clone() for p in one.model.parameters()])
        found = one.log(1.0, 0.0)
        assert found["loss"] > 0 and found.keys() == {"loss", "ce", "kd", "top1", "teacher_top1", "agreement"}
    assert seen == [15, 3, 4, 4, 4]
    for whole, added in zip(*weights, strict=True):
        torch.testing.assert_close(whole, added, rtol=1e-4, atol=1e-6)


def reviewing(folder, *options):
    """A learner that compares its maps with a resnet20's, that teacher, and a batch of 15 images, small ones."""
    teacher = forward.to_device(models.build_model("resnet20", CLASSES), DEVICE)
    stages = features.stages(teacher, 16, "resnet20")
    plain = learner(folder, "resnet8", plain_loss, DEVICE, 15, "--optim.momentum=0", "--amp=off", *options)
    torch.manual_seed(0)
    student = ReviewingStudent(plain.model, features.stages(plain.model, 16, "resnet8"), stages, 2.0)
    one = Learner(student, plain.config, plain_loss, plain.run, DEVICE, {}, 32)
    return one, OnlineRecords([teacher], DENSE, "off", stages), memory_batch(15, 16, DEVICE)


def test_a_step_that_compares_maps_does_not_wait(tmp_path):
    one, teacher, batch = reviewing(tmp_path / "run")
    batch.teacher_records, batch.teacher_maps = teacher(batch.images)
    one.train_step(batch)
    with no_waiting(DEVICE):
        teacher(batch.images)
        one.train_step(batch)


def test_maps_are_compared_in_parts_of_a_batch_too(tmp_path):
    weights, values = [], []
    for parts in (1, 4):
        torch.manual_seed(1)
        one, teacher, batch = reviewing(tmp_path / "run", f"--accumulate={parts}")
        records, batch.teacher_maps = teacher(batch.images)
        assert torch.equal(
            records[:, 0], DENSE.encode(forward.forward_logits(teacher.networks[0], batch.images, "off"))
        )
        for norm in [module for module in one.trained.modules() if isinstance(module, torch.nn.BatchNorm2d)]:
            norm.eval()  # with the statistics that it begins with, whatever the batch
        before = [p.detach().clone() for p in one.reviewing.connectors.parameters()]
        one.train_step(batch)
        weights.append([p.detach().clone() for p in one.trained.parameters()])
        values.append(one.log(1.0, 0.0))
        after = one.reviewing.connectors.parameters()
        assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert values[0]["feature"] > 0 and values[0].keys() == {"loss", "feature", "top1"}
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    for whole, added in zip(*weights, strict=True):
        torch.testing.assert_close(whole, added, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("codec", [DENSE, TRANSFORM, TOPK, SAMPLED], ids=lambda codec: codec.name)
def test_a_teachers_pass_does_not_wait(codec):
    batch = memory_batch(16, 8, DEVICE)
    model = forward.to_device(models.build_model("resnet8", CLASSES), DEVICE)
    encoded(codec, memory_batch(2, 8, DEVICE).images.new_ones(2, CLASSES), batch.labels[:2])  # sets up what is kept
    with no_waiting(DEVICE):
        encoded(codec, forward.forward_logits(model, batch.images, "bfloat16"), batch.labels)
        OnlineRecords([model, model], DENSE, "bfloat16")(batch.images)

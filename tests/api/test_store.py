"""A store in a loop of one's own: its logits and losses are those of distill, and it needs no FFCV."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

import ckd_dist
from ckd_dist.core.errors import UserError
from ckd_dist.data.batch import Batch, Mixed
from ckd_dist.nn.options import KDConfig, ModelConfig
from ckd_dist.train.objective import DistillationLoss
from ckd_dist.train.options import DistillConfig, TeacherConfig, TrainDataConfig
from tests.helpers.commands import run
from tests.helpers.here import cache_here, store_here
from tests.helpers.stores import VIEWS, cache_options

IDS = [5, 1200, 3, 700, 5]


def on_disk(store, epoch, view):
    """All logits of a dense store's view, by numpy alone."""
    folder = store / f"epoch_{epoch:04d}" / f"view_{view:04d}"
    return torch.from_numpy(np.concatenate([np.load(path) for path in sorted(folder.glob("*.npy"))])).float()


def test_a_store_tells_what_it_is_of(store, fashion):
    opened = ckd_dist.open_store(store, [1, 3])
    assert (opened.views, opened.seed, opened.num_classes, opened.count) == (VIEWS, 0, 10, 1201)
    assert opened.checkpoints == [1, 3] and opened.recipe.kind == "pad_crop" and opened.image_size == 28
    assert len(opened.classes) == 10 and len(opened.mean) == len(opened.std) == 3 and opened.transform is None
    assert ckd_dist.open_store(str(store)).checkpoints == [3]
    opened.check()


def test_logits_are_those_on_disk(store):
    opened = ckd_dist.open_store(store, [1, 3])
    found = opened.logits(torch.tensor(IDS), 1)
    assert found.shape == (5, 2, 10) and found.dtype == torch.float32
    for m, epoch in enumerate((1, 3)):
        torch.testing.assert_close(found[:, m], on_disk(store, epoch, 1)[IDS], rtol=0, atol=0)
    views = torch.tensor([0, 1, 1, 0, 1])
    for sample, view, logits in zip(IDS, views, opened.logits(IDS, views), strict=True):
        torch.testing.assert_close(logits, opened.logits([sample], int(view))[0], rtol=0, atol=0)


def test_the_loss_is_the_papers(store):
    """Written out: alpha weighs the label, T^2 the divergence."""
    student = torch.randn(5, 10, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([1, 2, 3, 4, 5])
    found = ckd_dist.open_store(store, [1, 3]).loss(student, IDS, 1, labels, alpha=0.3, temperature=4.0, weights=[1, 3])
    teacher = 0.25 * on_disk(store, 1, 1)[IDS] + 0.75 * on_disk(store, 3, 1)[IDS]
    kl = F.kl_div(F.log_softmax(student / 4, 1), F.softmax(teacher / 4, 1), reduction="none").sum(1)
    expected = 0.3 * F.cross_entropy(student, labels, reduction="none") + 0.7 * 16 * kl
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.mean(), student)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.mean(), student)[0])


@pytest.mark.parametrize(
    ("codec", "loss"),
    [
        *(((), loss) for loss in ("soft_target", "mse", "dkd", "dist", "standardized")),
        *((("--codec", "topk", "--k", 4), loss) for loss in ("kd", "dkd", "standardized")),
        (("--codec", "sampled", "--k", 4, "--sample_temperature", 2), "kd"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else value,
)
def test_every_codecs_loss_is_that_of_distill(store, fashion, tmp_path, codec, loss):
    path = store
    if codec:
        path = tmp_path / "converted"
        assert store_here("convert", store, path, "--data.train", fashion["train"], *codec) == 0
    opened = ckd_dist.open_store(path, [2])
    student = torch.randn(5, 10, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([1, 2, 3, 4, 5])
    found = opened.loss(student, IDS, 1, labels, loss, alpha=0.25, temperature=2.0)
    config = DistillConfig(
        data=TrainDataConfig(train=""), model=ModelConfig(name=""), run_dir="",
        teacher=TeacherConfig(store="s", checkpoints=[2]), kd=KDConfig(loss=loss, alpha=0.25, temperature=2.0),
    )  # fmt: skip
    records = opened.records(IDS, 1)
    batch = Batch(images=torch.empty(0), labels=labels, ids=torch.tensor(IDS), teacher_records=records)
    values = DistillationLoss(config, [opened.reader.codecs], [[0]], [1.0])(student, batch, 0)
    torch.testing.assert_close(found, values["loss"], rtol=0, atol=0)
    gradients = [torch.autograd.grad(each.sum(), student)[0] for each in (found, values["loss"])]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    again = opened.loss(student, IDS, 1, labels, loss, alpha=0.25, temperature=2.0, records=records)
    torch.testing.assert_close(again, found, rtol=0, atol=0)


def test_what_a_store_cannot_serve_is_refused(store, fashion, teacher, tmp_path):
    opened = ckd_dist.open_store(store)
    student, labels = torch.zeros(1, 10), torch.tensor([0])
    with pytest.raises(IndexError, match="the store has 0 to 1200"):
        opened.logits([1201], 0)
    with pytest.raises(IndexError, match="the store has 0 to 1"):
        opened.logits([0], 2)
    with pytest.raises(UserError, match=r"no checkpoint of epoch 9; there are 1, 2, 3"):
        ckd_dist.open_store(store, [9])
    with pytest.raises(UserError, match="is not a logit store"):
        ckd_dist.open_store(tmp_path)
    with pytest.raises(UserError, match=r"kd\.temperature is 0: give"):
        opened.loss(student, [0], 0, labels, temperature=0)
    with pytest.raises(UserError, match="weights: 2 values for 1 checkpoints"):
        opened.loss(student, [0], 0, labels, weights=[1, 1])
    with pytest.raises(UserError, match="the store's images are not mixed"):
        opened.loss(student, [0], 0, labels, mixed=Mixed(labels, torch.ones(1)))
    mixing = tmp_path / "mixing"
    cache_here(*cache_options(fashion, teacher, mixing, "--data.mixup", 1, "--views", 1))
    with pytest.raises(UserError, match="are mixed of two, give the second labels"):
        ckd_dist.open_store(mixing).loss(student, [0], 0, labels)
    topk = tmp_path / "topk"
    assert store_here("convert", store, topk, "--data.train", fashion["train"], "--codec", "topk", "--k", 4) == 0
    with pytest.raises(UserError, match=r"kd\.loss mse needs the logits of all 10 classes"):
        ckd_dist.open_store(topk).loss(student, [0], 0, labels, "mse")


class Answers(Dataset):
    """The teacher's logits, fetched by workers."""

    def __init__(self, store):
        self.store = store

    def __len__(self):
        return 200

    def __getitem__(self, index):
        return self.store.logits([index], 1)[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_used_store_works_in_workers(store, start):
    opened = ckd_dist.open_store(store, [1, 3])
    expected = opened.logits(range(200), 1)
    assert pickle.loads(pickle.dumps(opened)).checkpoints == [1, 3]
    loader = DataLoader(Answers(opened), batch_size=50, num_workers=2, multiprocessing_context=start)
    torch.testing.assert_close(torch.cat(list(loader)), expected, rtol=0, atol=0)


def test_a_store_opens_where_ffcv_is_not_installed(store, tmp_path):
    program = tmp_path / "open.py"
    program.write_text(
        "import sys\n"
        "sys.modules['ffcv'] = None\n"
        "import torch, ckd_dist\n"
        "store = ckd_dist.open_store(sys.argv[1])\n"
        "print(store.loss(torch.zeros(2, 10), [0, 1], 0, torch.tensor([0, 1])).shape, store.logits([0], 1).shape)\n"
    )
    assert run(str(program), store).stdout.split() == ["torch.Size([2])", "torch.Size([1,", "1,", "10])"]


def test_importing_the_package_imports_neither_torch_nor_numpy(tmp_path):
    program = tmp_path / "imports.py"
    program.write_text(
        "import sys, ckd_dist\n"
        "assert set(ckd_dist.__all__) <= set(dir(ckd_dist))\n"
        "print(*{'torch', 'numpy', 'ffcv', 'numba', 'pydantic'} & set(sys.modules))\n"
    )
    assert run(str(program)).stdout.split() == []
    with pytest.raises(AttributeError, match="no attribute 'Stone'"):
        _ = ckd_dist.Stone
    assert sys.modules["ckd_dist"].Store is ckd_dist.Store

"""The codec `transform`: a basis that is fitted to each checkpoint, and its files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ckd_dist.core.errors import UserError
from ckd_dist.nn.options import KDConfig
from ckd_dist.store import bases
from ckd_dist.store.codecs import Dense, Transform, targets
from ckd_dist.store.codecs.transform import Basis, centred, fit
from ckd_dist.store.manifest import Manifest
from ckd_dist.store.reader import StoreReader
from tests.helpers.commands import run
from tests.helpers.here import cache_here, run_here, store_here
from tests.helpers.shared import make_once
from tests.helpers.stores import cache_options, contents
from tests.helpers.training import metrics

CODEC = ("--codec", "transform", "--bytes", 8)


def logits_like_a_teachers(count: int, classes: int, seed: int = 0) -> torch.Tensor:
    """Float32 [n, classes], correlated between classes, some images far from the mean and some near."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randn(40, classes, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -1.5, 40)[:, None]
    size = torch.rand(count, 1, generator=generator) + 0.3
    return 3 * size * (torch.randn(count, 40, generator=generator) @ axes)


@pytest.fixture(scope="module", params=[(300, 28), (1500, 20)], ids=["300 classes", "1500 classes"])
def fitted(request) -> tuple[Transform, torch.Tensor]:
    """A codec with the basis of 2000 records, and others like them."""
    classes, size = request.param
    codec = Transform(classes, size, repairs=3)
    logits = logits_like_a_teachers(2500, classes)
    return codec.fitted(fit(codec, logits[:2000], 0)), logits[2000:]


def test_a_record_says_most_of_what_the_logits_say(fitted):
    codec, logits = fitted
    labels = logits.argmax(dim=1)
    records = codec.encode(logits, labels)
    assert records.dtype == torch.uint8 and records.shape == (500, codec.bytes)
    found, truth = codec.decode(records, 1.0), centred(logits)
    assert ((found - truth).norm(dim=1) / truth.norm(dim=1)).mean() < 0.25
    assert (found.argmax(dim=1) == labels).double().mean() > 0.9  # which repairs hold to
    for temperature in (1, 4):
        p, q, nothing = (
            (each / temperature).log_softmax(dim=1)
            for each in (truth, found.double(), truth.mean(dim=0).expand_as(truth))
        )
        lost, all_of_it = ((p.exp() * (p - each)).sum(dim=1).mean() for each in (q, nothing))
        assert lost < 0.1 * all_of_it


def test_records_do_not_depend_on_the_batch_or_the_number_of_threads(fitted):
    codec, logits = fitted
    labels = logits.argmax(dim=1)
    whole = codec.encode(logits, labels)
    for size in (1, 7, 250):
        parts = [codec.encode(*each) for each in zip(logits.split(size), labels.split(size), strict=True)]
        assert torch.equal(torch.cat(parts), whole)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    assert torch.equal(codec.encode(logits, labels), whole)
    torch.set_num_threads(threads)


def test_a_basis_is_its_file(fitted):
    codec, logits = fitted
    content = codec.basis.content()
    again = codec.fitted(Basis.from_content(content, codec))
    assert again.basis.content() == content
    labels = logits.argmax(dim=1)
    assert torch.equal(again.encode(logits, labels), codec.encode(logits, labels))
    with pytest.raises(ValueError, match="it is no basis"):
        Basis.from_content(content[:-100], codec)
    other = Transform(codec.num_classes, codec.bytes + 1, codec.repairs)
    with pytest.raises(ValueError, match="its edges are"):
        Basis.from_content(content, other)


def test_deviation_tells_another_record_from_a_tie(fitted):
    codec, logits = fitted
    records = codec.encode(logits, logits.argmax(dim=1))
    assert codec.deviation(records, logits).max() == 0
    nearly = codec.deviation(records, logits * (1 + 1e-4 * torch.randn_like(logits)))
    assert nearly.max() < 0.02
    assert codec.deviation(records.roll(1, 0), logits).min() > 0.2


@pytest.mark.parametrize("loss", ["kd", "soft_target", "mse", "dkd", "dist", "standardized"])
def test_every_loss_is_served(fitted, loss):
    codec, logits = fitted
    kd, labels = KDConfig(loss=loss), logits.argmax(dim=1)
    assert codec.unsupported(kd, None) is None
    records = codec.encode(logits, labels)[:, None]
    found = targets.teacher_logits([codec], records, kd)
    dense = Dense(codec.num_classes)
    exact = targets.teacher_logits([dense], dense.encode(centred(logits).float())[:, None], kd)
    assert (found - exact).norm() < 0.3 * exact.norm()


# ------------------------------------------------------------------------------------------- stores


@pytest.fixture(scope="session")
def transformed(tmp_path_factory, fashion, teacher) -> Path:
    """The shared store once more, in eight bytes a record."""

    def make(folder: Path) -> None:
        run("ckd_dist.cache_logits", *cache_options(fashion, teacher, folder / "store", *CODEC))

    return make_once(tmp_path_factory, "transformed", make) / "store"


@pytest.fixture
def changed(transformed, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(transformed, tmp_path / "copy"))


def test_several_processes_and_convert_write_the_same_bytes(transformed, store, fashion, teacher, tmp_path):
    run("ckd_dist.cache_logits", *cache_options(fashion, teacher, tmp_path / "three", *CODEC), nproc=3)
    assert contents(tmp_path / "three") == contents(transformed)
    assert store_here("convert", store, tmp_path / "converted", "--data.train", fashion["train"], *CODEC) == 0
    ours, theirs = contents(transformed), contents(tmp_path / "converted")
    assert {**ours, "manifest.json": ""} == {**theirs, "manifest.json": ""}


def test_a_student_learns_from_it_as_from_all_logits(transformed, store, fashion, tmp_path):
    words = ["--data.train", fashion["train"], "--data.batch_size", 64, "--model.name", "resnet8", "--epochs", 2]
    for name, path in (("dense", store), ("transform", transformed)):
        more = ["--teacher.store", path, "--teacher.checkpoints", "[2,3]", "--run_dir", tmp_path / name]
        run_here("distill", *words, "--log_every", 1, "--optim.lr", 0.05, "--amp", "off", *more)
    dense, transform = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("dense", "transform"))
    assert transform == pytest.approx(dense, rel=0.05)


def test_it_is_verified_and_grows(transformed, changed, fashion, teacher, capsys):
    assert store_here("verify", changed, "--teacher.run", teacher, "--data.train", fashion["train"]) == 0
    before = contents(changed)
    cache_here(*cache_options(fashion, teacher, changed, *CODEC, "--views", 3))
    after = contents(changed)
    assert all(after[name] == digest for name, digest in before.items() if name != "manifest.json")
    assert store_here("verify", changed, "--teacher.run", teacher, "--data.train", fashion["train"]) == 0


@pytest.mark.parametrize("left", ["nothing", "no sidecar yet", "the basis"])
def test_a_caching_goes_on_from_wherever_a_kill_left_the_basis(changed, transformed, fashion, teacher, left):
    folder = changed / "epoch_0003"
    for view in folder.glob("view_*"):
        shutil.rmtree(view)
    if left != "the basis":
        (folder / "basis.json").unlink()
    if left == "nothing":
        (folder / "basis.npz").unlink()
    cache_here(*cache_options(fashion, teacher, changed, *CODEC))
    assert contents(changed) == contents(transformed)


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def damage_other(path: Path) -> None:
    other = path.parent.parent / "epoch_0001" / path.name
    path.write_bytes(other.read_bytes())


def damage_other_and_checksum(path: Path) -> None:
    """A whole basis of another checkpoint, with its checksum: only the shards' sidecars tell."""
    damage_other(path)
    sidecar = path.with_suffix(".json")
    values = json.loads(sidecar.read_text())
    other = json.loads((path.parent.parent / "epoch_0001" / sidecar.name).read_text())
    sidecar.write_text(json.dumps({**values, "sha256": other["sha256"]}))


def damage_point(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "removed": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "cut": damage_cut,
    "another's": damage_other,
    "another's with its checksum": damage_other_and_checksum,
    "a bit": damage_point,
    "no sidecar": lambda path: path.with_suffix(".json").unlink(),
    "a sidecar that is none": lambda path: path.with_suffix(".json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_basis_is_refused_and_repaired(changed, transformed, fashion, teacher, tmp_path, damage):
    damage(changed / "epoch_0003" / "basis.npz")
    words = ["--data.train", fashion["train"], "--data.batch_size", 64, "--model.name", "resnet8", "--epochs", 1]
    with pytest.raises(UserError, match=r"epoch_0003.*: run python -m ckd_dist\.store repair"):
        run_here("distill", *words, "--teacher.store", changed, "--run_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert store_here("verify", changed) == 1
    assert store_here("repair", changed, "--teacher.run", teacher, "--data.train", fashion["train"]) == 0
    if damage is damage_other_and_checksum:  # whose records are encoded anew, with that basis
        assert store_here("verify", changed, "--teacher.run", teacher, "--data.train", fashion["train"]) == 0
    else:
        assert contents(changed) == contents(transformed)


def test_another_basis_is_another_input_of_a_student(transformed, changed):
    manifest = Manifest.load(changed, "")
    before = manifest.as_input(transformed, [3]).holds
    damage_other_and_checksum(changed / "epoch_0003" / "basis.npz")
    after = manifest.as_input(changed, [3]).holds
    assert {key for key in before if before[key] != after[key]} == {"basis 3"}


def test_the_sample_of_a_fit_is_of_many_places_and_no_more_views_than_needed():
    forward = {"image_size": 8, "mean": [0.5] * 3, "std": [0.5] * 3, "amp": "off"}
    manifest = Manifest(
        dataset={"name": "x", "content_hash": "x", "count": 3000, "num_classes": 10}, recipe={}, view_seed=3,
        forward=forward, codec={}, shard_size=100, checkpoints={"epoch_0001": {"epoch": 1, "views": 9}}, images={},
    )  # fmt: skip
    found = bases.sample(manifest, "epoch_0001")
    assert [view for _, view in found] == [0, 1, 2, 3] and [len(ids) for ids, _ in found] == [3000, 3000, 3000, 1000]
    last = found[-1][0]
    assert (np.diff(last) > 0).all() and len(np.unique(last // 500)) == 6
    manifest.dataset["count"] = 1_000_000
    ((ids, view),) = bases.sample(manifest, "epoch_0001")
    assert view == 0 and len(ids) == 10_000 and len(np.unique(ids // 16)) == 625


def test_too_few_bytes_are_refused(fashion, teacher, tmp_path):
    with pytest.raises(UserError, match="bytes is 1: give 2 to 4,096"):
        cache_here(*cache_options(fashion, teacher, tmp_path / "store", "--codec", "transform", "--bytes", 1))
    with pytest.raises(UserError, match="bytes is for --codec transform, not dense"):
        cache_here(*cache_options(fashion, teacher, tmp_path / "store", "--bytes", 10))


def test_an_ensemble_decodes_each_checkpoint_by_its_own_basis(transformed, store):
    ids = np.arange(100)
    both, exact = StoreReader(str(transformed), [1, 3]), StoreReader(str(store), [1, 3])
    found, dense = (
        [codec.decode(torch.from_numpy(reader.rows(ids, 1)[:, m].copy()), 1.0) for m, codec in enumerate(reader.codecs)]
        for reader in (both, exact)
    )
    for ours, truth in zip(found, dense, strict=True):
        truth = centred(truth).float()
        assert ((ours - truth).norm(dim=1) / truth.norm(dim=1)).mean() < 0.1


def test_codecs_are_compared_on_a_stores_own_records(store, transformed, capsys):
    capsys.readouterr()
    assert store_here("compare", store, "--bytes", 4, 8, "--json") == 0
    dense, small, large, topk = json.loads(capsys.readouterr().out)
    assert [each["codec"]["name"] for each in (dense, small, large, topk)] == [
        "dense",
        "transform",
        "transform",
        "topk",
    ]
    assert [each["bytes"] for each in (dense, small, large)] == [20, 4, 8]
    for temperature in ("1", "4"):
        assert dense["lost"][temperature] < large["lost"][temperature] < small["lost"][temperature] < 0.3
    assert large["top1"] > 0.9 and "mse" in large["losses"] and "mse" not in topk["losses"]
    assert store_here("compare", store, "--checkpoint", 1) == 0
    assert "all" in capsys.readouterr().out
    for words, expected in (
        ([transformed], "has codec transform: name a dense store"),
        ([store, "--checkpoint", 9], "checkpoint: no checkpoint of epoch 9"),
        ([store, "--bytes", 1], "give 2 to 4096"),
    ):
        with pytest.raises(UserError, match=expected):
            store_here("compare", *words)
